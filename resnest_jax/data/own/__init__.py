"""Your own images and masks: pairs, classes, splits."""
