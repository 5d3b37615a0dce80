"""Weights of others and our own: find, read, recognise, convert."""
