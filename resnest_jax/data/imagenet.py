"""ImageNet (ILSVRC 2012) as a tfds builder that needs no TensorFlow.

Two archives in one folder hold 1,281,167 and 50,000 photographs:

    ILSVRC2012_img_train.tar
      n01440764.tar, ...: an archive for each class, named by WordNet's number
        n01440764_10026.JPEG, ...
    ILSVRC2012_img_val.tar
      ILSVRC2012_val_00000001.JPEG, ...

The classes of the latter are in no archive: they come from the list that tfds
has of them. Examples are those of tfds' own `imagenet2012`.

Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV
2015.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import tensorflow_datasets as tfds

from resnest_jax.data import archives
from resnest_jax.data.archives import ArchiveBuilder, ArchiveConfig
from resnest_jax.data.images import by_pillow, decode_image
from resnest_jax.errors import UserError, ending
from resnest_jax.labels import SYNSETS
from resnest_jax.text import listed

URL = 'https://image-net.org/download-images'
TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
# What a drawn ImageNet shows, by numbers that WordNet has not.
DRAWN = (
  *('house', 'tree', 'car', 'person', 'street lamp', 'traffic sign'),
  *('balloon', 'mushroom', 'sailing boat', 'table', 'bottle', 'umbrella'),
)


RELEASE = ArchiveConfig(
  name='release',
  description='The challenge of 2012: 1000 classes.',
  counts={'train': 1_281_167, 'validation': 50_000},
  classes=SYNSETS,
)
MINI = ArchiveConfig(
  name='mini',
  description='Drawn things in the layout of the release.',
  classes={f'n9{i:07d}': name for i, name in enumerate(DRAWN)},
)
_NEEDED = (
  f'Put {TRAIN} (148 GB) and {VALIDATION} (6.7 GB) in one folder. Register at '
  f'{URL} (free for research) and download both. Pictures that are unpacked '
  'into a folder for each class are read in place: docs/classify.md.'
)


class Picture(NamedTuple):
  """What an archive has of an example."""

  name: str
  synset: str
  encoded: bytes


@dataclasses.dataclass(frozen=True)
class Pictures:
  """The pictures of an archive, which are read from its begin to its end."""

  path: Path
  read: Callable[[tarfile.TarFile], Iterator[Picture]]
  expected: int

  def __len__(self) -> int:
    return self.expected

  def __iter__(self) -> Iterator[Picture]:
    number = 0
    with opened(self.path) as archive:
      for picture in self.read(archive):
        yield picture
        number += 1
    if number != self.expected:
      raise UserError(
        f'{self.path} has {number} pictures, expected {self.expected}. It is '
        f'another release or incomplete. {_NEEDED}'
      )


# Examples, features and their names as of tfds' builder of the same name.
class Imagenet2012(ArchiveBuilder, skip_registration=True):
  """Stored in `DATA_DIR/imagenet2012/CONFIG/1.0.0`; see `ArchiveBuilder`."""

  HOMEPAGE = 'https://image-net.org'
  KEYS = ('image', 'label', 'file_name')
  DESCRIPTION = 'Photographs with a class for each of them.'
  BUILDER_CONFIGS = [RELEASE, MINI]  # noqa: RUF012

  def features(self) -> dict[str, Any]:
    return {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(names=[*self.builder_config.classes]),
      'file_name': tfds.features.Text(),
    }

  @staticmethod
  def open_contents(config, path):
    with ending(_NEEDED):
      names = TRAIN, VALIDATION
      train, validation = archives.find_archives(Path(path), names)
    with opened(train) as archive:
      members = [(x.name, x.size) for x in archive]
      comment = archive.pax_headers.get('comment', '').encode()
    counts = check_release(train, members, comment, config)
    labels = validation_classes(config, counts['validation'])
    read = functools.partial(read_validation, classes=labels)
    facts = members, os.path.getsize(validation), comment
    return archives.Contents(
      files=[train, validation],
      comment=comment,
      pairs={
        'train': Pictures(train, read_train, counts['train']),
        'validation': Pictures(validation, read, counts['validation']),
      },
      read=read_example,
      fingerprint=hashlib.sha256(repr(facts).encode()).hexdigest(),
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
  """An archive; damage of it and of archives inside is a `UserError`."""
  try:
    with tarfile.open(path, 'r:') as archive:
      yield archive
  except (tarfile.TarError, OSError, EOFError) as error:
    raise UserError(
      f'{path} is no whole tar archive ({error}). With '
      f'{os.path.getsize(path)} bytes it is probably an interrupted download: '
      'delete it and download it again.'
    ) from error


@ending(_NEEDED)
def check_release(
  path: Path,
  members: Sequence[tuple[str, int]],
  comment: bytes,
  config: ArchiveConfig,
) -> Mapping[str, int]:
  """The number of pictures of each split; names and sizes are of its files."""
  expected, names = [f'{x}.tar' for x in config.classes], dict(members)
  drawn = archives.counts_from_comment(comment, ('train', 'validation'))
  if bool(drawn) == bool(config.counts):
    what = 'was drawn: prepare imagenet_mini' if drawn else 'was not drawn here'
    raise UserError(f'{path} {what}.')
  if missing := sorted({*expected} - {*names}):
    raise UserError(
      f'{path} has {len(names)} files, such as {listed(names, 1) or "none"}; '
      f'it must have an archive for each of {len(expected)} classes. The first '
      f'that is missing is {missing[0]}.'
    )
  return config.counts or drawn


def validation_classes(config: ArchiveConfig, number: int) -> list[str]:
  """The class of each picture, by its number."""
  if config is MINI:  # They take turns.
    classes = list(MINI.classes)
    return [classes[i % len(classes)] for i in range(number)]
  path = 'datasets/imagenet2012/validation_labels.txt'
  return tfds.core.tfds_path(path).read_text().split()


def read_train(archive: tarfile.TarFile) -> Iterator[Picture]:
  for member in archive:
    synset = member.name.removesuffix('.tar')
    with tarfile.open(fileobj=archive.extractfile(member), mode='r:') as inner:
      for picture in inner:
        encoded = inner.extractfile(picture).read()
        yield Picture(picture.name, synset, encoded)


def read_validation(
  archive: tarfile.TarFile, classes: list[str]
) -> Iterator[Picture]:
  for member in archive:
    found = re.fullmatch(r'ILSVRC2012_val_(\d{8})\.JPEG', member.name)
    if not found or not 1 <= int(found[1]) <= len(classes):
      raise UserError(
        f'{archive.name} has {member.name}; its pictures are called '
        f'ILSVRC2012_val_00000001.JPEG and so on. {_NEEDED}'
      )
    encoded = archive.extractfile(member).read()
    yield Picture(member.name, classes[int(found[1]) - 1], encoded)


def read_example(picture: Picture) -> dict[str, Any]:
  """Checks a picture; what is no RGB or grey JPEG becomes one, as in tfds."""
  name, synset, encoded = picture
  file, buffer = io.BytesIO(encoded), io.BytesIO()
  # 22 pictures are CMYK, and one is a PNG, whatever its name says.
  kind, rgb = by_pillow(file, lambda x: (x.format, x.mode)), None
  usual = kind in (('JPEG', 'RGB'), ('JPEG', 'L'))
  if not usual:
    rgb = by_pillow(file, lambda x: x.convert('RGB'))
  decoded = decode_image(encoded, cv2.IMREAD_COLOR_RGB, name)
  if decoded is None or not (usual or rgb):
    raise UserError(
      f'{name} cannot be decoded: its archive is damaged. Delete it and '
      f'download it again. {_NEEDED}'
    )
  if rgb:
    rgb.save(buffer, 'JPEG', quality=100, subsampling=0)
    encoded = buffer.getvalue()
  return {'image': encoded, 'label': synset, 'file_name': name}
