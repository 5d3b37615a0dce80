"""Rows of images over devices: what one device computes, and no more sent."""

import functools
import re

import jax
import numpy as np
import pytest
from golden.reference import quick_jit, random
from hosts import finish, start_pair
from jax.sharding import NamedSharding, PartitionSpec
from training.one_step import assert_close, step_on

from resnest_jax import sharding
from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.losses.objective import create_loss
from resnest_jax.models import implementations

pytestmark = pytest.mark.usefixtures('float64')


def mesh_of(data, spatial):
  return sharding.make_mesh(data, spatial, jax.devices()[: data * spatial])


@functools.cache
def on_one():
  """What one device computes."""
  return step_on(mesh_of(1, 1))[0]


@pytest.mark.long
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_devices_that_share_rows_do_what_one_does(platform):
  with implementations.use(platform):
    arrays, text = step_on(mesh_of(2, 2))
  assert_close(arrays, on_one())
  # Neighbours exchange rows; nobody collects an image.
  assert not re.search('all-gather|all-to-all', text)
  shapes = re.findall(r'= \w+\[([\d,]+)\]\S* collective-permute\(', text)
  assert len(shapes) > 20
  rows = {int(shape.split(',')[1]) for shape in shapes if shape.count(',') == 3}
  # At most the 8 / spatial rows of a device at the stride of the dilated
  # pyramid, and the pyramid's padding.
  assert max(rows) <= 8


@pytest.mark.long
def test_processes_that_share_rows_do_what_one_device_does(tmp_path):
  """Each image lies on both, a quarter on each of their four devices."""
  out = tmp_path / 'after.npz'
  for process in start_pair('tests/training/one_step.py', out, 4):
    finish(process)
  with np.load(out) as arrays:
    assert_close(dict(arrays), on_one())


TERMS = ('cross_entropy', 'ohem', 'focal', 'dice', 'lovasz')


@pytest.mark.parametrize('devices', [(1, 4), (2, 2)])
@pytest.mark.parametrize('term', TERMS)
def test_loss_of_shared_rows(term, devices):
  """Value and gradient, with labels to ignore and rows between devices."""
  terms = {f'loss.terms.{name}': float(name == term) for name in TERMS}
  config = load_config('configs/ade20k_pspnet.py', terms)
  loss = create_loss(config.loss, 5)
  logits = random(2, 8, 6, 5)
  labels = np.random.default_rng(1).choice([0, 1, 2, 3, 4, 255], (2, 64, 48))

  def both(logits, labels):
    return jax.value_and_grad(lambda x: loss(x, labels)[0])(logits)

  expected = quick_jit(both)(logits, labels)
  mesh = mesh_of(*devices)
  rows = NamedSharding(mesh, PartitionSpec('data', 'spatial'))
  split = quick_jit(sharding.shared_rows(mesh)(both), in_shardings=(rows, rows))
  for ours, theirs in zip(split(logits, labels), expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_mesh_that_is_not_there():
  assert sharding.make_mesh(spatial=2).shape == {'data': 2, 'spatial': 2}
  with pytest.raises(UserError, match=r'mesh.spatial=3 do not make the 4'):
    sharding.make_mesh(spatial=3)
  with pytest.raises(UserError, match='one of 1, 2, 4'):
    sharding.make_mesh(2, 4)


def test_rows_that_cannot_be_shared():
  sharding.check_rows(64, 8, mesh_of(1, 4))
  sharding.check_rows(70, 8, mesh_of(4, 1))
  with pytest.raises(UserError, match=r'70 rows .* multiple of 32'):
    sharding.check_rows(70, 8, mesh_of(1, 4))
