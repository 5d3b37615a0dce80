"""Micro-batches: what they equal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import TINY, quick_jit, relative_error, variables_of

from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.losses.pixels import segmentation_loss
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training.gradients import (
  Plan,
  create_plan,
  mean_gradients,
  micro_batch_note,
  whole_gradients,
)

pytestmark = pytest.mark.usefixtures('float64')

# One block, so that compiling takes seconds.
SMALL = TINY | {'stage_sizes': (1, 0, 0, 0)}


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
  # Micro-batches that differ much in their statistics.
  images = rng.uniform(0.5, 2, (8, 1, 1, 1)) * rng.normal(size=(8, 24, 32, 3))
  labels = rng.integers(0, 7, (8, 24, 32))
  labels[rng.random(labels.shape) < rng.uniform(0, 1, (8, 1, 1))] = 255
  return images, labels


def network(**changes):
  model = create_segmentor(SMALL | changes)
  return model, variables_of(model)


def gradients(function, model, variables, batch, plan):
  run = quick_jit(partial(function, model, score, plan=plan))
  return run(variables, *map(jnp.asarray, batch), jax.random.key(3))


def assert_equal(ours, expected, tolerance):
  """Gradients to the largest of them, scalars and statistics to themselves."""
  grads, *others = expected
  largest = max(abs(x).max() for x in jax.tree.leaves(grads))
  errors = jax.tree.map(lambda a, b: abs(a - b).max(), ours[0], grads)
  assert max(jax.tree.leaves(errors)) < tolerance * largest
  errors = jax.tree.map(relative_error, list(ours[1:]), others)
  assert max(jax.tree.leaves(errors)) < tolerance


def test_plain_micro_batches_are_steps_without_an_update(batch):
  """Each has its own statistics, which enter the running ones in turn."""
  images, labels = batch
  # Without dropout a part is a batch of its own.
  model, variables = network(head='fcn', dropout=0.0)
  plan = Plan(micro_batches=4)
  ours = gradients(mean_gradients, model, variables, batch, plan)
  run = quick_jit(partial(whole_gradients, model, score, plan=Plan()))
  all_grads, losses, right, stats = [], [], 0, variables['batch_stats']
  for first in range(4):
    part = images[first::4], labels[first::4]
    grads, scalars, stats = run(
      variables | {'batch_stats': stats}, *part, jax.random.key(3)
    )
    all_grads.append(grads)
    losses.append(scalars['loss'])
    right += scalars['accuracy'] * (part[1] != 255).sum()
  scalars = {'loss': np.mean(losses), 'accuracy': right / (labels != 255).sum()}
  mean = jax.tree.map(lambda *x: sum(x) / 4, *all_grads)
  assert_equal(ours, (mean, scalars, stats), 1e-12)


def test_frozen_statistics_make_plain_micro_batches_exact(batch):
  """With dropout: an image's draw depends on its place alone."""
  model, variables = network(head='fcn', dropout=0.3, frozen_bn='all')
  images, labels = batch
  batch = images, labels % 255  # All labelled: the mean of means is the mean.
  whole = gradients(whole_gradients, model, variables, batch, Plan())
  plan = Plan(micro_batches=4)
  ours = gradients(mean_gradients, model, variables, batch, plan)
  assert_equal(ours, whole, 1e-12)
  jax.tree.map(np.testing.assert_array_equal, ours[2], variables['batch_stats'])
  # Scales have gradients nevertheless, as with mmsegmentation's norm_eval.
  scale = ours[0]['backbone']['stem_bn1']['scale']
  assert abs(scale).min() > 0


ROW = 'configs/ade20k_pspnet.py:mini'


def test_what_a_log_says():
  plans = [
    create_plan(load_config(ROW, {'train.micro_batch_size': size}), 1)
    for size in (4, 0)
  ]
  assert plans == [Plan(micro_batches=4), Plan()]
  notes = [micro_batch_note(plan, 16) for plan in plans]
  assert '4 x 4 images: batch norm has the statistics of 4' in notes[0]
  assert notes[1] == ''


@pytest.mark.parametrize(
  ('devices', 'overrides', 'message'),
  [
    (4, {'train.micro_batch_size': 2}, 'multiple of 4'),
    (1, {'train.micro_batch_size': 5}, 'divide train.batch_size, 16'),
    (1, {'train.micro_batch_size': 4, 'mesh.spatial': 2}, 'mesh.spatial=1'),
    (1, {'train.micro_batch_size': 1}, r'train\.remat=stages'),
    (1, {'train.freeze': 1}, 'config.pretrained'),
    (1, {'train.freeze_norms': True}, 'config.model.frozen_bn=backbone'),
  ],
)
def test_what_cannot_be_meant_is_refused(devices, overrides, message):
  with pytest.raises(UserError, match=message):
    create_plan(load_config(ROW, overrides), devices)
