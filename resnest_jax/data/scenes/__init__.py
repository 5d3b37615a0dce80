"""Procedural scenes, the pictures of the mini ADE20K."""
