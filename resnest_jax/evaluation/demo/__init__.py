"""The page of `python -m resnest_jax.demo`."""
