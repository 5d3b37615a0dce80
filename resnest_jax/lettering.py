"""Text on pictures: a line of any characters, each of them visible.

DejaVu Sans, which comes with matplotlib, draws most alphabets, and Droid Sans
Fallback Chinese, Japanese and Korean. What neither has, and what has no ink,
appears as its code point: two names never look the same.
"""

import bisect
import functools
import itertools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIZE = 12


class _Font:
  def __init__(self, path: Path):
    from matplotlib.ft2font import FT2Font  # Late: see `_fonts`.

    self.of_size = functools.cache(functools.partial(ImageFont.truetype, path))
    self._characters = FT2Font(path).get_charmap().keys()

  def shows(self, character: str) -> bool:
    """Whether the character, which is no space, leaves ink."""
    # After a letter: some are a dotted circle alone, and then invisible.
    return ord(character) in self._characters and not np.array_equal(
      self._ink(f'o{character}'), self._ink('o')
    )

  def _ink(self, text: str) -> np.ndarray:
    canvas = Image.new('L', (8 * _SIZE, 3 * _SIZE))
    place = (_SIZE, 2 * _SIZE)
    ImageDraw.Draw(canvas).text(
      place, text, 255, self.of_size(_SIZE), anchor='ls'
    )
    return np.asarray(canvas)


@functools.cache
def _fonts() -> list[_Font]:
  import matplotlib  # Late: it takes a quarter of a second.

  shipped = Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf')
  own = Path(__file__).parent / 'fonts/DroidSansFallback.ttf'
  return [_Font(shipped), _Font(own)]


@functools.cache
def _drawn(character: str) -> tuple[str, int]:
  """What is drawn for a character, and the number of the font."""
  for i, font in enumerate(_fonts()):
    if character == ' ' or font.shows(character):
      return character, i
  # In brackets that are rare in names.
  return f'\u27e8{ord(character):04X}\u27e9', 0


def _runs(text: str) -> list[tuple[str, int]]:
  """The text in pieces of one font each."""
  # Composed: fonts have few accents that combine, and both forms are one text.
  drawn = map(_drawn, unicodedata.normalize('NFC', text))
  return [
    (''.join(piece for piece, _ in group), font)
    for font, group in itertools.groupby(drawn, key=lambda x: x[1])
  ]


def width(text: str, zoom: int = 1) -> int:
  """The width of a line in pixels."""
  fonts = [font.of_size(zoom * _SIZE) for font in _fonts()]
  return round(sum(fonts[i].getlength(piece) for piece, i in _runs(text)))


def wrapped(text: str, most: int, zoom: int = 1) -> list[str]:
  """The text in lines of up to `most` pixels, of at least one character."""
  lines = ['']
  for character in unicodedata.normalize('NFC', text):
    if lines[-1] and width(lines[-1] + character, zoom) > most:
      lines.append('')
    lines[-1] += character
  return lines


def elided(text: str, most: int) -> str:
  """The text, without its middle if it is wider than `most` pixels."""

  # The ends stay: they tell names of one folder apart.
  def cut(kept: int) -> str:
    return f'{text[: kept // 2]}...{text[len(text) - (kept + 1) // 2 :]}'

  if width(text) <= most:
    return text
  kept = range(1, len(text))
  return cut(max(bisect.bisect(kept, most, key=lambda x: width(cut(x))), 1))


def write(
  picture: np.ndarray, text: str, base: tuple, ink: Sequence[int], zoom: int = 1
) -> None:
  """Draws a line into a picture, uint8 (H, W, 3); `base` is x and y, left."""
  x, y = base
  canvas = Image.fromarray(picture)
  pen = ImageDraw.Draw(canvas)
  place = float(x)
  for piece, i in _runs(text):
    font = _fonts()[i].of_size(zoom * _SIZE)
    pen.text((place, y), piece, fill=tuple(ink), font=font, anchor='ls')
    place += font.getlength(piece)
  picture[:] = np.asarray(canvas)
