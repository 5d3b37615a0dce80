"""From logits to label maps: protocols, windows, scales."""
