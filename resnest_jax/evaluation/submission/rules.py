"""The files that the test servers of Cityscapes and ADE20K expect.

Cityscapes (evalPixelLevelSemanticLabeling of cityscapesScripts, which the
server runs): a PNG file for each test image, named CITY_SEQUENCE_FRAME*.png,
anywhere in the zip, of the image's size, with label ids, not train ids.

ADE20K (readme.txt in release_test.zip): a PNG file of each test image's name
and size, with class numbers from 1 to 150.
"""

import dataclasses
import functools
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from resnest_jax.data.archives import open_archive
from resnest_jax.data.images import BROKEN
from resnest_jax.data.own.pairing import walk
from resnest_jax.errors import UserError
from resnest_jax.findings import Finding
from resnest_jax.labels import ADE20K, CITYSCAPES, LabelSet
from resnest_jax.text import plural
from resnest_jax.untrusted import DAMAGED, check_entry

ImageSize = tuple[int, int]  # Width, height.


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
  """A test server. A *key* is the part of a name that identifies an image."""

  name: str  # On the command line.
  labels: LabelSet
  number: int  # Test images.
  key: str  # A regular expression.
  suffix: str  # Follows the key in files that are written.
  # May follow the key in names of images, and so of their predictions.
  image_suffix: str
  example: str  # A test image's name, for messages.
  size: ImageSize | None  # None: images differ in size.
  folders: bool  # Whether the zip file may have folders.
  # Begin of keys -> how many test images have it, and all other keys.
  counted: Mapping[str, int]
  known: Collection[str] = ()

  @property
  def mask_values(self) -> np.ndarray:
    """uint8 (C,): train id -> value in a submitted mask."""
    order = np.argsort(self.labels.to_train_id, kind='stable')
    return order[: len(self.labels.classes)].astype(np.uint8)

  def submitted(self, name: str) -> str | None:
    """The key of a file in a zip file, None if the server does not read it."""
    # Cityscapes' script looks for CITY_SEQUENCE_FRAME*.png.
    end = r'[^/]*' if self.suffix != '.png' else ''
    return self._matched(rf'{end}\.png', name)

  def predicted(self, name: str) -> str | None:
    """The key of an index mask, None if it is another file of predict.py."""
    # A full match leaves out NAME_color.png and NAME_overlay.png.
    return self._matched(rf'({self.image_suffix})?\.png', name)

  def image(self, name: str) -> str | None:
    """The key of a test image, None if it is another file."""
    return self._matched(rf'({self.image_suffix})?\.(png|jpg)', name)

  def _matched(self, end: str, name: str) -> str | None:
    found = re.fullmatch(f'({self.key}){end}', name)
    return found and found[1]


# Test images of cities where they are frame 19 of sequences 0, 1, ... In the
# other two frame numbers follow no rule.
_CITIES = {'berlin': 544, 'bonn': 46, 'leverkusen': 58, 'munich': 398}
BENCHMARKS = {
  'cityscapes': Benchmark(
    name='cityscapes',
    labels=CITYSCAPES,
    number=1525,
    key=r'[a-z-]+_\d{6}_\d{6}',
    suffix='_labelIds.png',
    image_suffix='_leftImg8bit',
    example='berlin_000000_000019_leftImg8bit.png',
    size=(2048, 1024),
    folders=True,
    counted={'bielefeld_': 181, 'mainz_': 298},
    known={
      f'{city}_{sequence:06d}_000019'
      for city, number in _CITIES.items()
      for sequence in range(number)
    },
  ),
  'ade20k': Benchmark(
    name='ade20k',
    labels=ADE20K,
    number=3352,
    key=r'ADE_test_\d{8}',
    suffix='.png',
    image_suffix='',
    example='ADE_test_00000001.jpg',
    size=None,
    folders=False,
    counted={'ADE_test_': 3352},
  ),
}

_ADE_LAST = 3489  # The highest number. The 3352 numbers have gaps.


def read_images(benchmark: Benchmark, source: Path) -> dict[str, ImageSize]:
  """Keys and sizes of the test images in a folder or a zip file."""
  if source.is_dir():
    files = {path.relative_to(source).as_posix(): path for path in walk(source)}
    found = _images_in(benchmark, files)
    sizes = {
      key: _size(functools.partial(files[name].open, 'rb'), name)
      for key, name in found.items()
    }
  elif zipfile.is_zipfile(source):
    with open_archive(source) as archive:
      found = _images_in(benchmark, archive.namelist())
      sizes = {}
      for key, name in found.items():
        check_entry(archive, archive.getinfo(name))
        sizes[key] = _size(functools.partial(archive.open, name), name)
  else:
    raise UserError(f'--images {source} is no folder and no zip file.')
  if not sizes:
    raise UserError(
      f'--images {source} holds no test image of {benchmark.name}; their names '
      f'are like {benchmark.example}.'
    )
  return sizes


def _images_in(benchmark: Benchmark, names: Iterable[str]) -> dict[str, str]:
  """Key -> name; see `Benchmark`."""
  found = {
    key: name
    for name in names
    if (key := benchmark.image(name.rsplit('/', 1)[-1]))
  }
  # leftImg8bit_trainvaltest.zip names images of other splits in the same way.
  test = {
    key: name
    for key, name in found.items()
    if {'test', 'testing'} & set(name.split('/')[:-1])
  }
  return test or found


def _size(opened: Callable[[], IO], name: str) -> ImageSize:
  try:
    with opened() as file, Image.open(file) as image:
      return image.size
  except (*BROKEN, *DAMAGED) as error:
    raise UserError(
      f'the test image {name} cannot be read ({error}). Unpack or download it '
      'again.'
    ) from error


def if_any(samples: Collection[str], what: str, remedy: str) -> list[Finding]:
  """A finding about the samples, if there are any."""
  return [Finding(what, tuple(samples), remedy)] if samples else []


def check_names(
  benchmark: Benchmark,
  keys: Iterable[str],
  images: Mapping[str, ImageSize] | None,
) -> list[Finding]:
  """Masks that are missing or belong to no test image, from keys alone.

  Without `images` (key -> size) not all names are known.
  """
  keys = set(keys)
  expected = set(benchmark.known if images is None else images)
  counted = benchmark.counted if images is None else {}
  missing = sorted(expected - keys)
  findings = if_any(
    missing,
    f'{plural(len(missing), "mask", "are")} missing, of {len(expected)} whose '
    'names are known.',
    'Predict these test images and write the zip again.',
  )
  # Groups of names that cannot be listed are counted instead.
  known = keys & expected
  for group, number in counted.items():
    members = {key for key in keys - expected if key.startswith(group)}
    if benchmark.name == 'ade20k':
      members = {key for key in members if 1 <= int(key[-8:]) <= _ADE_LAST}
    known |= members
    if len(members) != number:
      findings.append(
        Finding(
          f'{plural(len(members), "mask", "are")} there whose names begin with '
          f'{group}; the benchmark has {number}.',
          tuple(sorted(members))[:1],
          'Give --images, the folder or zip file of the test images, to see '
          'which names are missing or superfluous.',
        )
      )
  extra = sorted(keys - known)
  return findings + if_any(
    extra,
    f'{plural(len(extra), "mask", "are")} of no {benchmark.name} test image.',
    'Remove them: the server takes no masks of training or validation images.',
  )
