"""Files that run without this project."""
