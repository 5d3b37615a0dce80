"""Small zip files as the data sets' owners publish them, and their pictures."""

import json
import zipfile

import cv2
import numpy as np

from resnest_jax.data.cityscapes import IMAGES, MASKS

ADE20K = 'ADEChallengeData2016'
# A sample of each of Cityscapes' splits, by its folder.
STREETS = {'train': 'ulm_1_9', 'val': 'lindau_1_9', 'test': 'bonn_1_9'}
ONE_OF_EACH = {'train': 1, 'validation': 1, 'test': 1}
COMMENT = json.dumps({'images': ONE_OF_EACH, 'size': (8, 4)})


def encode(array, suffix='.png'):
  return cv2.imencode(suffix, np.asarray(array))[1].tobytes()


def decode(encoded, flags=cv2.IMREAD_UNCHANGED):
  return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)


def full(shape, value, dtype=np.uint8):
  """A picture of one value, as PNG."""
  return encode(np.full(shape, value, dtype))


JPEG = encode(np.full((4, 6, 3), 128, np.uint8), '.jpg')
PNG = full((4, 6), 1)
STREET, MASK = full((4, 8, 3), 128), full((4, 8), 7)  # Of Cityscapes.


def write_zip(path, entries, comment='', method=zipfile.ZIP_STORED):
  """Writes name -> bytes; None leaves an entry out."""
  with zipfile.ZipFile(path, 'w', method) as archive:
    archive.comment = comment.encode()
    for name, content in entries.items():
      if content is not None:
        archive.writestr(name, content)
  return path


def ade20k_sample(prefix='ADE_train', folder='training', jpeg=JPEG, png=PNG):
  """The entries of one sample of ADE20K."""
  return {
    f'{ADE20K}/images/{folder}/{prefix}_00000001.jpg': jpeg,
    f'{ADE20K}/annotations/{folder}/{prefix}_00000001.png': png,
  }


def image_name(sample, split='train'):
  return f'leftImg8bit/{split}/{sample.split("_")[0]}/{sample}_leftImg8bit.png'


def mask_name(sample, split='train', kind='labelIds'):
  return f'gtFine/{split}/{sample.split("_")[0]}/{sample}_gtFine_{kind}.png'


def write_cityscapes(folder, images=(), masks=(), comment=COMMENT, mask=MASK):
  """STREETS as a mini archive, changed by name -> bytes, or None to drop it."""
  entries = {image_name(x, split): STREET for split, x in STREETS.items()}
  write_zip(folder / IMAGES, entries | dict(images), comment)
  entries = {mask_name(x, split): mask for split, x in STREETS.items()}
  write_zip(folder / MASKS, entries | dict(masks), comment)
  return folder
