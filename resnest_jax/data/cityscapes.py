"""Cityscapes (fine annotations) as a tfds builder that needs no TensorFlow.

Two archives in one folder hold 2975, 500 and 1525 images:

    leftImg8bit_trainvaltest.zip
      leftImg8bit/{train,val,test}/CITY/CITY_*_leftImg8bit.png
    gtFine_trainvaltest.zip
      gtFine/{train,val,test}/CITY/CITY_*_gtFine_labelIds.png

Masks are 8-bit PNGs of label ids, 0 to 33; the test split has dummies.

Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding,
CVPR 2016.
"""

from pathlib import Path
from zipfile import ZipFile

from resnest_jax.data import archives
from resnest_jax.data.archives import ArchiveBuilder, ArchiveConfig, Pair
from resnest_jax.data.images import png_kind
from resnest_jax.errors import UserError, ending
from resnest_jax.untrusted import check_fields, numbers, parse_json

FOLDERS = {'train': 'train', 'validation': 'val', 'test': 'test'}
URL = 'https://www.cityscapes-dataset.com'
IMAGES = 'leftImg8bit_trainvaltest.zip'
MASKS = 'gtFine_trainvaltest.zip'
IMAGE_SUFFIX = '_leftImg8bit.png'
MASK_SUFFIX = '_gtFine_labelIds.png'
# For messages only: repacked archives are accepted.
SHA1 = {
  IMAGES: '2c0b77ce9933cc635adda307fbba5566f5d9d404',
  MASKS: '99f532cb1af174f5fcc4c5bc8feea8c66246ddbc',
}

RELEASE = ArchiveConfig(
  name='release',
  description='Fine annotations: 5000 street scenes, 19 evaluated classes.',
  counts={'train': 2975, 'validation': 500, 'test': 1525},
  size=(2048, 1024),
)
MINI = ArchiveConfig(
  name='mini',
  description='Procedural streets in the layout of the release.',
)

_NEEDED = (
  f'Put {IMAGES} (11 GB) and {MASKS} (241 MB), not unpacked, in one folder. '
  f'Register at {URL} (free for research), download both, and run:\n'
  '  python -m resnest_jax.data.prepare cityscapes --archive_dir FOLDER '
  '--data_dir data'
)

# Other packages of the same site, by a pattern of their files' names.
_OTHER_PACKAGES = {
  '*gtCoarse/*': 'holds the coarse annotations (gtCoarse.zip)',
  '*_gtFine_labelTrainIds.png*': (
    'has masks of train ids (*_gtFine_labelTrainIds.png, made by '
    'cityscapesScripts) but not those of label ids '
    '(*_gtFine_labelIds.png), so it is not the official file'
  ),
}


# Masks are stored with label ids and become train ids when they are read.
class Cityscapes(ArchiveBuilder, skip_registration=True):
  """Stored in `DATA_DIR/cityscapes/CONFIG/1.0.0`; see `ArchiveBuilder`."""

  HOMEPAGE = URL
  IMAGE_FORMAT = 'png'
  BUILDER_CONFIGS = [RELEASE, MINI]  # noqa: RUF012

  @staticmethod
  def open_contents(config, path):
    with ending(_NEEDED):
      images, masks = open_archives(Path(path))
      sources = (
        (images, 'leftImg8bit', IMAGE_SUFFIX),
        (masks, 'gtFine', MASK_SUFFIX),
      )
      pairs = archives.find_pairs(
        *sources, FOLDERS, _OTHER_PACKAGES, in_cities=True
      )
      what = images, pairs, config.counts, FOLDERS
      archives.check_counts(*what, 'cityscapes_mini')
    size = config.size or size_of_mini(images, masks)
    return archives.Contents(
      files=[images.filename, masks.filename],
      comment=images.comment,
      pairs=pairs,
      read=lambda pair: read_example(images, masks, pair, size),
      fingerprint=archives.fingerprint(pairs, images, masks),
    )


def open_archives(folder: Path) -> list[ZipFile]:
  opened = []
  for path in archives.find_archives(folder, (IMAGES, MASKS)):
    with ending(f'The SHA-1 of the whole file is {SHA1[path.name]}.'):
      opened.append(archives.open_archive(path))
  return opened


@ending('Leave them out to have others drawn.')
def size_of_mini(images: ZipFile, masks: ZipFile) -> tuple[int, int]:
  """The (width, height) of each image of mini archives."""
  # The comment has the seed: images never meet masks of other scenes.
  if images.comment != masks.comment:
    raise UserError(
      f'{images.filename} and {masks.filename} have two zip comments: they '
      'were not drawn together.'
    )
  where = f'the comment of {images.filename}'
  size = numbers('width and height', 2, int, low=1, high=2**15)
  about = parse_json(images.comment, where)
  check_fields(about, {'size': size}, where)
  return tuple(about['size'])


@ending(_NEEDED)
def read_example(
  images: ZipFile, masks: ZipFile, pair: Pair, size: tuple[int, int]
) -> dict:
  """Reads an image of `size` (width, height) and its mask; checks both."""
  # Licence plates, -1, are 255 where they are drawn; officially they are not.
  values = (*range(34), 255), 'the label ids 0 to 33, and 255 for -1'
  example = archives.read_example(images, masks, pair, IMAGE_SUFFIX, *values)
  where = f'{images.filename}: {pair[0]}'
  if (kind := png_kind(example['image'], where)) != (8, 'RGB'):
    raise UserError(
      f'{where} is a {kind[0]}-bit {kind[1]} picture; the images of this '
      'release are 8-bit RGB.'
    )
  if (found := (example['width'], example['height'])) != size:
    raise UserError(
      f'{where} has {found[0]} x {found[1]} pixels, the release {size[0]} x '
      f'{size[1]}: it was resized or belongs to another release.'
    )
  return example
