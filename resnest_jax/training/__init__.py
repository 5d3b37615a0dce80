"""The life of a run, and the step that it repeats."""
