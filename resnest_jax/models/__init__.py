"""ResNeSt, the heads, and how each platform computes their layers."""
