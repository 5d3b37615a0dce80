"""Weight files that others have published, by name.

Each file's name ends in the first eight digits of its SHA-256 or, if it lies in
a zip archive, of its SHA-1. The addresses of a file are mirrors of the same
bytes, tried in order.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

AUTHORS = 'https://github.com/zhanghang1989/ResNeSt/releases/download/'
TIMM = 'https://github.com/huggingface/pytorch-image-models/releases/download/'
OPENMMLAB = 'https://download.openmmlab.com/'
SSSEG = 'https://github.com/SegmentationBLWX/modelstore/releases/download/'
ENCODING = 'https://s3.us-west-1.wasabisys.com/encoding/models/'
GLUON = (
  'https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com/gluon/models/'
)


class Published(NamedTuple):
  """A published file: its mirrors and its backbone."""

  urls: tuple[str, ...]  # Of the file, or of zip archives that hold it.
  backbone: str
  member: str = ''  # Its name in these archives.
  sha1: str = ''  # Of a file in archives, 40 digits.
  # Of the same network from elsewhere, for when this does not come.
  others: tuple['Published', ...] = ()

  @property
  def name(self) -> str:
    """Of the file, here as well."""
    return self.member or self.urls[0].rpartition('/')[2]

  @property
  def digits(self) -> str:
    """Of the SHA-1, or the first eight of the SHA-256."""
    return self.sha1 or re.search(r'-([0-9a-f]{8})\.\w+$', self.name)[1]


def _mmseg(head: str, data: str, stem: str) -> Published:
  recipe = {'ade20k': '512x512_160k', 'cityscapes': '512x1024_80k'}[data]
  folder = f'{head}_s101-d8_{recipe}_{data}'
  url = f'{OPENMMLAB}mmsegmentation/v0.5/resnest/{folder}/{folder}_{stem}.pth'
  return Published((url,), 'resnest101')


def _zipped(host: str, name: str, sha1: str, suffix: str) -> Published:
  stem, backbone = f'{name}-{sha1[:8]}', name.split('_')[1]
  return Published((f'{host}{stem}.zip',), backbone, f'{stem}.{suffix}', sha1)


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
# The authors' own, of PyTorch-Encoding, with their SHA-1.
SEGMENTORS |= {
  name: _zipped(ENCODING, name, sha1, 'pth')
  for name, sha1 in (
    ('fcn_resnest50_ade', '4aba491aaf8e4866a9c9981b210e3e3266ac1f2a'),
    ('deeplab_resnest50_ade', '2225f09d0f40b9a168d9091652194bc35ec2a5a9'),
    ('deeplab_resnest101_ade', '06ca799c8cc148fe0fafb5b6d052052935aa3cc8'),
    ('deeplab_resnest200_ade', '7b9e7d3e6f0e2c763c7d77cad14d306c0a31fe05'),
    ('deeplab_resnest269_ade', '0074dd10a6e6696f6f521653fb98224e75955496'),
    ('fcn_resnest50_pcontext', '77a2161deeb1564e8b9c41a4bb7a3f33998b00ad'),
    ('deeplab_resnest50_pcontext', '08dccbc4f4694baab631e037a374d76d8108c61f'),
    ('deeplab_resnest101_pcontext', 'faf5841853aae64bd965a7bdc2cdc6e7a2b5d898'),
    ('deeplab_resnest200_pcontext', 'fe76a26551dd5dcf2d474fd37cba99d43f6e984e'),
    ('deeplab_resnest269_pcontext', 'b661fd26c49656e01e9487cd9245babb12f37449'),
  )
}
# GluonCV's files. It lists the scores of the authors' own.
for name, sha1 in (
  ('deeplab_resnest50_ade', 'a8312db6e30a464151580f2bda83479786455724'),
  ('deeplab_resnest101_ade', '6d05c630fb7acb38615f7f4d360fb90f47b25042'),
  ('deeplab_resnest200_ade', '9134a6f7d1399b549d5803d8faed3dfc74efc0d8'),
  ('deeplab_resnest269_ade', 'd45b33dedf4cca13b8147213c5360e30f93685bd'),
):
  other = _zipped(GLUON, name, sha1, 'params')
  SEGMENTORS[name] = SEGMENTORS[name]._replace(others=(other,))
PUBLISHED = CLASSIFIERS | SEGMENTORS
# By their names and by those of their archives.
_FILES = {
  name: file
  for known in PUBLISHED.values()
  for file in (known, *known.others)
  for name in (file.name, file.urls[0].rpartition('/')[2])
}


def find(
  name: str, published: Mapping[str, Published] = PUBLISHED
) -> Published | None:
  """What is published under a name, in capital letters or not, or None."""
  return published.get(name.lower())


def known_file(name: str) -> Published | None:
  """The published file of this name, or in an archive of it, or None."""
  return _FILES.get(name)
