"""Base of the tfds builders: archives of images and labels.

A builder streams the official archive, checks every image and its mask or class
and stores the original bytes as ArrayRecord, in the archive's order.
"""

import dataclasses
import fnmatch
import hashlib
import itertools
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from resnest_jax.data.images import decode_image, read_index_mask
from resnest_jax.errors import UserError
from resnest_jax.text import listed, readable
from resnest_jax.threads import map_in_threads
from resnest_jax.untrusted import (
  DAMAGED,
  check_entry,
  check_fields,
  parse_json,
  up_to,
)

# (image, mask) names in the archive.
Pair = tuple[str, str]
# By split, in the order in which examples are stored.
Pairs = dict[str, list[Pair]]
# An archive, a folder in it and how its files' names end.
Source = tuple[zipfile.ZipFile, str, str]


@dataclasses.dataclass(eq=False)
class ArchiveConfig(tfds.core.BuilderConfig):
  url: str | None = None  # None: the archive must be given.
  sha1: str | None = None  # 40 hex digits; None: not checked.
  download_bytes: int = 0  # Approximate, for the disk check.
  # Images per split; None: from the comment of a mini archive's zip file.
  counts: Mapping[str, int] | None = None
  size: tuple[int, int] | None = None  # (width, height); None: likewise.
  classes: Mapping[str, str] | None = None  # WordNet's number -> name.


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
  files: Sequence[str | os.PathLike]
  comment: bytes  # Of the first.
  pairs: Mapping[str, Any]  # `Pairs`, or what has a length and is read once.
  read: Callable[[Any], dict]  # Called by several threads.
  fingerprint: str


# tfds would look in its bucket, by network, and leave a folder in /tmp.
class _LocalInfo(tfds.core.DatasetInfo):
  def initialize_from_bucket(self) -> None:
    pass


# Not registered: tfds.load is not used, and tfds has its own `cityscapes`.
class ArchiveBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes and reads `DATA_DIR/NAME/CONFIG/1.0.0`.

  Args:
    archive: the file, or the folder of several; None: download it.
    on_progress: called with (images done, total).
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}  # noqa: RUF012
  KEYS = ('image', 'label', 'name')  # What every data set has.
  HOMEPAGE: str
  IMAGE_FORMAT: str
  DESCRIPTION = 'Scene parsing: images with a class for every pixel.'

  def __init__(
    self,
    *,
    archive: str | os.PathLike | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
  ):
    super().__init__(**options)
    self._archive = archive
    self._on_progress = on_progress

  @staticmethod
  def open_contents(config: ArchiveConfig, path: str | os.PathLike) -> Contents:
    """Opens the archives at `path` and compares them with `config`."""
    raise NotImplementedError

  def _download(self, dl_manager) -> Path:
    name = f'{self.name}/{self.builder_config.name}'
    raise UserError(f'{name} cannot be downloaded; pass the archive')

  def features(self) -> dict[str, Any]:
    """Of an example; 'image' and 'label' are encoded, as in the archive."""
    return {
      'image': tfds.features.Image(encoding_format=self.IMAGE_FORMAT),
      'label': tfds.features.Image(
        shape=(None, None, 1), encoding_format='png'
      ),
      'name': tfds.features.Text(),
      'height': np.int32,
      'width': np.int32,
    }

  def _info(self) -> tfds.core.DatasetInfo:
    return _LocalInfo(
      builder=self,
      description=self.DESCRIPTION,
      homepage=self.HOMEPAGE,
      features=tfds.features.FeaturesDict(self.features()),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager):
    path = self._archive or self._download(dl_manager)
    contents = self.open_contents(self.builder_config, path)
    self.info.metadata['fingerprint'] = contents.fingerprint
    comment = contents.comment.decode(errors='replace')
    self.info.metadata['comment'] = comment
    total = sum(map(len, contents.pairs.values()))
    done = itertools.count(1)  # Of all splits: a single bar covers them.
    return {
      split: self._generate_examples(contents.read, pairs, done, total)
      for split, pairs in contents.pairs.items()
    }

  def _generate_examples(self, read, pairs, done, total):
    # tfds sorts by integer keys, but distributes them over its temporary files
    # like 128-bit hashes: 0, 1, 2, ... would all go to the first file.
    step = 2**128 // max(len(pairs), 1)
    for i, example in enumerate(map_in_threads(read, pairs)):
      yield i * step, example
      self._on_progress(next(done), total)


def find_archives(folder: Path, names: Sequence[str]) -> list[Path]:
  if not folder.is_dir():
    what = f'there is no folder {folder}'
    if folder.exists():
      what = f'{folder} is a file'
    raise UserError(f'{what}; --archive_dir is the folder of both archives.')
  paths = [folder / name for name in names]
  if missing := [path.name for path in paths if not path.is_file()]:
    there = listed(sorted(map(readable, os.listdir(folder)))) or 'nothing'
    raise UserError(
      f'{folder} has no {" and no ".join(missing)}; there is {there}.'
    )
  return paths


def open_archive(path: str | os.PathLike) -> zipfile.ZipFile:
  path = Path(path)
  if path.is_dir():
    raise UserError(
      f'{path} is a folder. Pass the zip file itself, not unpacked.'
    )
  if not path.is_file():  # Nor from a pipe, which might never come.
    raise UserError(f'there is no file {path}.')
  try:
    return zipfile.ZipFile(path)
  except DAMAGED as error:
    size = path.stat().st_size
    if size and tarfile.is_tarfile(path):
      raise UserError(f'{path} is a tar archive, not a zip file.') from error
    raise UserError(
      f'{path} is not a readable zip file ({error}). With {size} bytes it is '
      'probably an interrupted download or an error page: delete it and '
      'download it again.'
    ) from error


def stems(
  archive: zipfile.ZipFile, folder: str, suffix: str, in_cities: bool = False
) -> dict[str, str]:
  """Maps stem -> name for files directly in `folder`, or in a city's below."""
  found = {}
  for name in archive.namelist():
    head, tail = posixpath.split(name)
    if in_cities:
      head = posixpath.dirname(head)
    # Not the "._*" files that macOS adds to zip files.
    if head == folder and tail.endswith(suffix) and not tail.startswith('.'):
      found[tail.removesuffix(suffix)] = name
  return found


def other_release(
  archive: zipfile.ZipFile, others: Mapping[str, str], wanted: str
) -> UserError:
  """Says which of `others` (file pattern -> description) `archive` is."""
  files = [name for name in archive.namelist() if not name.endswith('/')]
  begin = f'its first file is {files[0]}' if files else 'it has no files'
  found = (other for x, other in others.items() if fnmatch.filter(files, x))
  what = next(found, f'has no {wanted}; {begin}')
  return UserError(f'{archive.filename} {what}.')


def find_pairs(
  images: Source,
  masks: Source,
  folders: Mapping[str, str],
  others: Mapping[str, str],
  in_cities: bool = False,
) -> Pairs:
  """The pairs of each split, of stems in its folder of both sources.

  For `others` see `other_release`.
  """
  where = ' and '.join(dict.fromkeys(x[0].filename for x in (images, masks)))
  pairs = {}
  for split, folder in folders.items():
    found = []
    for archive, root, suffix in (images, masks):
      place = f'{root}/{folder}'
      found.append(stems(archive, place, suffix, in_cities))
      if not found[-1]:
        wanted = f'{place}/{"CITY/" * in_cities}*{suffix}'
        raise other_release(archive, others, wanted)
    pairs[split] = match_pairs(where, folder, *found)
  return pairs


def match_pairs(
  where: str, folder: str, images: Mapping[str, str], masks: Mapping[str, str]
) -> list[Pair]:
  """Pairs images and masks, given as stem -> name; none may be left over."""
  pairs = (images, masks, 'no mask'), (masks, images, 'a mask but no image')
  for have, lack, what in pairs:
    if missing := sorted(have.keys() - lack.keys()):
      raise UserError(
        f'{where}: {len(missing)} {folder} samples have {what}, the first is '
        f'{missing[0]}. The archive is incomplete; download it again.'
      )
  return [(images[stem], masks[stem]) for stem in sorted(images)]


def check_counts(
  archive: zipfile.ZipFile,
  pairs: Pairs,
  expected: Mapping[str, int] | None,
  folders: Mapping[str, str],
  mini: str,
) -> None:
  """Compares the images per split with `expected`, or the zip's comment.

  `mini` is the data set of mini archives, which have that.
  """
  drawn = counts_from_comment(archive.comment, folders)
  if not (expected := expected or drawn):
    raise UserError(
      f'{archive.filename} is not a mini archive: its zip comment does not say '
      'how many images it has. Leave it out to have one drawn, or prepare the '
      f'release as {mini.removesuffix("_mini")}.'
    )
  found = {split: len(pairs[split]) for split in folders}
  if found == {split: expected[split] for split in folders}:
    return
  has = enumeration(f'{found[split]} {folders[split]}' for split in folders)
  wanted = enumeration(str(expected[split]) for split in folders)
  # Intact, but prepared under the name of the release.
  if found == drawn:
    raise UserError(
      f'{archive.filename} is a generated mini archive ({has} images). Prepare '
      f'it as {mini}; the release has {wanted}.'
    )
  raise UserError(
    f'{archive.filename} has {has} images, expected {wanted}. It is another '
    'release or incomplete.'
  )


def enumeration(words: Iterator[str]) -> str:
  """Returns 'a, b and c'."""
  *first, last = words
  return f'{", ".join(first)} and {last}' if first else last


def counts_from_comment(
  comment: bytes, splits: Collection[str]
) -> dict[str, int] | None:
  """Reads images per split from a comment '{"images": {"train": ...}}'."""
  try:
    counts = parse_json(comment, 'the comment')['images']
    check_fields(counts, dict.fromkeys(splits, up_to(10**9, 0)), 'it')
    return {split: counts[split] for split in splits}
  except (UserError, LookupError, TypeError):
    return None


def fingerprint(pairs: Pairs, *archives: zipfile.ZipFile) -> str:
  """Hashes names, sizes and CRCs of the images and masks."""
  # Sorted, and without compressed sizes: repacked archives have the same, also
  # where they lack other files, such as coloured masks and polygons.
  names = {x for split in pairs.values() for pair in split for x in pair}
  entries = sorted(
    f'{entry.filename} {entry.file_size} {entry.CRC:08x}'
    for archive in archives
    for entry in archive.infolist()
    if entry.filename in names
  )
  return hashlib.sha256('\n'.join(entries).encode()).hexdigest()


def read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
  check_entry(archive, archive.getinfo(name))
  try:
    return archive.read(name)  # Compares the CRC, too.
  except DAMAGED as error:
    raise UserError(
      f'{archive.filename} is damaged at {name} ({error}). Delete it and '
      'download it again.'
    ) from error


def read_example(
  images: zipfile.ZipFile,
  masks: zipfile.ZipFile,
  pair: Pair,
  suffix: str,
  values: Collection[int],
  meaning: str,
) -> dict:
  """Reads an image, named NAME + `suffix`, and its mask; checks both.

  For the last two see `read_index_mask`.
  """
  image = read_entry(images, pair[0])
  label = read_entry(masks, pair[1])
  where = f'{images.filename}: {pair[0]}'
  what = f'{masks.filename}: {pair[1]}'
  mask = read_index_mask(label, what, values, meaning)
  # Only to find damage: the original bytes are stored, without loss.
  pixels = decode_image(image, cv2.IMREAD_COLOR_RGB, where)
  if pixels is None:
    raise UserError(f'{where} cannot be decoded as an image.')
  height, width = mask.shape
  if pixels.shape[:2] != mask.shape:
    raise UserError(
      f'{where} is {pixels.shape[1]} x {pixels.shape[0]} pixels, its mask '
      f'{width} x {height}: they do not belong together.'
    )
  name = posixpath.basename(pair[0]).removesuffix(suffix)
  example = {'image': image, 'label': label, 'name': name}
  return example | {'height': height, 'width': width}
