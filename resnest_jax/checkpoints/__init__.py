"""The state that a run keeps, its checksums, and how it resumes."""
