"""State dicts in and out: names, shapes, bits, and what is refused."""

import jax
import numpy as np
import pytest
from golden.reference import CONFIG, TINY, filled, filled_variables, manifest

from resnest_jax.errors import UserError
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import (
  export_state_dict,
  import_state_dict,
  variable_shapes,
)

ROWS = {'ade20k_pspnet': 150, 'cityscapes_pspnet': 19}


@pytest.fixture(scope='module')
def tiny():
  """A model, and a state dict (float32) that fits it."""
  model = create_segmentor(TINY | {'dtype': 'float32'})
  variables = filled_variables(variable_shapes(model))
  return model, export_state_dict(model, variables, 'mmseg')


@pytest.mark.parametrize('row', ROWS)
def test_names_and_shapes_are_mmsegmentations(row):
  model = create_segmentor(
    CONFIG | {'num_classes': ROWS[row], 'dtype': 'float32'}
  )
  # No memory is touched: all values are one and the same zero.
  variables = jax.tree.map(
    lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
    variable_shapes(model),
  )
  exported = export_state_dict(model, variables, 'mmseg')
  shapes = manifest(f'mmseg/{row}')
  assert {name: value.shape for name, value in exported.items()} == shapes
  imported = import_state_dict(model, exported)
  assert jax.tree.map(np.shape, imported) == jax.tree.map(np.shape, variables)


def test_round_trip_keeps_every_bit(tiny):
  model, state_dict = tiny
  shapes = {name: value.shape for name, value in state_dict.items()}
  drawn = {k: v.astype(state_dict[k].dtype) for k, v in filled(shapes).items()}
  returned = export_state_dict(model, import_state_dict(model, drawn), 'mmseg')
  assert returned.keys() == drawn.keys()
  for name, value in drawn.items():
    assert returned[name].dtype == value.dtype
    assert returned[name].tobytes() == value.tobytes(), name


def test_convolution_axes_are_transposed(tiny):
  model, state_dict = tiny
  name = 'backbone.layer1.0.conv2.conv.weight'
  kernel = import_state_dict(model, state_dict)['params']['backbone'][
    'layer1_0'
  ]['conv2']['conv']['kernel']
  assert kernel[2, 0, 1, 5] == state_dict[name][5, 1, 2, 0]


def test_missing_and_left_over_names_are_listed(tiny):
  model, state_dict = tiny
  changed = state_dict | {'backbone.layer5.0.conv1.weight': np.zeros(1)}
  del changed['decode_head.conv_seg.bias']
  with pytest.raises(
    UserError,
    match=r'1 missing \(decode_head.conv_seg.bias\), '
    r'1 left over \(backbone.layer5.0.conv1.weight\)',
  ):
    import_state_dict(model, changed)


def test_long_lists_are_cut(tiny):
  model, state_dict = tiny
  changed = {k: v for k, v in state_dict.items() if '.layer3.' not in k}
  with pytest.raises(
    UserError, match=r'missing \(backbone.layer3.* and \d+ more'
  ):
    import_state_dict(model, changed)


def test_wrong_shape_is_named(tiny):
  model, state_dict = tiny
  name = 'decode_head.conv_seg.weight'
  changed = state_dict | {name: np.zeros((9, 16, 1, 1))}
  with pytest.raises(UserError, match=f'{name} is .*9.*, not .*7'):
    import_state_dict(model, changed)


def test_unknown_kind_of_state_dict_is_refused(tiny):
  with pytest.raises(UserError, match=r'no known kind.*encoder\.weight'):
    import_state_dict(tiny[0], {'encoder.weight': np.zeros(1)})
  with pytest.raises(UserError, match="kind 'keras' is not one of mmseg"):
    export_state_dict(tiny[0], {}, 'keras')


def test_variables_of_another_model_are_not_exported(tiny):
  model, state_dict = tiny
  variables = import_state_dict(model, state_dict)
  del variables['params']['decode_head']['bottleneck']
  with pytest.raises(UserError, match=r"not this model's.*bottleneck"):
    export_state_dict(model, variables, 'mmseg')


def test_parameters_alone_can_be_exported(tiny):
  model, state_dict = tiny
  params = {'params': import_state_dict(model, state_dict)['params']}
  exported = export_state_dict(model, params, 'mmseg')
  assert exported.keys() == {
    name for name in state_dict if name.endswith(('.weight', '.bias'))
  }
