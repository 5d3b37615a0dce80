"""Micro-batches: what they equal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import TINY, filled_variables, quick_jit

from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.losses.pixels import segmentation_loss
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training.gradients import (
  Plan,
  create_plan,
  deal,
  mean_gradients,
  micro_batch_note,
  whole_gradients,
)

BATCH, HEIGHT, WIDTH = 8, 24, 32
# One block, so that compiling takes seconds.
SMALL = TINY | {'stage_sizes': (1, 0, 0, 0)}


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@jax.jit
def score(output, labels):
  """The mean over labelled pixels, which differ from part to part."""
  loss = partial(segmentation_loss, labels=labels, avg_non_ignore=True)
  decode_loss, accuracy = loss(output.logits)
  total = decode_loss + 0.4 * loss(output.aux_logits)[0]
  return {'loss': total, 'accuracy': accuracy}


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  images = rng.standard_normal((BATCH, HEIGHT, WIDTH, 3))
  # Micro-batches that differ much in their statistics.
  images *= rng.uniform(0.5, 2, (BATCH, 1, 1, 1))
  labels = rng.integers(0, 7, (BATCH, HEIGHT, WIDTH))
  labels[rng.random(labels.shape) < rng.uniform(0, 1, (BATCH, 1, 1))] = 255
  return images, labels


def network(**changes):
  model = create_segmentor(SMALL | changes)
  return model, filled_variables(variable_shapes(model))


def gradients(function, model, variables, batch, plan):
  run = quick_jit(partial(function, model, score, plan=plan))
  return run(variables, *map(jnp.asarray, batch), jax.random.key(3))


def assert_equal(ours, expected, tolerance):
  """Gradients to the largest of them, scalars and statistics to themselves."""
  grads, scalars, stats = expected
  largest = max(abs(x).max() for x in jax.tree.leaves(grads))
  errors = jax.tree.map(lambda a, b: abs(a - b).max(), ours[0], grads)
  assert max(jax.tree.leaves(errors)) < tolerance * largest
  for name, value in scalars.items():
    assert float(ours[1][name]) == pytest.approx(float(value), rel=tolerance)
  errors = jax.tree.map(
    lambda a, b: abs(a - b).max() / abs(b).max(), ours[2], stats
  )
  assert max(jax.tree.leaves(errors)) < tolerance


def test_plain_micro_batches_are_steps_without_an_update(batch):
  """Each has its own statistics, which enter the running ones in turn."""
  images, labels = batch
  # Without dropout a part is a batch of its own.
  model, variables = network(head='fcn', dropout=0.0)
  ours = gradients(
    mean_gradients, model, variables, batch, Plan(micro_batches=4)
  )
  run = quick_jit(partial(whole_gradients, model, score, plan=Plan()))
  total, losses, right, stats = None, [], 0, variables['batch_stats']
  for first in range(4):
    part = images[first::4], labels[first::4]
    grads, scalars, stats = run(
      variables | {'batch_stats': stats},
      *map(jnp.asarray, part),
      jax.random.key(3),
    )
    grads = jax.tree.map(lambda x: x / 4, grads)
    total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    losses.append(scalars['loss'])
    right += scalars['accuracy'] * (part[1] != 255).sum()
  scalars = {'loss': np.mean(losses), 'accuracy': right / (labels != 255).sum()}
  assert_equal(ours, (total, scalars, stats), 1e-12)


def test_frozen_statistics_make_plain_micro_batches_exact(batch):
  """With dropout: an image's draw depends on its place alone."""
  model, variables = network(head='fcn', dropout=0.3, frozen_bn='all')
  images, labels = batch
  labels = labels.copy()
  labels[labels == 255] = 0  # The mean of means is the mean.
  whole = gradients(whole_gradients, model, variables, (images, labels), Plan())
  plan = Plan(micro_batches=4)
  ours = gradients(mean_gradients, model, variables, (images, labels), plan)
  assert_equal(ours, whole, 1e-12)
  jax.tree.map(np.testing.assert_array_equal, ours[2], variables['batch_stats'])
  # Scales have gradients nevertheless, as with mmsegmentation's norm_eval.
  scale = ours[0]['backbone']['stem_bn1']['scale']
  assert abs(scale).min() > 0


def test_batch_is_dealt_like_cards():
  dealt = deal(jnp.arange(12).reshape(6, 2), 3)
  np.testing.assert_array_equal(
    dealt, [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
  )


ROW = 'configs/ade20k_pspnet.py:mini'


def test_what_a_log_says():
  config = load_config(ROW, {'train.micro_batch_size': 4})
  plain = create_plan(config, 1)
  assert plain == Plan(micro_batches=4)
  assert '4 x 4 images: batch norm has the statistics of 4' in micro_batch_note(
    plain, 16
  )
  assert micro_batch_note(create_plan(load_config(ROW), 1), 16) == ''


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'train.micro_batch_size': 2}, 'multiple of 4'),
    ({'train.micro_batch_size': 5}, 'divide train.batch_size, 16'),
    ({'train.micro_batch_size': 4, 'mesh.spatial': 2}, 'do not go together'),
    ({'train.freeze': 6}, 'from 0 to 5'),
    ({'train.freeze': 1}, 'config.pretrained'),
    ({'train.freeze_norms': True}, 'config.model.frozen_bn=backbone'),
    ({'train.ema_decay': 1.0}, 'below 1'),
  ],
)
def test_what_cannot_be_meant_is_refused(overrides, message):
  with pytest.raises(UserError, match=message):
    create_plan(load_config(ROW, overrides), 4)


def test_one_image_has_no_statistics():
  config = load_config(ROW, {'train.micro_batch_size': 1})
  with pytest.raises(UserError, match=r'train\.remat=stages'):
    create_plan(config, 1)
