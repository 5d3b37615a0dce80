"""Networks of every kind: shapes, types, counts, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import (
  CONFIG,
  TINY,
  evaluate,
  relative_error,
  variables_of,
)

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import create_backbone, create_segmentor
from resnest_jax.weights.state_dict import variable_shapes

pytestmark = pytest.mark.usefixtures('float64')

TRUNK = [(2, 8, 16, 32), (2, 4, 8, 64)]


def tiny_classifier(config):
  kept = {key: config[key] for key in ('stem_width', 'width', 'dtype')}
  return create_classifier('resnest14', 5, **kept)


@pytest.mark.parametrize(
  ('create', 'changes', 'shapes', 'dtype'),
  [
    (create_segmentor, {'dtype': dtype}, 2 * [(2, 4, 8, 7)], expected)
    for dtype, expected in (
      ('float32', 'float32'),
      ('bfloat16', 'float32'),
      ('float64', 'float64'),
    )
  ]
  + [
    (tiny_classifier, {'dtype': 'bfloat16'}, [(2, 5)], 'float32'),
    (
      *(create_backbone, {'output_stride': 8, 'dtype': 'bfloat16'}),
      *([*TRUNK, (2, 4, 8, 128), (2, 4, 8, 256)], 'bfloat16'),
    ),
    (
      *(create_backbone, {'output_stride': 16}),
      *([*TRUNK, (2, 2, 4, 128), (2, 2, 4, 256)], 'float64'),
    ),
    (
      *(create_backbone, {'output_stride': 32}),
      *([*TRUNK, (2, 2, 4, 128), (2, 1, 2, 256)], 'float64'),
    ),
  ],
)
def test_shapes_and_types(create, changes, shapes, dtype):
  """Logits and parameters are at least float32."""
  config = TINY | changes
  model = create(config)
  output, variables = jax.eval_shape(
    lambda: model.init_with_output(
      jax.random.key(0), jnp.zeros((2, 32, 64, 3)), train=False
    )
  )
  output = jax.tree.leaves(output)
  assert [x.shape for x in output] == shapes
  assert {x.dtype for x in output} == {jnp.dtype(dtype)}
  kept = 'float64' if config['dtype'] == 'float64' else 'float32'
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(kept)}


def test_bfloat16_logits_are_close_to_the_exact_ones():
  images = np.random.default_rng(3).standard_normal((2, 64, 64, 3))
  models = [
    create_segmentor(TINY | {'dtype': x}) for x in ('bfloat16', 'float64')
  ]
  ours, exact = (evaluate(x, variables_of(x), images).logits for x in models)
  assert relative_error(ours, exact) < 0.05


@pytest.mark.parametrize(
  ('head', 'num_classes', 'total'),
  [
    ('fcn', 19, 72.20),
    ('pspnet', 19, 71.67),
    ('deeplabv3', 19, 90.81),
    ('deeplabv3plus', 19, 66.29),
    ('fcn', 150, 72.30),
    ('pspnet', 150, 71.78),
    ('deeplabv3', 150, 90.91),
    ('deeplabv3plus', 150, 66.39),
  ],
)
def test_parameter_counts_are_the_published_ones(head, num_classes, total):
  model = create_segmentor(CONFIG | {'head': head, 'num_classes': num_classes})
  params = variable_shapes(model)['params']
  millions = {
    part: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
    for part, tree in params.items()
  }
  auxiliary = {19: 2.36, 150: 2.40}[num_classes]
  assert sum(millions.values()) == pytest.approx(total, abs=0.006)
  assert millions['auxiliary_head'] == pytest.approx(auxiliary, abs=0.006)


@pytest.mark.parametrize(
  ('key', 'value', 'accepted'),
  [
    ('backbone', 'resnet50', 'resnest14, .*resnest50_fast_1s4x24d'),
    ('dilation_rule', 'gluon', 'mmseg, official, timm'),
    ('output_stride', 4, '8, 16, 32'),
    ('dtype', 'float16', 'float32, bfloat16, float64'),
    ('head', 'unet', '.*pspnet'),
  ],
)
def test_unknown_name_lists_the_accepted(key, value, accepted):
  with pytest.raises(UserError, match=f'model.{key} is {value!r}.*{accepted}'):
    create_segmentor(TINY | {key: value})
