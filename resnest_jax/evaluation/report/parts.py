"""Percentages and names of classes, which all parts of the report use."""

import functools
from html import escape

import numpy as np

from resnest_jax import text

UNDEFINED = '<span class="none">&ndash;</span>'
percent = functools.partial(text.percent, undefined='\N{EN DASH}')


def named(colour: np.ndarray, name: str) -> str:
  """The HTML of a name after a small square in its RGB colour."""
  style = f'background:rgb({",".join(map(str, colour.tolist()))})'
  return f'<span class="swatch" style="{style}"></span>{escape(name)}'
