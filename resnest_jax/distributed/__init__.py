"""The hosts of a run: joining, messages, failures."""
