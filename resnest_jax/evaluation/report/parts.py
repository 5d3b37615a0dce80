"""Percentages and squares of colour, which all parts of the report use."""

import functools

import numpy as np

from resnest_jax import text

UNDEFINED = '<span class="none">&ndash;</span>'


# As on the console, but with a dash for scores that are not defined.
percent = functools.partial(text.percent, undefined='\N{EN DASH}')


def swatch(colour: np.ndarray) -> str:
  """The HTML of a small square in an RGB colour."""
  red, green, blue = (int(value) for value in colour)
  style = f'background:rgb({red},{green},{blue})'
  return f'<span class="swatch" style="{style}"></span>'
