"""Zip files for the test servers."""
