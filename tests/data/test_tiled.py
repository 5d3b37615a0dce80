"""Regions of TIFF files are those of the whole, and crops in training."""

import contextlib

import numpy as np
import pytest
import tifffile
from data.fields import CONTIGUOUS
from data.garden import Garden
from data.pictures import write_tiff
from evaluation.drawn import smooth_picture
from numpy.testing import assert_array_equal, assert_equal

from resnest_jax.data.pipeline import make_train_iterator
from resnest_jax.data.preprocess import IMAGENET, Normalization
from resnest_jax.data.rasters import as_image
from resnest_jax.data.tiled import TiledImage
from resnest_jax.errors import UnreadableSample

STORED = {
  'strips': {'tile': None, 'rowsperstrip': 7},
  'plain': {'compression': None, 'bigtiff': True},
  'planes': {'planarconfig': 'separate'},
  'jpeg': {'compression': 'jpeg', 'tile': (48, 64)},
  'lzw': {'compression': 'lzw', 'predictor': True, 'byteorder': '>'},
}


@pytest.mark.parametrize('stored', STORED)
def test_regions_are_those_of_the_whole(stored, tmp_path):
  rgb = smooth_picture(150, 201)
  layout = STORED[stored]
  shown = rgb.transpose(2, 0, 1) if stored == 'planes' else rgb
  kinds = {'rgb': shown}
  if stored == 'plain':
    kinds |= {'grey': rgb[..., 0], '16': np.uint16(rgb) * 256 + 77}
    kinds |= {'rgba': np.dstack([rgb, rgb[..., :1]])}
  for kind, pixels in kinds.items():
    more = {'photometric': 'minisblack'} if kind == 'grey' else {}
    more |= {'extrasamples': ['unassalpha']} if kind == 'rgba' else {}
    path = write_tiff(tmp_path / f'{kind}.tif', pixels, **layout, **more)
    whole = as_image(path, IMAGENET)
    image = TiledImage(path)
    assert image.size == (150, 201)
    for part in (np.s_[0:150, 0:201], np.s_[40:97, 60:131], np.s_[149:, :1]):
      assert_array_equal(image[part], whole[part])


def test_regions_of_bands(tmp_path):
  fields = np.random.default_rng(0).integers(0, 9999, (90, 70, 5), np.uint16)
  path = write_tiff(tmp_path / 'x.tif', fields, **CONTIGUOUS)
  how = Normalization(bands=tuple('abcde'), dtype='uint16')
  assert_array_equal(TiledImage(path, how)[31:77, :], fields[31:77])
  how = Normalization(bands=tuple('abcd'), dtype='uint16')
  with pytest.raises(UnreadableSample, match='has to be whole'):
    TiledImage(path, how)[:1, :]


def test_of_a_tiled_picture_only_touched_tiles_are_read(tmp_path):
  rgb = smooth_picture(150, 201)
  path = write_tiff(tmp_path / 'x.tif', rgb)
  with tifffile.TiffFile(path) as file:
    place, length = (
      x[0]
      for x in (file.pages.first.dataoffsets, file.pages.first.databytecounts)
    )
  content = bytearray(path.read_bytes())
  content[place : place + length] = length * b'\xff'
  path.write_bytes(content)
  image = TiledImage(path)
  assert (image.shape, image.dtype) == (rgb.shape, np.uint8)
  # The tile above and left is damaged.
  assert_array_equal(image[48:, :], rgb[48:])
  assert_array_equal(image[:48, 64:], rgb[:48, 64:])
  with pytest.raises(UnreadableSample, match='in rows 47 to 48'):
    image[47:48, 63:64]


def test_training_crops_tiled_pictures_alike(tmp_path):
  garden = Garden(tmp_path)
  garden.overrides = {'data.scale_range': (0.5, 2.0)}
  garden.overrides |= {'data.crop_size': (32, 32), 'data.image_scale': (60, 40)}

  def batches():
    config, (split, _) = garden.splits()
    options = {'seed': 1, 'batch_size': 4, 'total_steps': 12}
    found = make_train_iterator(config.data, split, **options)
    with contextlib.closing(found):
      return split, [*found]

  split, expected = batches()
  for sample in [*split]:
    path = garden.image(f'train/{sample["name"]}')
    path.unlink()
    write_tiff(path.with_suffix('.tif'), sample['image'], tile=(16, 16))
  split, found = batches()
  assert isinstance(split.in_parts(0)['image'], TiledImage)
  assert_equal(found, expected)
