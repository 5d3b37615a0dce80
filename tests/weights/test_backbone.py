"""`load_backbone` of each source: the features are those of its network."""

import numpy as np
import pytest
from golden.reference import assert_same_bits, quick_jit
from numpy.testing import assert_allclose
from weights.built import encoding_network, refused, saved, written

import resnest_jax as rj


def images():
  rng = np.random.default_rng(3)
  return rng.standard_normal((1, 64, 65, 3), np.float32)


def features_of(backbone, variables):
  apply = quick_jit(lambda v, x: backbone.apply(v, x, train=False))
  inner = {key: tree['backbone'] for key, tree in variables.items()}
  return apply(inner, images())[0]


def detector(path, network, variables):
  """As mmdetection writes one: a pyramid, two heads, and the backbone."""
  inner = {key: tree['backbone'] for key, tree in variables.items()}
  state_dict = rj.export_state_dict(network.backbone, inner, 'mmdet')
  theirs = {f'backbone.{name}': value for name, value in state_dict.items()}
  for name in ('neck.fpn_convs.0.conv', 'rpn_head.rpn_cls', 'roi_head.conv1.x'):
    theirs[f'{name}.weight'] = np.ones((1, 2, 1, 1), np.float32)
  return saved(path, {'state_dict': theirs, 'meta': {}})


SOURCES = ('classifier', 'segmentor', 'encoding', 'run', 'detector')


@pytest.fixture(params=SOURCES)
def source(request, segmentor, classifier, written_run, tmp_path):
  """A path, and the network of it with its variables."""
  name = request.param
  if name == 'run':
    return written_run, rj.load_pretrained(written_run)[:2]
  if name == 'detector':
    return detector(tmp_path / 'x.pth', *segmentor), segmentor
  network = {'classifier': classifier, 'encoding': encoding_network()}
  network = network.get(name, segmentor)
  kind = {'classifier': 'timm', 'encoding': 'encoding'}.get(name, 'mmseg')
  return written(tmp_path / 'x', network, kind), network


def test_features_are_those_of_the_network(source):
  path, (network, variables) = source
  stride = network.backbone.output_stride
  model, found, about = rj.load_backbone(path, output_stride=stride)
  apply = quick_jit(lambda v, x: model.apply(v, x, train=False))
  features = apply(found, images())
  expected = features_of(network.backbone, variables)
  for x, y in zip(features.values(), expected, strict=True):
    assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  assert about['task'] == 'backbone'
  assert rj.create_backbone(about['model']) == model.backbone


def test_strides_of_a_detector_and_a_pyramid(segmentor, tmp_path):
  path = written(tmp_path / 'x', segmentor)
  model, variables, about = rj.load_backbone(path, fpn=24, dtype='bfloat16')
  strides = {'p2': 4, 'p3': 8, 'p4': 16, 'p5': 32, 'p6': 64}
  assert model.strides == strides
  assert about['provenance']['notes'][-1] == 'trained at output stride 8'
  # Kernels of the variance 1 / inputs; the third stage has 128 channels.
  kernel = variables['params']['fpn']['lateral_4']['kernel']
  assert kernel.shape == (1, 1, 128, 24)
  assert_allclose(kernel.std(), 128**-0.5, rtol=0.05)
  found = quick_jit(lambda v, x: model.apply(v, x, train=False))(
    variables, images()
  )
  assert {str(x.dtype) for x in found.values()} == {'bfloat16'}
  drawn = rj.load_backbone(path, fpn=24, seed=1)[1]['params']['fpn']
  assert (drawn['lateral_4']['kernel'] != kernel).any()
  inner = {key: tree['backbone'] for key, tree in variables.items()}
  back = rj.export_state_dict(model.backbone, inner, 'ours')
  theirs = rj.export_state_dict(*segmentor, 'ours')
  theirs = {k.replace('/backbone/', '/'): v for k, v in theirs.items()}
  assert_same_bits(back, {k: v for k, v in theirs.items() if k in back})


def test_what_is_no_pyramid_is_told(segmentor, tmp_path):
  path = written(tmp_path / 'x', segmentor)
  for channels in (0, True, 25.6):
    refused(f'fpn is {channels}; it is', rj.load_backbone, path, fpn=channels)
  said = r'output_stride is 4; accepted are 8, 16, 32'
  refused(said, rj.load_backbone, path, output_stride=4)
