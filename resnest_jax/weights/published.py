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


def _mmseg(head: str, data: str, stem: str) -> Published:
  recipe = {'ade20k': '512x512_160k', 'cityscapes': '512x1024_80k'}[data]
  folder = f'{head}_s101-d8_{recipe}_{data}'
  url = f'{OPENMMLAB}mmsegmentation/v0.5/resnest/{folder}/{folder}_{stem}.pth'
  return Published((url,), 'resnest101')


_AUTHORS = AUTHORS + 'weights_step1/{}-{}.pth'
# What follows the backbone in our name, and the mirrors of its file.
_ORIGINS = {
  'authors': ('', (_AUTHORS,)),
  # timm mirrors those that it offers itself.
  'mirrored': ('', (_AUTHORS, TIMM + 'v0.1-resnest/{}-{}.pth')),
  # Converted by timm.
  'gluon': ('', (TIMM + 'v0.1-weights/gluon_{}-{}.pth',)),
  # Where mmsegmentation's rows start from (open-mmlab://resnest101), trained
  # with `pretrained.DETECTRON_NORMALIZATION`.
  'detectron2': (
    '_d2',
    (
      OPENMMLAB + 'pretrain/third_party/{}_d2-{}.pth',
      SSSEG + 'ssseg_pretrained/{}_d2-{}.pth',
    ),
  ),
  'mmpretrain': (
    '_mmpretrain',
    (OPENMMLAB + 'mmclassification/v0/resnest/{}_imagenet_converted-{}.pth',),
  ),
}
CLASSIFIERS = {  # Trained on ImageNet.
  backbone + _ORIGINS[origin][0]: Published(
    tuple(url.format(backbone, digits) for url in _ORIGINS[origin][1]), backbone
  )
  for backbone, digits, origin in (
    ('resnest50', '528c19ca', 'mirrored'),
    ('resnest101', '22405ba7', 'mirrored'),
    ('resnest200', '75117900', 'mirrored'),
    ('resnest269', '0cc87c48', 'mirrored'),
    ('resnest50_fast_1s1x64d', 'd8fbf808', 'authors'),
    ('resnest50_fast_2s1x64d', '44938639', 'authors'),
    ('resnest50_fast_4s1x64d', 'f74f3fc3', 'authors'),
    ('resnest50_fast_1s2x40d', '32830b84', 'authors'),
    ('resnest50_fast_2s2x40d', '9d126481', 'authors'),
    ('resnest50_fast_4s2x40d', '41d14ed0', 'mirrored'),
    ('resnest50_fast_1s4x24d', 'd4a4f76f', 'mirrored'),
    ('resnest14', '9c8fe254', 'gluon'),
    ('resnest26', '50eb607c', 'gluon'),
    ('resnest50', '7497a55b', 'detectron2'),
    ('resnest101', 'f3b931b2', 'detectron2'),
    ('resnest200', 'ca88e41f', 'detectron2'),
    ('resnest50', '1ebf0afe', 'mmpretrain'),
    ('resnest101', '032caa52', 'mmpretrain'),
  )
}
SEGMENTORS = {
  f'{data}_{head}': _mmseg(head, data, stem)
  for data, head, stem in (
    ('cityscapes', 'fcn', '20200807_140631-f8d155b3'),
    ('cityscapes', 'pspnet', '20200807_140631-c75f3b99'),
    ('cityscapes', 'deeplabv3', '20200807_144429-b73c4270'),
    ('cityscapes', 'deeplabv3plus', '20200807_144429-1239eb43'),
    ('ade20k', 'fcn', '20200807_145416-d3160329'),
    ('ade20k', 'pspnet', '20200807_145416-a6daa92a'),
    ('ade20k', 'deeplabv3', '20200807_144503-17ecabe5'),
    ('ade20k', 'deeplabv3plus', '20200807_144503-27b26226'),
  )
}
PUBLISHED = CLASSIFIERS | SEGMENTORS


def known_file(name: str) -> Published | None:
  """The published file of this file name, or None."""
  fitting = (x for x in PUBLISHED.values() if x.urls[0].endswith(f'/{name}'))
  return next(fitting, None)
