"""What a run keeps: state, checksums, and how it resumes."""
