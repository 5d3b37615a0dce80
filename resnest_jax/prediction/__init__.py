"""Label maps of pictures, folders and videos."""
