"""What the parts of the report share: percentages and squares of colour."""

import math

import numpy as np

UNDEFINED = '<span class="none">&ndash;</span>'


def percent(value: float | None, digits: int = 2) -> str:
  """A fraction in percent, as the console has it; a dash if undefined."""
  if value is None or math.isnan(value):
    return '\N{EN DASH}'
  return f'{100 * value:.{digits}f}'


def swatch(colour: np.ndarray) -> str:
  """A small square in an RGB colour."""
  red, green, blue = (int(value) for value in colour)
  style = f'background:rgb({red},{green},{blue})'
  return f'<span class="swatch" style="{style}"></span>'
