"""ADE20K (SceneParsing 2016) as a tfds builder that needs no TensorFlow.

ADEChallengeData2016.zip holds 20210 training and 2000 validation images:

    ADEChallengeData2016/images/{training,validation}/ADE_*.jpg
    ADEChallengeData2016/annotations/{training,validation}/ADE_*.png

Masks are 8-bit single-channel PNGs: 0 is "other", k the k-th of 150 classes.

Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017.
"""

import hashlib
from http.client import HTTPException
from pathlib import Path
from zipfile import ZipFile

from resnest_jax.data import archives
from resnest_jax.data.archives import ArchiveBuilder, ArchiveConfig, Pair
from resnest_jax.downloads import download
from resnest_jax.errors import UserError, ending
from resnest_jax.labels import ADE20K

ROOT = 'ADEChallengeData2016'
FOLDERS = {'train': 'training', 'validation': 'validation'}
URL = f'http://data.csail.mit.edu/places/ADEchallenge/{ROOT}.zip'

RELEASE = ArchiveConfig(
  name='release',
  description='The scene parsing release of 2016: 150 classes.',
  url=URL,
  sha1='219e1696abb36c8ba3a3afe7fb2f4b4606a897c7',
  download_bytes=970_000_000,
  counts={'train': 20210, 'validation': 2000},
)
MINI = ArchiveConfig(
  name='mini',
  description='Procedural scenes in the layout of the release.',
)

_NEEDED = f'Get {ROOT}.zip from {URL}'

# Other releases, by a pattern of their files' names.
_OTHER_RELEASES = {
  '*_seg.png': (
    'is the full ADE20K release (thousands of classes in *_seg.png files, '
    'folders by scene), not the scene parsing release with 150 classes'
  ),
  '*annotations_instance/*': (
    'holds the instance annotations (100 instance classes), not the masks '
    'of the 150 scene parsing classes'
  ),
  '*ADE_test_*': (
    'holds the test images (release_test.zip), which have no masks'
  ),
}


# Not tfds' own `scene_parse150`, which holds instance masks of 100 classes.
class Ade20k(ArchiveBuilder, skip_registration=True):
  """Stored in `DATA_DIR/ade20k/CONFIG/1.0.0`; see `ArchiveBuilder`."""

  HOMEPAGE = 'http://sceneparsing.csail.mit.edu'
  IMAGE_FORMAT = 'jpeg'
  BUILDER_CONFIGS = [RELEASE, MINI]  # noqa: RUF012

  @staticmethod
  @ending(_NEEDED)
  def open_contents(config, path):
    archive = archives.open_archive(path)
    images = archive, f'{ROOT}/images', '.jpg'
    masks = archive, f'{ROOT}/annotations', '.png'
    pairs = archives.find_pairs(images, masks, FOLDERS, _OTHER_RELEASES)
    what = archive, pairs, config.counts, FOLDERS
    archives.check_counts(*what, 'ade20k_mini')
    return archives.Contents(
      files=[path],
      comment=archive.comment,
      pairs=pairs,
      read=lambda pair: read_example(archive, pair),
      fingerprint=archives.fingerprint(pairs, archive),
    )

  def _download(self, dl_manager) -> Path:
    config = self.builder_config
    path = Path(dl_manager.download_dir, f'{ROOT}.zip')
    if path.is_file():
      return path

    def check(file: Path) -> None:
      with file.open('rb') as opened:
        sha1 = hashlib.file_digest(opened, 'sha1').hexdigest()
      if config.sha1 not in (None, sha1):
        raise UserError(
          f'it is not the release: its SHA-1 is {sha1}, expected {config.sha1}'
        )

    # Not by tfds, which sets no limits and tries for minutes without a network.
    try:
      download(config.url, path, check)
    except (OSError, HTTPException, ValueError, UserError) as error:
      raise UserError(
        f'could not download {config.url}: {error}. Nothing was kept.\nCheck '
        'the connection and run the same command again, or fetch the file in '
        f'another way and pass it: --archive {ROOT}.zip'
      ) from error
    return path


@ending(_NEEDED)
def read_example(archive: ZipFile, pair: Pair) -> dict:
  largest = len(ADE20K.classes)
  values = range(largest + 1), f'0 (other) to {largest}'
  return archives.read_example(archive, archive, pair, '.jpg', *values)
