"""ADE20K (SceneParsing 2016) as a tfds builder that needs no TensorFlow.

The archive is ADEChallengeData2016.zip:

    ADEChallengeData2016/images/{training,validation}/ADE_*.jpg
    ADEChallengeData2016/annotations/{training,validation}/ADE_*.png

with 20210 and 2000 images. Masks are 8-bit single-channel PNGs: 0 is "other",
k the k-th of 150 classes. The builder streams the archive, checks every pair
and stores the original JPEG and PNG bytes as ArrayRecord, in the archive's
order. Other ADE20K releases look alike and are told apart here; tfds' own
`scene_parse150` is one of them (instance masks of 100 classes).

Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import tensorflow_datasets as tfds

from resnest_jax.data.labels import ADE20K
from resnest_jax.errors import UserError

ROOT = 'ADEChallengeData2016'
FOLDERS = {'train': 'training', 'validation': 'validation'}
URL = f'http://data.csail.mit.edu/places/ADEchallenge/{ROOT}.zip'

# (image, mask) names in the archive.
Pair = tuple[str, str]


@dataclasses.dataclass(eq=False)
class Ade20kConfig(tfds.core.BuilderConfig):
  """Which archive is expected.

  Attributes:
    url: where tfds downloads it; None: the archive must be given.
    sha1: of the downloaded file, 40 hex digits; None: not checked.
    download_bytes: about how large the download is, for the disk check.
    counts: images per split; None: what the zip file's comment says, see
      `counts_from_comment` (`resnest_jax.data.mini` writes it).
  """

  url: str | None = None
  sha1: str | None = None
  download_bytes: int = 0
  counts: Mapping[str, int] | None = None


RELEASE = Ade20kConfig(
  name='release',
  description='The scene parsing release of 2016: 150 classes.',
  url=URL,
  sha1='219e1696abb36c8ba3a3afe7fb2f4b4606a897c7',
  download_bytes=970_000_000,
  counts={'train': 20210, 'validation': 2000},
)
MINI = Ade20kConfig(
  name='mini',
  description='Procedural scenes in the layout of the release.',
)

_GET_THE_RIGHT_ONE = f'Needed is {ROOT}.zip from {URL}'


class _LocalInfo(tfds.core.DatasetInfo):
  """Does not ask tfds' bucket, which leaves a folder in /tmp each time."""

  def initialize_from_bucket(self) -> None:
    pass


class Ade20k(tfds.core.GeneratorBasedBuilder):
  """Writes and reads `DATA_DIR/ade20k/CONFIG/1.0.0`.

  Examples hold 'image' and 'label' (encoded, masks as in the archive: 0-150),
  'name' (the file's stem), 'height' and 'width' in pixels.

  Args:
    data_dir: where prepared data lies.
    config: `RELEASE`, `MINI`, their names or an `Ade20kConfig`.
    version: as for every tfds builder.
    archive: path of the zip file; None: tfds downloads it.
    on_progress: called with (images done, images in all).
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}  # noqa: RUF012
  BUILDER_CONFIGS = [RELEASE, MINI]  # noqa: RUF012

  def __init__(
    self,
    *,
    data_dir: str | os.PathLike | None = None,
    config: str | Ade20kConfig | None = None,
    version: str | None = None,
    archive: str | os.PathLike | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
  ):
    super().__init__(data_dir=data_dir, config=config, version=version)
    self._archive = archive
    self._on_progress = on_progress

  def _info(self) -> tfds.core.DatasetInfo:
    return _LocalInfo(
      builder=self,
      description='Scene parsing: images with a class for every pixel.',
      homepage='http://sceneparsing.csail.mit.edu',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(encoding_format='jpeg'),
          'label': tfds.features.Image(
            shape=(None, None, 1), encoding_format='png'
          ),
          'name': tfds.features.Text(),
          'height': np.int32,
          'width': np.int32,
        }
      ),
      # The archive's order; training shuffles while it reads.
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager):
    path = self._archive or download_archive(self.builder_config, dl_manager)
    archive = open_archive(path)
    pairs = find_pairs(archive)
    check_counts(archive, pairs, self.builder_config.counts)
    self.info.metadata['fingerprint'] = fingerprint(archive)
    self.info.metadata['comment'] = archive.comment.decode()
    total = sum(map(len, pairs.values()))
    done = itertools.count(1)
    return {
      split: self._generate_examples(archive, pairs[split], done, total)
      for split in FOLDERS
    }

  def _generate_examples(self, archive, pairs, done, total):
    # Without shuffling, tfds sorts by integer keys. It also spreads them over
    # its temporary files as if they were 128-bit hashes: take the full range.
    step = 2**128 // max(len(pairs), 1)
    for i, example in enumerate(read_examples(archive, pairs)):
      yield i * step, example
      self._on_progress(next(done), total)


def download_archive(config: Ade20kConfig, dl_manager) -> Path:
  """Lets tfds download the archive of `config` and checks its SHA-1."""
  # Of tfds' progress bars only the download's: the rest is ours.
  tfds.enable_progress_bar()
  try:
    path = Path(dl_manager.download(config.url))
  except Exception as error:  # tfds, requests and urllib3 have one each.
    raise UserError(
      f'could not download {config.url}: {error}\nCheck the connection and '
      'run the same command again, or fetch the file in another way and '
      f'pass it: --archive {ROOT}.zip'
    ) from error
  finally:
    tfds.disable_progress_bar()
  if config.sha1 is None:
    return path
  with path.open('rb') as file:
    sha1 = hashlib.file_digest(file, 'sha1').hexdigest()
  if sha1 != config.sha1:
    path.unlink()
    raise UserError(
      f'the file downloaded from {config.url} is not the release: its SHA-1 '
      f'is {sha1}, expected {config.sha1}. It was deleted; run the same '
      'command again.'
    )
  return path


def open_archive(path: str | os.PathLike) -> zipfile.ZipFile:
  """Opens the zip file `path`; a `UserError` if that is not possible."""
  path = Path(path)
  if path.is_dir():
    raise UserError(
      f'{path} is a folder. Pass the zip file itself, as downloaded; it need '
      f'not be unpacked. {_GET_THE_RIGHT_ONE}'
    )
  if not path.exists():
    raise UserError(f'there is no file {path}. {_GET_THE_RIGHT_ONE}')
  try:
    return zipfile.ZipFile(path)
  except (zipfile.BadZipFile, OSError) as error:
    size = path.stat().st_size
    if size and tarfile.is_tarfile(path):
      what = 'is a tar archive (the instance annotations are one)'
    else:
      what = (
        f'is not a readable zip file ({error}). With {size} bytes it is '
        'probably an interrupted download or an error page: delete it and '
        'download it again'
      )
    raise UserError(f'{path} {what}. {_GET_THE_RIGHT_ONE}') from error


def find_pairs(archive: zipfile.ZipFile) -> dict[str, list[Pair]]:
  """Lists the images of each split with their masks, sorted by name.

  Raises:
    UserError: another release, or an image without mask or the reverse.
  """
  names = archive.namelist()
  pairs = {}
  for split, folder in FOLDERS.items():
    images = _stems(names, f'{ROOT}/images/{folder}', '.jpg')
    masks = _stems(names, f'{ROOT}/annotations/{folder}', '.png')
    if not images or not masks:
      raise UserError(f'{archive.filename} {_describe_other(names)}')
    for have, lack, what in (
      (images, masks, 'no mask'),
      (masks, images, 'a mask but no image'),
    ):
      if missing := sorted(have.keys() - lack.keys()):
        raise UserError(
          f'{archive.filename}: {len(missing)} {folder} samples have {what}, '
          f'the first is {missing[0]}. The archive is incomplete; download '
          f'it again. {_GET_THE_RIGHT_ONE}'
        )
    pairs[split] = [(images[stem], masks[stem]) for stem in sorted(images)]
  return pairs


def _stems(names: list[str], folder: str, suffix: str) -> dict[str, str]:
  """Maps stem -> name for the files of one type right in `folder`."""
  found = {}
  for name in names:
    head, tail = posixpath.split(name)
    if head == folder and tail.endswith(suffix) and not tail.startswith('.'):
      found[tail.removesuffix(suffix)] = name
  return found


def _describe_other(names: list[str]) -> str:
  """Says which other archive has these names, to follow its file name."""
  if any(name.endswith('_seg.png') for name in names):
    what = (
      'is the full ADE20K release (thousands of classes in *_seg.png files, '
      'folders by scene), not the scene parsing release with 150 classes'
    )
  elif any('annotations_instance/' in name for name in names):
    what = (
      'holds the instance annotations (100 instance classes), not the masks '
      'of the 150 scene parsing classes'
    )
  elif any('ADE_test_' in name for name in names):
    what = 'holds the test images (release_test.zip), which have no masks'
  else:
    files = [name for name in names if not name.endswith('/')]
    begin = f'its first file is {files[0]}' if files else 'it has no files'
    what = (
      f'has no {ROOT}/images/training/*.jpg with '
      f'{ROOT}/annotations/training/*.png (and validation); {begin}'
    )
  return f'{what}. {_GET_THE_RIGHT_ONE}'


def check_counts(
  archive: zipfile.ZipFile,
  pairs: dict[str, list[Pair]],
  expected: Mapping[str, int] | None,
) -> None:
  """Compares the images per split with `expected` or the zip's comment."""
  found = {split: len(pairs[split]) for split in FOLDERS}
  if expected is None:
    expected = counts_from_comment(archive.comment)
  if expected is None:
    raise UserError(
      f'{archive.filename} is not a mini archive: its zip comment does not '
      'say how many images it has. Prepare the release as ade20k; make a '
      'mini archive with: python -m resnest_jax.data.mini --out ZIP'
    )
  if found != dict(expected):
    raise UserError(
      f'{archive.filename} has {found["train"]} training and '
      f'{found["validation"]} validation images, expected are '
      f'{expected["train"]} and {expected["validation"]}. It is another or '
      f'an incomplete release. {_GET_THE_RIGHT_ONE}'
    )


def counts_from_comment(comment: bytes) -> dict[str, int] | None:
  """Images per split from a zip comment '{"images": {"train": ...}}'."""
  try:
    counts = json.loads(comment)['images']
    return {split: int(counts[split]) for split in FOLDERS}
  except (ValueError, KeyError, TypeError):
    return None


def fingerprint(archive: zipfile.ZipFile) -> str:
  """SHA-256 over names, sizes and CRCs of images and masks.

  Equal for two zip files with the same contents, however compressed.
  """
  entries = sorted(
    f'{entry.filename} {entry.file_size} {entry.CRC:08x}'
    for entry in archive.infolist()
    if entry.filename.endswith(('.jpg', '.png'))
  )
  return hashlib.sha256('\n'.join(entries).encode()).hexdigest()


def read_examples(
  archive: zipfile.ZipFile, pairs: list[Pair]
) -> Iterator[dict]:
  """Yields the checked examples of `pairs`, in order."""
  # Decoding dominates and releases the interpreter lock. In blocks, as map()
  # would read everything ahead.
  threads = min(os.cpu_count() or 1, 8)
  with ThreadPoolExecutor(threads) as pool:
    for i in range(0, len(pairs), 8 * threads):
      block = pairs[i : i + 8 * threads]
      yield from pool.map(lambda pair: read_example(archive, pair), block)


def read_example(archive: zipfile.ZipFile, pair: Pair) -> dict:
  """Reads and checks one image with its mask; keeps the original bytes."""
  image_name, mask_name = pair
  with _clear_errors(archive, image_name):
    jpeg = archive.read(image_name)
  with _clear_errors(archive, mask_name):
    png = archive.read(mask_name)
  image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
  where = f'{archive.filename}: {image_name}'
  if image is None:
    raise UserError(
      f'{where} cannot be decoded as an image. {_GET_THE_RIGHT_ONE}'
    )
  mask = read_mask(png, f'{archive.filename}: {mask_name}')
  if image.shape[:2] != mask.shape:
    raise UserError(
      f'{where} is {image.shape[1]} x {image.shape[0]} pixels, its mask '
      f'{mask.shape[1]} x {mask.shape[0]}: they do not belong together. '
      f'{_GET_THE_RIGHT_ONE}'
    )
  stem = posixpath.splitext(posixpath.basename(image_name))[0]
  height, width = mask.shape
  return {
    'image': jpeg,
    'label': png,
    'name': stem,
    'height': height,
    'width': width,
  }


def read_mask(png: bytes, where: str) -> np.ndarray:
  """Decodes an index mask; a `UserError` that begins with `where` if not one.

  Returns:
    uint8 (H, W), values 0-150.
  """
  if png[:8] != b'\x89PNG\r\n\x1a\n' or len(png) < 26:
    raise UserError(f'{where} is not a PNG file. {_GET_THE_RIGHT_ONE}')
  bits, colour = png[24], png[25]  # Bit depth and colour type in IHDR.
  if (bits, colour) != (8, 0):
    kinds = {0: 'grey', 2: 'RGB', 3: 'palette', 4: 'grey-alpha', 6: 'RGBA'}
    raise UserError(
      f'{where} is a {bits}-bit {kinds.get(colour, "strange")} picture; '
      'masks are 8-bit with a single channel that holds the class number, '
      f'0-{len(ADE20K.classes)}. Coloured masks are for viewing or belong to '
      f'another release. {_GET_THE_RIGHT_ONE}'
    )
  mask = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
  if mask is None:
    raise UserError(f'{where} cannot be decoded. {_GET_THE_RIGHT_ONE}')
  if (largest := int(mask.max())) > len(ADE20K.classes):
    raise UserError(
      f'{where} has the value {largest}; the scene parsing release has 0 '
      f'(other) to {len(ADE20K.classes)}. {_GET_THE_RIGHT_ONE}'
    )
  return mask


@contextlib.contextmanager
def _clear_errors(archive: zipfile.ZipFile, name: str):
  """Turns what zipfile raises for damaged entries into a `UserError`."""
  try:
    yield
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
    raise UserError(
      f'{archive.filename} is damaged at {name} ({error}). Delete it and '
      f'download it again. {_GET_THE_RIGHT_ONE}'
    ) from error
