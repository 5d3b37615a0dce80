"""Drawn data sets in the layout of the real ones."""
