"""Every image of a split once: scores, report, submission."""
