"""A page to drop pictures into."""
