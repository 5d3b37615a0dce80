"""Weight files that others have published, by name.

Each file's name ends in the first eight digits of its SHA-256. The addresses of
a file are mirrors of the same bytes, tried in order.
"""

import re
from typing import NamedTuple

AUTHORS = 'https://github.com/zhanghang1989/ResNeSt/releases/download/'
TIMM = 'https://github.com/huggingface/pytorch-image-models/releases/download/'
OPENMMLAB = 'https://download.openmmlab.com/'
SSSEG = 'https://github.com/SegmentationBLWX/modelstore/releases/download/'


class Published(NamedTuple):
  """A published file: its mirrors and its backbone."""

  urls: tuple[str, ...]
  backbone: str

  @property
  def sha256(self) -> str:
    """The first eight digits of the checksum."""
    return re.search(r'-([0-9a-f]{8})\.\w+$', self.urls[0])[1]


def _official(name: str, digits: str, mirrored: bool) -> Published:
  file = f'{name}-{digits}.pth'
  urls = [f'{AUTHORS}weights_step1/{file}']
  if mirrored:
    urls.append(f'{TIMM}v0.1-resnest/{file}')
  return Published(tuple(urls), name)


def _mmseg(head: str, data: str, stem: str) -> Published:
  folder = {
    'ade20k': f'{head}_s101-d8_512x512_160k_ade20k',
    'cityscapes': f'{head}_s101-d8_512x1024_80k_cityscapes',
  }[data]
  url = f'{OPENMMLAB}mmsegmentation/v0.5/resnest/{folder}/{folder}_{stem}.pth'
  return Published((url,), 'resnest101')


def _detectron(name: str, digits: str) -> Published:
  file = f'{name}_d2-{digits}.pth'
  return Published(
    (
      f'{OPENMMLAB}pretrain/third_party/{file}',
      f'{SSSEG}ssseg_pretrained/{file}',
    ),
    name,
  )


# Trained on ImageNet.
CLASSIFIERS = {
  # The authors' own. timm mirrors those that it offers itself.
  'resnest50': _official('resnest50', '528c19ca', True),
  'resnest101': _official('resnest101', '22405ba7', True),
  'resnest200': _official('resnest200', '75117900', True),
  'resnest269': _official('resnest269', '0cc87c48', True),
  **{
    f'resnest50_fast_{name}': _official(
      f'resnest50_fast_{name}', digits, name in ('4s2x40d', '1s4x24d')
    )
    for name, digits in {
      '1s1x64d': 'd8fbf808',
      '2s1x64d': '44938639',
      '4s1x64d': 'f74f3fc3',
      '1s2x40d': '32830b84',
      '2s2x40d': '9d126481',
      '4s2x40d': '41d14ed0',
      '1s4x24d': 'd4a4f76f',
    }.items()
  },
  # GluonCV's, converted by timm.
  'resnest14': Published(
    (f'{TIMM}v0.1-weights/gluon_resnest14-9c8fe254.pth',), 'resnest14'
  ),
  'resnest26': Published(
    (f'{TIMM}v0.1-weights/gluon_resnest26-50eb607c.pth',), 'resnest26'
  ),
  # The weights that mmsegmentation's rows start from (open-mmlab://resnest101).
  # detectron2-ResNeSt trained them with another mean and deviation, see
  # `pretrained.DETECTRON_NORMALIZATION`.
  'resnest50_d2': _detectron('resnest50', '7497a55b'),
  'resnest101_d2': _detectron('resnest101', 'f3b931b2'),
  'resnest200_d2': _detectron('resnest200', 'ca88e41f'),
  # mmpretrain's.
  'resnest50_mmpretrain': Published(
    (
      f'{OPENMMLAB}mmclassification/v0/resnest/'
      'resnest50_imagenet_converted-1ebf0afe.pth',
    ),
    'resnest50',
  ),
  'resnest101_mmpretrain': Published(
    (
      f'{OPENMMLAB}mmclassification/v0/resnest/'
      'resnest101_imagenet_converted-032caa52.pth',
    ),
    'resnest101',
  ),
}
# mmsegmentation's eight rows.
SEGMENTORS = {
  'cityscapes_fcn': _mmseg('fcn', 'cityscapes', '20200807_140631-f8d155b3'),
  'cityscapes_pspnet': _mmseg(
    'pspnet', 'cityscapes', '20200807_140631-c75f3b99'
  ),
  'cityscapes_deeplabv3': _mmseg(
    'deeplabv3', 'cityscapes', '20200807_144429-b73c4270'
  ),
  'cityscapes_deeplabv3plus': _mmseg(
    'deeplabv3plus', 'cityscapes', '20200807_144429-1239eb43'
  ),
  'ade20k_fcn': _mmseg('fcn', 'ade20k', '20200807_145416-d3160329'),
  'ade20k_pspnet': _mmseg('pspnet', 'ade20k', '20200807_145416-a6daa92a'),
  'ade20k_deeplabv3': _mmseg('deeplabv3', 'ade20k', '20200807_144503-17ecabe5'),
  'ade20k_deeplabv3plus': _mmseg(
    'deeplabv3plus', 'ade20k', '20200807_144503-27b26226'
  ),
}
PUBLISHED = CLASSIFIERS | SEGMENTORS


def known_file(name: str) -> Published | None:
  """The published file of this file name, or None."""
  for published in PUBLISHED.values():
    if published.urls[0].endswith(f'/{name}'):
      return published
  return None
