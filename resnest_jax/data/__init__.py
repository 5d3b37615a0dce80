"""From an archive or folders to batches."""
