"""DropBlock and its groups of images, against the authors' in MXNet."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import reference
from lengths import others_long

from resnest_jax.config import load_config
from resnest_jax.models import resnest
from resnest_jax.models.classifier import create_network
from resnest_jax.models.dropout import (
  DropBlock,
  centre_chance,
  leave_out,
  place_variables,
)
from resnest_jax.models.initial import variable_shapes
from resnest_jax.training.gradients import Plan

pytestmark = pytest.mark.usefixtures('float64')

GOLDEN = reference.load('imagenet_dropblock')
LAYERS = json.loads(
  (reference.FOLDER / 'imagenet_dropblock_layers.json').read_text()
)
MODELS = [name for name in LAYERS if ' ' not in name]


def test_chances_are_theirs():
  ours = [
    centre_chance(share, int(height), int(width))
    for share, block, height, width, *_ in GOLDEN['gamma_rows']
    if block == 3
  ]
  theirs = GOLDEN['gamma_rows'][GOLDEN['gamma_rows'][:, 1] == 3, 4]
  np.testing.assert_allclose(ours, theirs, rtol=1e-14)
  assert np.isfinite(centre_chance(0.1, 1, 2))


@pytest.mark.parametrize('case', ['0', '1'])
def test_values_are_theirs(case):
  x, draws, y = (
    GOLDEN[name + case].transpose(0, 2, 3, 1) for name in ('x', 'uniform', 'y')
  )
  share = GOLDEN[f'prob{case}']
  np.testing.assert_allclose(leave_out(x, draws, share), y, rtol=1e-14)
  # Two groups draw apart.
  both = leave_out(np.tile(x, (2, 1, 1, 1)), np.append(draws, draws, 0), share)
  np.testing.assert_allclose(both, np.tile(y, (2, 1, 1, 1)), rtol=1e-14)


def test_share_rises_to_theirs_at_the_end_of_each_epoch():
  for epochs in (270, 120):
    plan = Plan(dropblock=0.1 / (7 * epochs))
    theirs = GOLDEN[f'schedule_prob_{epochs}']
    done = GOLDEN['schedule_epochs'] if epochs == 270 else [0, 59, 119]
    ours = [plan.share(7 * (epoch + 1) - 1) for epoch in done]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
  assert Plan().share(3) is None


@pytest.mark.parametrize('name', others_long(MODELS, MODELS[0]))
def test_places_are_theirs(name, monkeypatch):
  """Of the network of the row, at the size of its training."""
  backbone, edge = name.split('@')
  row, shapes = load_config(f'configs/imagenet_{backbone}.py'), []
  assert row.data.crop_size == (int(edge), int(edge))
  assert [[row.model.dropout]] == (LAYERS[f'{name} dropout'] or [[0.0]])
  # Equal blocks would be traced once.
  monkeypatch.setattr(resnest, 'TracedOnce', resnest.Bottleneck)
  monkeypatch.setattr(
    DropBlock, '__call__', lambda _, x, number: shapes.append(x.shape) or x
  )
  model, key = create_network(row.model), jax.random.key(0)
  options = {
    'train': True,
    'mutable': ['batch_stats'],
    'rngs': {'dropout': key},
  }
  jax.eval_shape(
    partial(model.apply, **options),
    variable_shapes(model) | place_variables(jnp.arange(2), jnp.ones(())),
    reference.struct(2, *row.data.crop_size, 3),
  )
  assert shapes == [(2, h, w, c) for _, c, h, w, *_ in LAYERS[name]]


def test_images_of_a_group_share_a_mask():
  drop = DropBlock(0.3, jax.random.split(jax.random.key(0), 2))
  x = jnp.ones((6, 7, 7, 4))
  y = drop(x, 0)
  np.testing.assert_array_equal(y[:3], y[:1].repeat(3, 0))
  np.testing.assert_array_equal(y[3:], y[3:4].repeat(3, 0))
  assert (y[0] != y[3]).any()
  assert (y[0, ..., 0] != y[0, ..., 1]).any()
  # The mean over the mask stays.
  np.testing.assert_allclose(jnp.mean(y, (1, 2, 3)), 1, rtol=1e-12)
  others = drop(x, 1), drop.at(1)(x, 0), drop.at(2)(x, 0)
  assert all((y != other).any() for other in others)
