"""A user's own classes: names, colours and mask values, from a small file.

In plain text each line is a class, such as `1: road 128 64 128`: its value in
the masks (all lines or none have one; without, the first class is 0), its name,
and its colour (without, one is chosen). A class may have several values, `2 3:
tree`. Values without a class are listed as `ignore: 0`; 255 is ignored anyway,
unless a class has it. Masks of 16 bits have values up to 65535. Lines with #
are comments. JSON has the same facts in lists, `values` and `ignore` optional;
predict.py writes its `classes.json` so:

    {"classes": ["road", "tree"], "palette": [[128, 64, 128], [34, 139, 34]],
     "values": [1, [2, 3]], "ignore": [0]}

Tables whose first line names the columns (`name,r,g,b`), CVAT's labelmap.txt
and id2label.json are read as well; docs/own-data.md has examples.
"""

import csv
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.files import read_text
from resnest_jax.labels import IGNORE, LABEL_SETS, LabelSet
from resnest_jax.text import plural
from resnest_jax.untrusted import load_json

Colour = tuple[int, int, int]
Values = tuple[int, ...]  # Of masks.

EXAMPLE = (
  'Each line is a name and a colour, for example "road 128 64 128"; the '
  'first is class 0 in the masks. See docs/own-data.md.'
)
# A name may end in a number ("route 66"): only three of them are a colour.
_COLOUR = re.compile(r'(.*?)[\s,;(\[]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)[\s)\]]*')
_HEX = re.compile(r'#([0-9a-fA-F]{6})$')
# A line of CVAT's labelmap.txt, label:color_rgb:parts:actions.
_LABELMAP = re.compile(r'(.+?):((?:\d+,\d+,\d+)?):[^:]*:[^:]*')
# Tables, lists and dictionaries of other programs, which are no names.
_NO_NAME = re.compile(
  r'.*[,\x00-\x1f].*|.*[;=]\s*\d.*|.*\s#.*|(["\']).*\1|- .*'
  r'|.*(?:\s[-+]?\d*\.?\d+){2}'
)
_NUMBERED = re.compile(r'\d+(?:[\s;=]|[.)]\s|$)')
_LINES = (
  'Write "road", "road 128 64 128" or, with a mask value, "0: road 128 64 '
  '128". A table starts with a line that names its columns, such as '
  '"name,r,g,b" or "value,name". A name with a comma needs JSON.'
)
_LONGEST = 1000  # Characters of a line.
_LARGEST = 2**16 - 1  # Value of a mask.
_IGNORED = ('ignore', '__ignore__')
_COLUMNS = {
  'name': ('name', 'class', 'class name', 'label', 'label name', 'category'),
  'value': ('value', 'pixel value', 'id', 'index', 'class id', 'label id'),
  'red': ('red', 'r'),
  'green': ('green', 'g'),
  'blue': ('blue', 'b'),
}
_COLUMN = {word: kind for kind, words in _COLUMNS.items() for word in words}


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
  """The contents of a classes file."""

  labels: LabelSet  # Names, colours and the train id of each mask value.
  values: tuple[Values, ...]  # Of each class; the first is the one to write.
  ignored: Values  # Deliberately no class, sorted.
  chosen: tuple[str, ...]  # Names of the classes without a colour in the file.
  plain: bool  # Lines of text, and neither a table nor JSON.

  def colours(self) -> dict[str, Colour]:
    palette = map(tuple, self.labels.palette.tolist())
    return dict(zip(self.labels.classes, palette, strict=True))

  def known(self) -> np.ndarray:
    """Bool (65536,): the mask values that are a class or listed as ignored."""
    known = self.labels.to_train_id != IGNORE
    known[[*self.ignored, IGNORE]] = True
    return known


@dataclasses.dataclass(frozen=True)
class _Entry:
  where: str  # 'classes.txt, line 3', which begins messages.
  name: str
  colour: Colour | None
  values: Values
  positional: bool  # Without values of its own: its position is its value.


def read_classes(path: str | Path) -> Classes:
  """Reads a classes file; raises `UserError` if it is missing or invalid."""
  path = Path(path)
  try:
    text = read_text(path)
  except (OSError, ValueError) as error:
    raise UserError(
      f'the classes file {path} cannot be read ({error}). It is text in UTF-8 '
      f'that you write and have the right to read. {EXAMPLE}'
    ) from error
  return parse_classes(text, str(path))


def parse_classes(text: str, where: str) -> Classes:
  """Classes of a file's text; `UserError`s about it begin with `where`."""
  # A name may begin with a bracket, a list of names with a quote behind it.
  read = _read_json if re.match(r'\s*(\{|\[\s*["{[])', text) else _read_text
  entries, ignored, plain = read(text, where)
  _check(entries, ignored, where)
  return _make(entries, ignored, plain)


def _read_text(text: str, path: str) -> tuple[list[_Entry], list[int], bool]:
  entries, ignored = [], []
  lines = [
    (f'{path}, line {number}', line.strip())
    for number, line in enumerate(text.splitlines(), 1)
    if line.strip() and not line.lstrip().startswith('#')
  ]
  for where, line in lines:
    if len(line) > _LONGEST:
      raise UserError(f'{where} has {len(line)} characters. {_LINES}')
  if lines and (header := _header(*lines[0])):
    return _read_table(lines[1:], *header)
  for where, line in lines:
    if line == '__ignore__' and not entries:
      continue  # labelme's first line, for 255.
    if found := _LABELMAP.fullmatch(line):
      line = f'{found[1]} {found[2]}'
    # Only the first colon separates values: names may have further ones.
    head, colon, rest = map(str.strip, line.partition(':'))
    if colon and head.lower() in _IGNORED:
      ignored += _numbers(rest, where)
      continue
    values = _numbers(head, where) if colon else ()
    rest = rest if colon else head
    rest = _HEX.sub(lambda x: ' '.join(map(str, bytes.fromhex(x[1]))), rest)
    # The blank: a colour without a name matches, and `_check` refuses it.
    match = _COLOUR.fullmatch(f' {rest}')
    name = match[1].strip() if match else rest
    if _NO_NAME.fullmatch(name) or (not colon and _NUMBERED.match(name)):
      raise UserError(f'{where}: {line!r} is not a name and a colour. {_LINES}')
    colour = tuple(map(int, match.groups()[1:])) if match else None
    entries.append(_entry(where, name, colour, values, len(entries)))
  # "leaf 1", "flower 2": values, unless it is "class 1", "class 2".
  numbered = [re.fullmatch(r'(.*\S)\s+\d+', x.name) for x in entries]
  stems = {x[1] for x in numbered if x and entries[0].positional}
  if len(stems) == len(entries) > 1:
    raise UserError(
      f'{entries[0].where}: each name ends in a number, {entries[0].name!r}. '
      f'Mask values come first: "1: {numbered[0][1]}".'
    )
  # Of two lines it is no heading: one class alone is none.
  bare = [x.name for x in entries if x.positional and not x.colour]
  if len(entries) > 2 and bare == [entries[0].name]:
    raise UserError(
      f'{entries[0].where}: {bare[0]!r} has no colour, but all other lines '
      'have one. Write one behind it, or # in front of it if it is a heading.'
    )
  return entries, ignored, True


def _entry(
  where: str, name: str, colour: Colour | None, values: Values, position: int
) -> _Entry:
  # "ignore 0 0 0" would otherwise become a class that is trained.
  if name.lower() in _IGNORED:
    raise UserError(
      f'{where}: what is not a class is listed by its mask values, '
      'for example "ignore: 0".'
    )
  return _Entry(where, name, colour, values or (position,), not values)


def _header(where: str, line: str) -> tuple[str | None, list[str]] | None:
  """Separator and kinds of the columns, if the line is a table's header."""
  separator = next((x for x in '\t;,' if x in line), None)
  words = [
    re.sub(r'[\s_]+', ' ', word.strip(' "\'').lower())
    for word in line.split(separator)
  ]
  kinds = [_COLUMN.get(word) for word in words]
  if len(set(kinds) - {None}) < 2 or re.search(r'\d', line):
    return None
  wrong = None in kinds or len(set(kinds)) < len(kinds) or 'name' not in kinds
  if wrong or len({'red', 'green', 'blue'} & set(kinds)) not in (0, 3):
    raise UserError(
      f'{where}: the columns of a table are "name", if it has values "value", '
      f'and if it has colours "r", "g" and "b", not {line!r}. Rename them or '
      'remove the others.'
    )
  return separator, kinds


def _read_table(
  lines: Sequence[tuple[str, str]], separator: str | None, kinds: Sequence[str]
) -> tuple[list[_Entry], list[int], bool]:
  entries, ignored = [], []
  for where, line in lines:
    cells = line.split()
    if separator:
      # Each line for itself: a quote that is left open swallows no class.
      (cells,) = csv.reader([line], delimiter=separator, skipinitialspace=True)
    cells = [cell.strip() for cell in cells]
    if len(cells) != len(kinds):
      raise UserError(
        f'{where}: {line!r} has {plural(len(cells), "cell")}, but the first '
        f'line has {len(kinds)}. Make them as many.'
      )
    row = dict(zip(kinds, cells, strict=True))
    name = row.pop('name')
    if wrong := [cell for cell in row.values() if not cell.isdecimal()]:
      raise UserError(
        f'{where}: {wrong[0]!r} is not a number from 0 on; write one.'
      )
    values = (int(row['value']),) if 'value' in row else ()
    colour = None
    if 'red' in row:
      colour = tuple(int(row[kind]) for kind in ('red', 'green', 'blue'))
    if name.lower() in _IGNORED and values:
      ignored += values
    else:
      entries.append(_entry(where, name, colour, values, len(entries)))
  return entries, ignored, False


def _numbers(text: str, where: str) -> Values:
  words = text.replace(',', ' ').split()
  if not words or not all(word.isdecimal() for word in words):
    raise UserError(
      f'{where}: {text!r} is no mask value. Lines with a colon are "1: '
      'road 128 64 128" or "ignore: 0"; without a colon the name comes first.'
    )
  return tuple(map(int, words))


def _read_json(text: str, path: str) -> tuple[list[_Entry], list[int], bool]:
  try:
    content = load_json(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not valid JSON: {error}') from error
  if isinstance(content, list):
    content = {'classes': content}
  if isinstance(content.get('id2label'), dict):
    content = content['id2label']
  if content and all(map(str.isdecimal, content)):
    # As their text, a key may have thousands of digits.
    order = sorted(content, key=lambda x: (len(x), x))
    names = [content[x] for x in order]
    content = {'classes': names, 'values': [int(x[:9]) for x in order]}
  if unknown := content.keys() - {'classes', 'palette', 'values', 'ignore'}:
    # Among numbers it is the key that is none.
    first = min(unknown, key=lambda x: (x.isdecimal(), x))
    raise UserError(
      f'{path} has {first!r}; accepted are classes, palette, '
      'values and ignore, or {"0": "road", "1": "tree"}.'
    )
  names = content.get('classes')
  if not _is_list(names, str):
    raise UserError(
      f'{path}: "classes" must be a list of names, as in '
      '{"classes": ["road", "tree"]}.'
    )
  number = len(names)
  palette, values = (
    content.get(key) or [None] * number for key in ('palette', 'values')
  )
  ignored = content.get('ignore') or []
  fit = [isinstance(x, list) and len(x) == number for x in (palette, values)]
  if not all(fit) or not _is_list(ignored, int):
    raise UserError(
      f'{path}: "palette" and "values" must be lists as long as "classes" '
      f'({number}), "ignore" a list of numbers.'
    )
  entries = []
  for i, name in enumerate(names):
    where, own = f'{path}, class {i}', values[i]
    colour = _tuple(palette[i], 'colour', where)
    value = _tuple([own] if type(own) is int else own, 'value', where)
    entries.append(_Entry(where, name, colour, value or (i,), not value))
  return entries, ignored, False


def _is_list(value: Any, kind: type) -> bool:
  # `type`, because JSON's true and false are also instances of int.
  return isinstance(value, list) and all(type(x) is kind for x in value)


def _tuple(given: Any, what: str, where: str) -> tuple[int, ...] | None:
  if given is None:
    return None
  # A colour has 3 numbers; a class has any number of values, but not none.
  wrong = not _is_list(given, int) or not given
  if wrong or (what == 'colour' and len(given) != 3):
    raise UserError(f'{where}: {given!r} is no {what}.')
  return tuple(given)


def _check(entries: list[_Entry], ignored: list[int], path: str) -> None:
  """Refuses numbers out of range, duplicates and missing names."""
  if len(entries) == 1:
    name = entries[0].name
    other = 'background' if entries[0].positional else '0: background'
    other = 'object' if name == 'background' else other
    raise UserError(
      f'{path} has 1 class; there must be 2 to {IGNORE}. What is not {name} '
      f'is a class as well: add "{other}" in front of it. If the masks are '
      f'black and white, write "0: background" and "255: {name}".'
    )
  if not 2 <= len(entries) <= IGNORE:
    raise UserError(
      f'{path} has {plural(len(entries), "class")}; there must be 2 to '
      f'{IGNORE}. {EXAMPLE}'
    )
  # A mixture is ambiguous: the position of a class could be its value or not.
  if len({entry.positional for entry in entries}) > 1:
    first = next(entry for entry in entries if entry.positional)
    raise UserError(
      f'{first.where}: {first.name} has no mask value, but other classes '
      'have one ("1: road"); give one to each class.'
    )
  taken = {('value', value): 'ignore' for value in ignored}
  for entry in entries:
    # JSON may escape half of a character, which no file takes.
    if re.search('[\ud800-\udfff]', entry.name):
      raise UserError(f'{entry.where}: {entry.name!r} is no text; rename it.')
    _check_range(entry.values, f'{entry.where}:', _LARGEST)
    _check_range(entry.colour or (), f'{entry.where}:')
    facts = [('name', entry.name), *(('value', x) for x in entry.values)]
    for fact in facts:
      if fact in taken:
        of = '' if fact[0] == 'name' else f' of {entry.name}'
        raise UserError(
          f'{entry.where}: the {fact[0]} {fact[1]}{of} is also used by '
          f'{taken[fact]}. Each class needs its own; mask values precede the '
          'name ("1: road").'
        )
    # Only after its own check: a class may list one of its values twice.
    taken |= dict.fromkeys(facts, entry.name)
    taken['name', entry.name] = 'an earlier class'
    if not entry.name.strip():
      raise UserError(f'{entry.where}: the name is missing. {EXAMPLE}')
  _check_range(ignored, f'{path}: ignore', _LARGEST)


def _check_range(numbers: Sequence[int], where: str, most: int = 255) -> None:
  if bad := [number for number in numbers if not 0 <= number <= most]:
    raise UserError(f'{where} {bad[0]} is not from 0 to {most}.')


def _make(entries: list[_Entry], ignored: list[int], plain: bool) -> Classes:
  given = [entry.colour for entry in entries if entry.colour]
  open_ = [entry.name for entry in entries if not entry.colour]
  colours = dict(zip(open_, distinct_colours(len(open_), given), strict=True))
  to_train_id = np.full(_LARGEST + 1, IGNORE, np.uint8)
  for train_id, entry in enumerate(entries):
    to_train_id[list(entry.values)] = train_id  # Also 255, if a class has it.
  palette = [entry.colour or colours[entry.name] for entry in entries]
  names, values = zip(*((x.name, x.values) for x in entries), strict=True)
  labels = LabelSet('own', names, np.array(palette, np.uint8), to_train_id)
  return Classes(labels, values, tuple(sorted({*ignored})), tuple(open_), plain)


def distinct_colours(number: int, taken: Sequence[Colour] = ()) -> list[Colour]:
  """Colours far from each other, from `taken`, from black and from white."""
  # Farthest-point sampling of a 9 x 9 x 9 grid: a class keeps its colour when
  # others are added. Integers make the choice the same on every machine.
  levels = np.linspace(0, 255, 9).astype(np.int64)
  grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
  before = np.array([(0, 0, 0), (255, 255, 255), *taken], np.int64)
  # Distance of each grid point to the nearest colour so far, (729,).
  nearest = np.min([_distance(grid, colour) for colour in before], 0)
  chosen = []
  for _ in range(number):
    colour = grid[nearest.argmax()]
    chosen.append(tuple(colour.tolist()))
    nearest = np.minimum(nearest, _distance(grid, colour))
  return chosen


def _distance(colours: np.ndarray, colour: np.ndarray) -> np.ndarray:
  # The "redmean" approximation of perceived distance, squared and scaled.
  red, green, blue = ((colours - colour) ** 2).T
  redness = colours[:, 0] + colour[0]  # 0 to 510
  return (1024 + redness) * red + 2048 * green + (1534 - redness) * blue


def label_set(
  number: int,
  classes: Sequence[str] | None,
  palette: Sequence[Sequence[int]] | None,
) -> LabelSet:
  """The labels of weights, from the names and colours stored with them.

  Without `number` names: those of the data set in `LABEL_SETS` that has that
  many classes, else '0', '1', ... Without `number` colours, some are chosen.
  """
  names = tuple(classes or ())
  for labels in LABEL_SETS:
    fits = len(names) != number or (names == labels.classes and not palette)
    if fits and number == len(labels.classes):
      return labels
  if len(names) != number:
    names = tuple(map(str, range(number)))
  if palette is None or len(palette) != number:
    palette = distinct_colours(number)
  to_train_id = np.arange(256, dtype=np.uint8)
  to_train_id[number:] = IGNORE
  return LabelSet('own', names, np.array(palette, np.uint8), to_train_id)
