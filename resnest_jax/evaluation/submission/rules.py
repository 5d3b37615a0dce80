"""What the test servers of Cityscapes and ADE20K want, and which files.

Cityscapes (evalPixelLevelSemanticLabeling of cityscapesScripts, which the
server runs): for each of the 1525 test images one PNG file whose name begins
with CITY_SEQUENCE_FRAME, anywhere in the zip, as large as the image, with label
ids, not train ids.

ADE20K (readme.txt in release_test.zip): for each of the 3352 test images one
PNG file of its name and size, with class numbers from 1 to 150.
"""

import dataclasses
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from resnest_jax.data.own.pairing import walk
from resnest_jax.errors import UserError
from resnest_jax.findings import Finding
from resnest_jax.labels import ADE20K, CITYSCAPES, IGNORE, LabelSet

ImageSize = tuple[int, int]  # Width, height.


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
  """A test server.

  Attributes:
    name: of the command line.
    labels: the classes, and which values of masks they have.
    number: of test images.
    key: the part of a name that says which image is meant.
    suffix: what stands behind it in the files that are written.
    image_suffix: what may stand behind it in the names of images, and so of
      their predictions.
    size: of all images; None: they differ.
    folders: whether files may lie in folders of the zip.
  """

  name: str
  labels: LabelSet
  number: int
  key: str
  suffix: str
  image_suffix: str
  size: ImageSize | None
  folders: bool

  @property
  def mask_values(self) -> np.ndarray:
    """uint8 (256,): train id -> value in a submitted mask."""
    values = np.full(256, IGNORE, np.uint8)
    for k in range(len(self.labels.classes)):
      values[k] = np.flatnonzero(self.labels.to_train_id == k)[0]
    return values

  def submitted(self, name: str) -> str | None:
    """The key of a file in a zip, None if the server would not take it."""
    # Cityscapes lets anything follow.
    end = r'[^/]*' if self.suffix != '.png' else ''
    found = re.fullmatch(rf'({self.key}){end}\.png', name)
    return found and found[1]

  def predicted(self, name: str) -> str | None:
    """The key of a file that predict.py wrote, None if it is no index mask."""
    found = re.fullmatch(rf'({self.key})({self.image_suffix})?\.png', name)
    return found and found[1]

  def image(self, name: str) -> str | None:
    """The key of a test image."""
    pattern = rf'({self.key})({self.image_suffix})?\.(png|jpg)'
    found = re.fullmatch(pattern, name)
    return found and found[1]


BENCHMARKS = {
  'cityscapes': Benchmark(
    name='cityscapes',
    labels=CITYSCAPES,
    number=1525,
    key=r'[a-z-]+_\d{6}_\d{6}',
    suffix='_labelIds.png',
    image_suffix='_leftImg8bit',
    size=(2048, 1024),
    folders=True,
  ),
  'ade20k': Benchmark(
    name='ade20k',
    labels=ADE20K,
    number=3352,
    key=r'ADE_test_\d{8}',
    suffix='.png',
    image_suffix='',
    size=None,
    folders=False,
  ),
}

# Test images of each city. Four cities have one image, frame 19, of every
# sequence; of the others the frames are known from the images alone.
_CITIES = {
  'berlin': 544,
  'bielefeld': 181,
  'bonn': 46,
  'leverkusen': 58,
  'mainz': 298,
  'munich': 398,
}
_ONE_FRAME = ('berlin', 'bonn', 'leverkusen', 'munich')
_ADE_LAST = 3489  # The highest number; not all below are there.


def read_images(benchmark: Benchmark, source: Path) -> dict[str, ImageSize]:
  """Keys and sizes of the test images in a folder or a zip file.

  Where there is a folder `test` or `testing`, only what is in it counts.

  Raises:
    UserError: there are none, or one cannot be read.
  """
  if source.is_dir():
    files = {path.relative_to(source).as_posix(): path for path in walk(source)}
    found = _images_in(benchmark, files)
    sizes = {key: _size(files[name], name) for key, name in found.items()}
  elif zipfile.is_zipfile(source):
    with zipfile.ZipFile(source) as archive:
      found = _images_in(benchmark, archive.namelist())
      sizes = {}
      for key, name in found.items():
        with archive.open(name) as file:
          sizes[key] = _size(file, name)
  else:
    raise UserError(f'--images {source} is no folder and no zip file.')
  if not sizes:
    raise UserError(
      f'--images {source} holds no test image of {benchmark.name}; their names '
      f'are like {typical_name(benchmark)}.'
    )
  return sizes


def _images_in(benchmark: Benchmark, names: Iterable[str]) -> dict[str, str]:
  """Key -> name."""
  found = {}
  for name in names:
    if key := benchmark.image(name.rsplit('/', 1)[-1]):
      found[key] = name
  test = {
    key: name
    for key, name in found.items()
    if {'test', 'testing'} & set(name.split('/')[:-1])
  }
  return test or found


def _size(file, name: str) -> ImageSize:
  try:
    with Image.open(file) as image:
      return image.size
  except OSError as error:
    raise UserError(
      f'the test image {name} cannot be read ({error}). Unpack or download it '
      'again.'
    ) from error


def typical_name(benchmark: Benchmark) -> str:
  """A name of a test image, in words."""
  if benchmark.name == 'ade20k':
    return 'ADE_test_00000001.jpg'
  return 'berlin_000000_000019_leftImg8bit.png'


def check_names(
  benchmark: Benchmark,
  keys: Iterable[str],
  images: Mapping[str, ImageSize] | None,
) -> list[Finding]:
  """What is missing, what is too much.

  Args:
    benchmark: the server.
    keys: of the masks, without repetitions.
    images: of the test images, where they are at hand.
  """
  keys = set(keys)
  expected, counted = _expected(benchmark, images)
  findings = []
  if missing := sorted(expected - keys):
    findings.append(
      Finding(
        f'{len(missing)} masks are missing, of {len(expected)} whose names are '
        f'known.',
        tuple(missing),
        'Predict these test images and write the zip again.',
      )
    )
  known = keys & expected
  for group, number in counted.items():
    members = {key for key in keys - expected if key.startswith(group)}
    if benchmark.name == 'ade20k':
      members = {key for key in members if 1 <= int(key[-8:]) <= _ADE_LAST}
    known |= members
    if len(members) != number:
      findings.append(
        Finding(
          f'{len(members)} masks are there whose names begin with {group}; the '
          f'benchmark has {number}.',
          tuple(sorted(members))[:1],
          'Give --images, the folder or zip file of the test images; then the '
          'names that are missing or too many are listed.',
        )
      )
  if extra := sorted(keys - known):
    findings.append(
      Finding(
        f'{len(extra)} masks are of no test image of {benchmark.name}.',
        tuple(extra),
        'Leave them out: those of training and validation do not belong here.',
      )
    )
  return findings


def _expected(
  benchmark: Benchmark, images: Mapping[str, ImageSize] | None
) -> tuple[set[str], dict[str, int]]:
  """Names that must be there, and numbers of those that are not known."""
  if images is not None:
    return set(images), {}
  if benchmark.name == 'ade20k':
    return set(), {'ADE_test_': benchmark.number}
  names = {
    f'{city}_{sequence:06d}_000019'
    for city in _ONE_FRAME
    for sequence in range(_CITIES[city])
  }
  others = _CITIES.keys() - set(_ONE_FRAME)
  return names, {f'{city}_': _CITIES[city] for city in sorted(others)}
