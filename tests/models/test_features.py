"""C2 to C5 by name, and the pyramid on top of them, as PyTorch has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden.reference import TINY, quick_jit, variables_of
from numpy.testing import assert_allclose
from torch.nn import functional

from resnest_jax import create_backbone, export_state_dict, import_state_dict
from resnest_jax.models.features import FPN, Features

pytestmark = pytest.mark.usefixtures('float64')
CHANNELS = (8, 12, 20, 36)


def twin(levels, features):
  """detectron2's and mmdetection's, of NCHW arrays and named layers."""

  def conv(name, x, pad):
    weight, bias = (torch.tensor(levels[name][k]) for k in ('kernel', 'bias'))
    return functional.conv2d(x, weight.permute(3, 2, 0, 1), bias, padding=pad)

  maps = [torch.tensor(x).permute(0, 3, 1, 2) for x in features]
  maps = [conv(f'lateral_{i}', x, 0) for i, x in enumerate(maps, 2)]
  for i in (2, 1, 0):
    shape = maps[i].shape[2:]
    maps[i] = maps[i] + functional.interpolate(maps[i + 1], size=shape)
  maps = [conv(f'output_{i}', x, 1) for i, x in enumerate(maps, 2)]
  maps.append(functional.max_pool2d(maps[-1], 1, stride=2))
  return [x.permute(0, 2, 3, 1).numpy() for x in maps]


def drawn(shape, strides=(4, 8, 16, 32)):
  """Features of images of this height and width."""
  rng = np.random.default_rng(0)
  sizes = [[-(-n // s) for n in shape] for s in strides]
  return [
    rng.standard_normal((2, *size, c))
    for size, c in zip(sizes, CHANNELS, strict=True)
  ]


def pyramid(features, sizes=4 * (None,)):
  """The levels of random weights, and these."""
  fpn = FPN(6, dtype=jnp.float64)
  params = fpn.init(jax.random.key(0), features, sizes)['params']
  for name, layer in params.items():
    layer['bias'] = np.linspace(-1, 1, 6) + len(name)
  return fpn.apply({'params': params}, features, sizes), params


SHAPES = [((128, 64), (4, 8, 16, 32)), ((97, 131), (4, 8, 16, 32))]
SHAPES += [((1, 33), (4, 8, 16, 32)), ((97, 70), (4, 8, 8, 8))]


@pytest.mark.parametrize(('shape', 'strides'), SHAPES)
def test_pyramid_is_that_of_pytorch(shape, strides):
  features = drawn(shape, strides)
  found, params = pyramid(features)
  expected = twin(params, features)
  assert len(found) == 5
  for level, theirs in zip(found, expected, strict=True):
    assert_allclose(level, theirs, rtol=1e-12, atol=1e-12)


def test_padded_images_have_the_levels_of_theirs():
  """Of 97 x 70 pixels on a canvas of 128 x 96, and zeros around."""
  inner, canvas = drawn((97, 70)), drawn((128, 96))
  sizes = []
  for whole, x in zip(canvas, inner, strict=True):
    height, width = x.shape[1:3]
    whole[:] = 0
    whole[:, :height, :width] = x
    sizes.append(jnp.array(2 * [[height, width]]))
  alone, (found, _) = pyramid(inner)[0], pyramid(canvas, sizes)
  for level, expected in zip(found, alone, strict=True):
    height, width = expected.shape[1:3]
    assert_allclose(level[:, :height, :width], expected, atol=1e-12)
    assert not level[:, height:].any()
    assert not level[:, :, width:].any()


@pytest.mark.parametrize('stride', [8, 32])
def test_strides_and_channels_are_known_before(stride):
  backbone = create_backbone(TINY | {'output_stride': stride})
  model = Features(backbone, FPN(6, dtype=jnp.float64))
  plain = Features(backbone)
  images = np.random.default_rng(0).standard_normal((1, 97, 64, 3))
  variables = variables_of(model)
  for net, names in ((plain, 'c2 c3 c4 c5'), (model, 'p2 p3 p4 p5 p6')):
    # Without the pyramid its variables are not read.
    found = quick_jit(lambda v, x, net=net: net.apply(v, x, train=False))(
      variables, images
    )
    assert list(found) == list(net.strides) == list(net.channels)
    assert list(found) == names.split()
    for name, x in found.items():
      lengths = [-(-n // net.strides[name]) for n in (97, 64)]
      assert x.shape == (1, *lengths, net.channels[name])
  assert model.strides['p5'] == stride
  assert model.strides['p6'] == 2 * stride
  assert plain.channels == {'c2': 32, 'c3': 64, 'c4': 128, 'c5': 256}


THEIRS = {
  'detectron2': ('fpn_lateral2', 'fpn_output5', ''),
  'mmdet': ('neck.lateral_convs.0.conv', 'neck.fpn_convs.3.conv', 'backbone.'),
}


@pytest.mark.parametrize('kind', THEIRS)
def test_detectors_have_names_for_the_pyramid(kind):
  model = Features(create_backbone(TINY), FPN(6))
  variables = variables_of(model)
  state_dict = export_state_dict(model, variables, kind)
  lateral, output, prefix = THEIRS[kind]
  params = variables['params']['fpn']
  assert (state_dict[f'{lateral}.bias'] == params['lateral_2']['bias']).all()
  kernel = params['output_5']['kernel'].transpose(3, 2, 0, 1)
  assert (state_dict[f'{output}.weight'] == kernel).all()
  assert sum(name.startswith(prefix) for name in state_dict) > 100
  back = import_state_dict(model, state_dict)
  jax.tree.map(np.testing.assert_array_equal, back, variables)
