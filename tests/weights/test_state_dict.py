"""State dicts in and out: names, shapes, bits, and what is refused."""

import zlib

import jax
import numpy as np
import pytest
from golden.reference import (
  CONFIG,
  TINY,
  filled_variables,
  manifest,
  manifest_names,
)

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import (
  HEADS,
  create_backbone,
  create_segmentor,
)
from resnest_jax.weights.state_dict import (
  COUNTER,
  export_state_dict,
  import_state_dict,
  recognise,
  reinitialised,
  variable_shapes,
)

# timm's names of what the authors call otherwise.
TIMM = {
  'resnest50d_4s2x40d': 'resnest50_fast_4s2x40d',
  'resnest50d_1s4x24d': 'resnest50_fast_1s4x24d',
}
SMALL = {key: TINY[key] for key in ('stem_width', 'width', 'output_stride')}


def model_of(name):
  """The model whose state dict in the reference has this name."""
  kind, row = name.split('/')
  if kind == 'mmseg':
    data, head = row.split('_')
    classes = {'ade20k': 150, 'cityscapes': 19}[data]
    return create_segmentor(
      CONFIG | {'head': head, 'num_classes': classes, 'dtype': 'float32'}
    )
  if kind == 'timm':
    row = TIMM.get(row, row.removesuffix('d').removesuffix('e'))
  return create_classifier(row)


@pytest.fixture(scope='module')
def noise():
  """(name, shape) -> float32 of random bits, NaNs among them, or a counter."""
  bits = np.random.default_rng(0).integers(0, 2**32, 2**25, np.uint32)

  def draw(name, shape):
    if name.endswith(COUNTER):
      return np.zeros((), np.int64)
    start = zlib.crc32(name.encode()) % 2**20
    return bits[start : start + np.prod(shape)].view(np.float32).reshape(shape)

  return draw


@pytest.mark.parametrize('name', manifest_names())
def test_every_reference_goes_in_and_comes_out_bit_for_bit(name, noise):
  state_dict = {key: noise(key, s) for key, s in manifest(name).items()}
  model = model_of(name)
  variables = import_state_dict(model, state_dict)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    np.dtype(np.float32)
  }
  returned = export_state_dict(model, variables, name.split('/')[0])
  assert returned.keys() == state_dict.keys()
  for key, value in state_dict.items():
    assert returned[key].shape == value.shape, key
    assert returned[key].dtype == value.dtype, key
    kind = np.uint32 if value.ndim else np.int64
    same = returned[key].view(kind) == value.view(kind)
    assert same.all(), key


@pytest.fixture(scope='module')
def tiny():
  """A segmentor, and a state dict (float32) that fits it."""
  model = create_segmentor(TINY | {'dtype': 'float32'})
  variables = filled_variables(variable_shapes(model))
  return model, export_state_dict(model, variables, 'mmseg')


@pytest.fixture(scope='module')
def tiny_classifier():
  """A classifier of 10 classes, and its variables."""
  model = create_classifier('resnest14', 10, **SMALL)
  return model, filled_variables(variable_shapes(model))


def assert_same(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for one, two in zip(
    jax.tree.leaves(tree), jax.tree.leaves(other), strict=True
  ):
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize('kind', ['mmseg', 'official', 'timm', 'ours'])
def test_classifier_in_every_kind(tiny_classifier, kind):
  model, variables = tiny_classifier
  exported = export_state_dict(model, variables, kind)
  assert recognise(exported) == ('official' if kind == 'timm' else kind)
  assert_same(import_state_dict(model, exported), variables)


def test_mmpretrain_names_of_a_classifier(tiny_classifier):
  names = export_state_dict(*tiny_classifier, 'mmseg')
  assert names['head.fc.weight'].shape == (10, 256)
  assert 'backbone.stem.7.running_var' in names
  assert 'backbone.layer4.0.conv2.fc1.bias' in names


@pytest.mark.parametrize('head', HEADS)
def test_segmentor_in_our_own_names(head):
  model = create_segmentor(TINY | {'head': head, 'dtype': 'float32'})
  variables = filled_variables(variable_shapes(model))
  exported = export_state_dict(model, variables, 'ours')
  name = 'params/backbone/layer1_0/conv2/conv/kernel'
  assert exported[name].shape == (3, 3, 4, 16)
  assert_same(import_state_dict(model, exported), variables)


@pytest.mark.parametrize('kind', ['mmseg', 'official', 'ours'])
def test_backbone_of_a_classifier_by_dropping_its_layer(tiny_classifier, kind):
  model, variables = tiny_classifier
  exported = export_state_dict(model, variables, kind)
  layer = 'head' if kind == 'mmseg' else 'fc'
  backbone = import_state_dict(model.backbone, exported, drop=(layer,))
  assert_same(
    backbone, {key: tree['backbone'] for key, tree in variables.items()}
  )
  with pytest.raises(UserError, match=rf'2 left over \([\w/.]*{layer}[./]'):
    import_state_dict(model.backbone, exported)


@pytest.mark.parametrize(
  ('kind', 'stem'), [('mmseg', 'stem.0'), ('official', 'conv1.0')]
)
def test_bare_backbone(kind, stem):
  model = create_backbone(TINY | {'dtype': 'float32'})
  variables = filled_variables(variable_shapes(model))
  exported = export_state_dict(model, variables, kind)
  assert exported[f'{stem}.weight'].shape == (8, 3, 3, 3)
  assert_same(import_state_dict(model, exported), variables)


def test_axes_are_transposed(tiny, tiny_classifier):
  model, state_dict = tiny
  name = 'backbone.layer1.0.conv2.conv.weight'
  params = import_state_dict(model, state_dict)['params']
  kernel = params['backbone']['layer1_0']['conv2']['conv']['kernel']
  assert kernel[2, 0, 1, 5] == state_dict[name][5, 1, 2, 0]
  model, variables = tiny_classifier
  matrix = export_state_dict(model, variables, 'official')['fc.weight']
  assert matrix[7, 200] == variables['params']['fc']['kernel'][200, 7]


def test_missing_and_left_over_names_are_listed(tiny):
  model, state_dict = tiny
  changed = state_dict | {'backbone.layer5.0.conv1.weight': np.zeros(1)}
  del changed['decode_head.conv_seg.bias']
  with pytest.raises(
    UserError,
    match=r'1 missing \(decode_head.conv_seg.bias\); '
    r'1 left over \(backbone.layer5.0.conv1.weight\)',
  ):
    import_state_dict(model, changed)


def test_another_depth_is_said_and_long_lists_are_cut(tiny):
  state_dict = tiny[1]
  model = create_segmentor(
    TINY | {'dtype': 'float32', 'stage_sizes': (1, 2, 1, 1)}
  )
  with pytest.raises(
    UserError,
    match=r'fit the model: they have \(1, 1, 1, 1\) blocks a stage, the model '
    r'\(1, 2, 1, 1\); 23 missing \(backbone.layer2.1.* and 17 more\)',
  ):
    import_state_dict(model, state_dict)


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('kind', ['mmseg', 'ours'])
def test_another_head_is_said_first(head, kind):
  other = 'fcn' if head == 'pspnet' else 'pspnet'
  source, model = (
    create_segmentor(TINY | {'head': name, 'dtype': 'float32'})
    for name in (head, other)
  )
  variables = filled_variables(variable_shapes(source))
  with pytest.raises(
    UserError,
    match=rf'not fit the model: the head of the weights is {head}, the model '
    rf'has {other}; \d+ missing',
  ):
    import_state_dict(model, export_state_dict(source, variables, kind))


def test_missing_and_superfluous_modules_are_said(tiny):
  model, state_dict = tiny
  kept = {k: v for k, v in state_dict.items() if k[:10] != 'auxiliary_'}
  with pytest.raises(
    UserError,
    match=r'auxiliary_head is missing; \d+ missing .* no auxiliary_head: cr',
  ):
    import_state_dict(model, kept)
  with pytest.raises(
    UserError, match=r'by name: --drop decode_head auxiliary_head \(in Python'
  ):
    import_state_dict(model.backbone, state_dict)
  bare = model.clone(auxiliary_head=None)
  variables = import_state_dict(bare, kept)
  assert sorted(variables['params']) == ['backbone', 'decode_head']


@pytest.mark.parametrize('kind', ['mmseg', 'ours'])
def test_wrong_shape_has_the_axes_of_its_file(tiny, kind):
  model, state_dict = tiny
  source = export_state_dict(model, import_state_dict(model, state_dict), kind)
  name, theirs, ours = {
    'mmseg': ('decode_head.conv_seg.weight', (9, 16, 1, 1), (7, 16, 1, 1)),
    'ours': (
      'params/decode_head/classifier/conv_seg/kernel',
      (1, 1, 16, 9),
      (1, 1, 16, 7),
    ),
  }[kind]
  with pytest.raises(UserError) as error:
    import_state_dict(model, source | {name: np.zeros(theirs)})
  assert f'{name} is {theirs}, the model has {ours}.' in str(error.value)


@pytest.mark.parametrize('kind', ['mmseg', 'ours'])
def test_other_classes_are_drawn_anew_by_request_only(tiny, kind):
  model, state_dict = tiny
  source = export_state_dict(model, import_state_dict(model, state_dict), kind)
  target = create_segmentor(TINY | {'dtype': 'float32', 'num_classes': 4})
  fresh = filled_variables(variable_shapes(target), seed=1)
  assert reinitialised(model, source) == []
  assert reinitialised(target, source) == [
    'auxiliary_head/classifier/conv_seg',
    'decode_head/classifier/conv_seg',
  ]
  with pytest.raises(UserError, match='Check num_classes'):
    import_state_dict(target, source)
  imported = import_state_dict(target, source, fresh=fresh)
  for head in ('decode_head', 'auxiliary_head'):
    ours, new = imported['params'][head], fresh['params'][head]
    assert_same(ours.pop('classifier'), new['classifier'])
  same = import_state_dict(model, state_dict)
  for head in ('decode_head', 'auxiliary_head'):
    del same['params'][head]['classifier']
  assert_same(imported, same)


def test_fresh_variables_excuse_no_other_shape(tiny):
  model, state_dict = tiny
  name = 'backbone.layer1.0.conv1.weight'
  changed = state_dict | {name: np.zeros((3, 16, 1, 1))}
  with pytest.raises(UserError, match=name):
    import_state_dict(
      model, changed, fresh=filled_variables(variable_shapes(model))
    )


def test_dropping_what_is_not_there_is_refused(tiny):
  with pytest.raises(UserError, match="named 'fc' to drop; it has auxiliary_h"):
    import_state_dict(*tiny, drop=('fc',))


def test_unknown_kind_of_state_dict_is_refused(tiny):
  with pytest.raises(UserError, match=r'no known kind.*encoder\.weight'):
    import_state_dict(tiny[0], {'encoder.weight': np.zeros(1)})
  with pytest.raises(UserError, match="kind 'keras' is not one of mmseg"):
    export_state_dict(tiny[0], {}, 'keras')


def test_official_names_have_no_place_for_heads(tiny):
  variables = import_state_dict(*tiny)
  with pytest.raises(
    UserError,
    match=r"the authors' names have no place for decode_head and auxiliary_head"
    r'.*--drop decode_head auxiliary_head;',
  ):
    export_state_dict(tiny[0], variables, 'official')


def test_variables_of_another_model_are_not_exported(tiny):
  variables = import_state_dict(*tiny)
  del variables['params']['decode_head']['bottleneck']
  with pytest.raises(UserError, match=r"not this model's.*bottleneck"):
    export_state_dict(tiny[0], variables, 'mmseg')


def test_parameters_alone_can_be_exported(tiny):
  model, state_dict = tiny
  params = {'params': import_state_dict(model, state_dict)['params']}
  exported = export_state_dict(model, params, 'mmseg')
  assert exported.keys() == {
    name for name in state_dict if name.endswith(('.weight', '.bias'))
  }
