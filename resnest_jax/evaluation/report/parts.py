"""What the parts of the report share: percentages and squares of colour."""

import functools

import numpy as np

from resnest_jax import text

UNDEFINED = '<span class="none">&ndash;</span>'


# As on the console, with the dash of the page.
percent = functools.partial(text.percent, undefined='\N{EN DASH}')


def swatch(colour: np.ndarray) -> str:
  """A small square in an RGB colour."""
  red, green, blue = (int(value) for value in colour)
  style = f'background:rgb({red},{green},{blue})'
  return f'<span class="swatch" style="{style}"></span>'
