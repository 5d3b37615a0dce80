"""The terms of the loss, computed in tiles of rows."""
