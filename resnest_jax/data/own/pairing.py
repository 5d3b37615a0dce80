"""Pairs images with masks, in folders or lists."""

import collections
import functools
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from resnest_jax.bands import ARRAY
from resnest_jax.errors import UserError
from resnest_jax.files import read_text
from resnest_jax.text import listed, plural

IMAGE_SUFFIXES = (
  *('.jpg', '.jpeg', '.jpe', '.jfif'),
  *('.png', '.bmp', '.webp', '.tif', '.tiff'),
)
MASK_SUFFIXES = ('.png',)
# Masks of other kinds that `prepare own` reads.
CONVERTED = ('.bmp', '.gif', '.tif', '.tiff')
SHOWN = 3  # How many files a message names.
_PREPARE = 'python -m resnest_jax.data.prepare own FOLDER --data_dir NEW_FOLDER'
# What lies next to pictures and is none.
_NOTES = ('', '.csv', '.db', '.html', '.ini', '.json', '.md', '.txt', '.xml')


class Pair(NamedTuple):
  """A sample's unique name and its files."""

  name: str
  image: str
  mask: str


class Affixes(NamedTuple):
  """What names of files have before and behind the name of the sample.

  `suffix` may include the extension. The case does not matter.
  """

  prefix: str = ''
  suffix: str = ''

  def stem(self, name: str, extensions: Collection[str] = ()) -> str | None:
    """The name of the sample; None if the file's has no such affixes."""
    stem, extension = os.path.splitext(name)
    if extensions and extension.lower() not in extensions:
      return None
    start, end = map(re.escape, self)
    form = re.compile(f'{start}(.+){end}', re.IGNORECASE | re.DOTALL)
    found = form.fullmatch(stem) or form.fullmatch(name)
    return found and found[1]


class Tree(NamedTuple):
  """The files of a folder and those below it.

  A sample's name is the path below the folder without affixes and extension.
  """

  what: str  # 'image' or 'mask'.
  folder: Path
  files: dict[str, str]  # Of each sample, by name.
  others: list[tuple[str | None, Path]]  # By the name they would have, if any.


class Trees(NamedTuple):
  images: Tree
  masks: Tree


def walk(folder: Path, deep: bool = True) -> list[Path]:
  """All files of a folder and, if `deep`, below it, sorted.

  Links are followed; one to nothing is a file, which its reader cannot open.
  Hidden files are skipped. Folders that cannot be read are a `UserError`: no
  file is dropped silently.
  """
  found, closed = [], []
  inside = os.walk(folder, onerror=closed.append, followlinks=True)
  for current, folders, names in inside:
    place = Path(current)
    above = (x for x in place.parents if x.is_relative_to(folder))
    # A link back up would never end.
    again = any(os.path.samefile(place, x) for x in above)
    # Hidden: macOS leaves `._name.jpg` next to files on foreign file systems.
    folders[:] = [x for x in folders if deep and not again and x[0] != '.']
    found += [place / x for x in names if not again and x[0] != '.']
  if closed:
    places = sorted(f'{x.filename} ({x.strerror})' for x in closed)
    raise UserError(
      f'{plural(len(closed), "folder")} cannot be read: '
      f'{listed(places, SHOWN)}. Give yourself the right to read '
      f'(chmod -R u+rX {shlex.quote(str(folder))}), or move them away.'
    )
  return sorted(found)


@functools.cache
def tell(line: str) -> None:
  """Prints a line once, although each split of a folder finds its cause."""
  print(line, flush=True)


def endings(paths: Iterable[Path]) -> str:
  """'3 .heic, 1 .txt'"""
  count = collections.Counter(x.suffix.lower() or 'no extension' for x in paths)
  return listed(f'{number} {kind}' for kind, number in count.most_common())


def read_tree(
  folder: Path,
  affixes: Affixes,
  extensions: Sequence[str],
  what: str,
  skipped: Collection[str] = (),
) -> Tree:
  """Finds a folder's samples; raises `UserError` if two have one name."""
  files: dict[str, str] = {}
  others = []
  for path in walk(folder):
    if str(path) in skipped:
      continue
    inside = path.relative_to(folder)
    stem = affixes.stem(inside.name, extensions)
    if stem is None:
      # Of another ending; what has other affixes is left out as they say.
      stem = affixes.stem(inside.name)
      others.append((stem and _name(inside.parent / stem), path))
      continue
    name = _name(inside.parent / stem)
    if name in files:
      raise UserError(
        f'{files[name]} and {path} have the same name, but a sample has one '
        f'{what}. Remove one, or set '
        f'config.data.folder.{what}_suffix to the end of the names.'
      )
    files[name] = str(path)
  return Tree(what, folder, files, others)


def _name(path: str | PurePath) -> str:
  # macOS takes accents apart: the two forms of a name are one.
  return unicodedata.normalize('NFC', PurePath(path).as_posix())


def read_trees(
  images: Path,
  masks: Path,
  of_images: Affixes,
  of_masks: Affixes,
  convert: Callable[[str], str],
  suffixes: Sequence[str] = IMAGE_SUFFIXES,
) -> Trees:
  """Finds images and masks, which may lie in one folder.

  Raises `UserError` if there are none. `convert('.tif')` says how masks of that
  ending become PNGs.
  """
  of_mask = read_tree(masks, of_masks, MASK_SUFFIXES, 'mask')
  taken = set() if any(of_images) else set(of_mask.files.values())
  of_image = read_tree(images, of_images, suffixes, 'image', taken)
  used = {*of_image.files.values(), *of_mask.files.values()}
  trees = Trees(of_image, of_mask)
  rules = (of_images, suffixes), (of_masks, MASK_SUFFIXES)
  for tree, (affixes, extensions) in zip(trees, rules, strict=True):
    tree.others[:] = [x for x in tree.others if str(x[1]) not in used]
    if tree.files:
      continue
    kinds = f'{affixes.prefix}*{affixes.suffix}' if any(affixes) else ''
    there = endings(path for _, path in tree.others)
    remedy = _remedy(tree.what, tree.others, convert)
    if tree.what == 'image' and any(
      Path(x).is_relative_to(images) for x in taken
    ):
      there = listed(filter(None, (plural(len(taken), 'mask'), there)))
      remedy = (
        'Set config.data.folder.image_suffix and mask_suffix to how the names '
        'of images and of masks end.'
      )
    raise UserError(
      f'there are no {tree.what}s in {tree.folder} '
      f'({kinds or listed(extensions, len(extensions))}); it has '
      f'{there or "no files"}. {remedy}'.rstrip()
    )
  return trees


def _remedy(
  what: str,
  others: Iterable[tuple[str | None, Path]],
  convert: Callable[[str], str],
) -> str:
  """What to do with files that have other endings."""
  kinds = {path.suffix.lower() for _, path in others}
  if '.parquet' in kinds:
    return f'This makes a data set of them: {_PREPARE}.'
  if what == 'image' and ARRAY in kinds:
    return 'Name their bands with config.data.bands (docs/bands.md).'
  if what == 'image':
    return 'Save them as PNG or JPEG.' if kinds - {*_NOTES} else ''
  if kinds & {'.jpg', '.jpeg', '.webp'}:
    return 'JPEG changes the values of masks: export them as PNG.'
  if found := sorted(kinds & {*CONVERTED}):
    return convert(found[0])
  if '.json' in kinds:
    return f'Polygons are no masks: this draws them: {_PREPARE}.'
  return 'Write them as PNG, with the class numbers as values.' if kinds else ''


def match_pairs(trees: Trees, convert: Callable[[str], str]) -> list[Pair]:
  """Pairs the files that have the same name, sorted by it.

  Raises `UserError` if a file has no partner, with affixes by which all have.
  """
  problems, remedies = [], []

  def complain(tree: Tree, others: Sequence[tuple[str | None, Path]]) -> None:
    if others:
      names = listed((path.name for _, path in others), SHOWN)
      problems.append(f'{names} cannot be read as {tree.what}')
      remedies.append(_remedy(tree.what, others, convert))

  # Not dropped: an orphan usually means wrong affixes or a lost file.
  for have, lack in (trees, trees[::-1]):
    if not (missing := have.files.keys() - lack.files.keys()):
      continue
    first = (os.path.basename(have.files[x]) for x in sorted(missing))
    problems.append(
      f'{plural(len(missing), have.what, "have")} no {lack.what} in '
      f'{lack.folder} ({listed(first, SHOWN)})'
    )
    complain(lack, [x for x in lack.others if x[0] in missing])
  if problems:
    remedies.append(_flags_that_pair(trees) or _OF_NAMES)
  # Neither file of a pair is read: no orphan tells.
  unread = [
    {x for x, y in tree.others if y.suffix.lower() not in _NOTES}
    for tree in trees
  ]
  lost = unread[0] & unread[1] - {None, *trees.images.files, *trees.masks.files}
  near = [[x for x in tree.others if x[0] in lost] for tree in trees]
  # In a folder of both, a file is not its own partner.
  if near[0] and (near[0] != near[1] or len(near[0]) > len(lost)):
    for tree, others in zip(trees, near, strict=True):
      complain(tree, others)
  if problems:
    raise UserError(f'{"; ".join(problems)}. {" ".join(remedies)}')
  for tree in trees:
    if tree.others:
      tell(f'left out of {tree.folder}: {endings(x for _, x in tree.others)}')
  return [
    Pair(name, file, trees.masks.files[name])
    for name, file in sorted(trees.images.files.items())
  ]


_OF_NAMES = (
  'Names are the same up to the extension: remove these files, set '
  'config.data.folder.image_prefix, image_suffix, mask_prefix and mask_suffix '
  'to how the names begin and end, or write a list of pairs '
  '(config.data.folder.lists).'
)


_start = os.path.commonprefix  # Of any words, not of paths.


def _flags_that_pair(trees: Trees) -> str:
  """The flags of affixes with which all files have partners, or ''."""
  both = [
    [Path(os.path.relpath(x, tree.folder)) for x in tree.files.values()]
    for tree in trees
  ]
  stems = [[path.stem for path in paths] for paths in both]
  # Names that count: img_10, img_11 have img_ in common.
  starts = [_start(x).rstrip('0123456789') for x in stems]
  ends = [_start([stem[::-1] for stem in x])[::-1] for x in stems]
  ends, none = [x.lstrip('0123456789') for x in ends], ['', '']
  for parts in ((none, ends), (starts, none), (starts, ends)):
    affixes = [*map(Affixes, *parts)]
    names = [
      sorted(str(x.parent / (of.stem(x.name) or '')) for x in paths)
      for paths, of in zip(both, affixes, strict=True)
    ]
    flags = [
      shlex.quote(f'--config.data.folder.{what}_{field}={value}')
      for what, of in zip(('image', 'mask'), affixes, strict=True)
      for field, value in of._asdict().items()
      if value
    ]
    if flags and names[0] == names[1] and len({*names[0]}) == len(names[0]):
      return f'All have a partner with {" ".join(flags)}'
  return ''


def read_list(path: Path, trees: Callable[[], Trees] | None) -> list[Pair]:
  """Reads a list of samples.

  Each line has the paths of an image and of its mask, relative to the list and
  separated by a tab, blanks or a comma; or the name of both in `trees`, as in
  the lists of Pascal VOC. Empty lines and lines with # are skipped. Files of a
  pair give the sample its image's path as name. All else is a `UserError`.
  """
  try:
    lines = read_text(path).splitlines()
  except (OSError, ValueError) as error:
    raise UserError(
      f'the list {path} cannot be read ({error}). It is text in UTF-8. Set '
      'config.data.data_dir and config.data.folder.lists.'
    ) from error
  pairs: dict[str, Pair] = {}
  missing = []
  for number, line in enumerate(lines, 1):
    if not line.strip() or line.startswith('#'):
      continue
    where, pair = f'{path}, line {number}', None
    words = _two_paths(line, path.parent)
    first = words[0] if words else ''
    is_path = os.path.splitext(first)[1] or os.path.isfile(path.parent / first)
    if trees and not is_path:
      pair = _named(line.strip(), where, path.parent, trees())
    if not pair and not words:
      raise UserError(
        f'{where}: {line!r} is not an image and its mask, nor the name of both '
        'in config.data.folder.images and masks. Put a tab between paths that '
        'contain blanks.'
      )
    if not pair:
      # Names become paths of overlays: they must stay below the output folder.
      parts = [x for x in PurePosixPath(words[0]).parts if x not in ('..', '/')]
      files = [str(path.parent / word) for word in words]
      pair = Pair(os.path.splitext('/'.join(parts))[0], *files)
      lost = [x for x in files if not os.path.isfile(x)]
      missing += [f'{x} in line {number}' for x in lost]
    if pair.name in pairs:
      raise UserError(
        f'{where}: a second image named {pair.name}. Remove one of the lines, '
        'or rename one of the images.'
      )
    pairs[pair.name] = pair
  if not pairs:
    raise UserError(
      f'{path} has no samples. Write a line for each: the image, a blank and '
      'its mask, relative to this file, or a name alone.'
    )
  # All files at once, so that the user repairs the list in one go.
  if missing:
    raise UserError(
      f'{path}: {plural(len(missing), "file", "are")} missing '
      f'({listed(missing, SHOWN)}). Paths are relative to the list.'
    )
  return list(pairs.values())


def _two_paths(line: str, folder: Path) -> list[str] | None:
  """The paths in a line, by the separator with which there are such files."""
  first = None
  for separator in ('\t', None, ',', ';'):
    words = [word.strip(' "') for word in line.split(separator)]
    if len(words) != 2 or not all(words):
      continue
    # From Windows; elsewhere a backslash may be part of a name.
    words = [
      x if os.path.isfile(folder / x) else x.replace('\\', '/') for x in words
    ]
    if all(os.path.isfile(folder / x) for x in words):
      return words
    first = first or words
  return first


def _named(line: str, where: str, folder: Path, trees: Trees) -> Pair | None:
  """The sample whose name, with or without an ending, or image is `line`."""
  line = line.strip('"').replace('\\', '/')
  inside = os.path.relpath(folder / line, trees.images.folder)
  for text in (line, inside):
    for name in (_name(text), _name(os.path.splitext(text)[0])):
      files = [tree.files.get(name) for tree in trees]
      if all(files):
        return Pair(name, *files)
      if any(files):
        lack = trees[files.index(None)]
        raise UserError(
          f'{where}: {name} has no file in {lack.folder}. Add it, or remove '
          'the line.'
        )
  return None
