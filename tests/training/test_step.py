"""The compiled step: the same on any number of devices, donated, seeded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collectives import assert_gradients_local, assert_local, mesh_of
from flax.traverse_util import flatten_dict
from golden.reference import TINY
from lengths import others_long
from training.one_step import (
  CONFIG,
  assert_close,
  compiled_step,
  training_batch,
)

from resnest_jax.checkpoints.state import create_state
from resnest_jax.models.initial import initial_variables
from resnest_jax.models.resnest import Bottleneck
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.sharding import replicated
from resnest_jax.training import step as step_module
from resnest_jax.training.gradients import WHOLE, Plan
from resnest_jax.training.optimizer import create_optimizer
from resnest_jax.training.step import global_norm


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


class Run:
  """The compiled step on a number of devices, and what it did once."""

  def __init__(self, devices, plan=WHOLE, **changes):
    mesh = mesh_of(devices)
    self.step, self.start, self.batch = compiled_step(
      *(create_segmentor(TINY | changes), mesh, training_batch(8, 32, 48)),
      plan=plan,
    )
    self.sharding = replicated(mesh)
    self.before = self.at_step(0)
    self.after, scalars = self.step(self.before, self.batch)
    self.scalars = jax.device_get(scalars)

  def at_step(self, step):
    """The same weights at another count of steps."""
    state = self.start.replace(step=np.int32(step))
    return jax.device_put(state, self.sharding)


@pytest.fixture(scope='module')
def on_one():
  return Run(1)


@pytest.fixture(scope='module')
def on_four():
  return Run(4)


# A backbone of one block, so that loops over micro-batches compile soon.
BLOCK = {'stage_sizes': (1, 0, 0, 0)}


@pytest.fixture(scope='module')
def in_parts_on_one():
  return Run(1, Plan(micro_batches=2), **BLOCK)


@pytest.fixture(scope='module')
def in_parts():
  """Two micro-batches, an image of each on every device."""
  return Run(4, Plan(micro_batches=2), **BLOCK)


@pytest.mark.parametrize(
  ('one', 'other'),
  others_long(
    [('on_one', 'on_four'), ('in_parts_on_one', 'in_parts')],
    ('on_one', 'on_four'),
  ),
)
def test_four_devices_do_what_one_does(one, other, request):
  """With dropout: its draws do not depend on the devices either."""
  on_one, on_four = map(request.getfixturevalue, (one, other))
  # After the first step the momentum is the gradient and the decay.
  assert_close((on_four.after, on_four.scalars), (on_one.after, on_one.scalars))


def test_scalars_are_consistent(on_one):
  scalars = on_one.scalars
  assert int(on_one.after.step) == 1
  total = scalars['decode_loss'] + scalars['aux_loss']
  assert scalars['loss'] == pytest.approx(total, rel=1e-12)
  # Guessing costs log(7) nats on the four fifths of pixels with a label.
  assert 0.5 < scalars['decode_loss'] / np.log(7) < 4
  assert 0 < scalars['accuracy'] < 0.5


def test_dropout_is_drawn_from_the_step(on_one):
  again = on_one.step(on_one.at_step(0), on_one.batch)[1]['loss']
  other = on_one.step(on_one.at_step(1), on_one.batch)[1]['loss']
  assert again == on_one.scalars['loss']
  assert abs(other - again) > 1e-6


def test_state_is_donated(on_four):
  assert all(x.is_deleted() for x in jax.tree.leaves(on_four.before))
  assert not any(x.is_deleted() for x in jax.tree.leaves(on_four.after))


@pytest.mark.parametrize('run', others_long(['on_four', 'in_parts'], 'on_four'))
def test_no_device_gathers_the_batch(run, request):
  assert_local(request.getfixturevalue(run).step)


@pytest.mark.parametrize(('radix', 'groups'), [(1, 1), (1, 2), (2, 2), (4, 2)])
def test_no_block_gathers_the_batch(radix, groups):
  block = Bottleneck(
    planes=8,
    stride=2,
    dilation=1,
    radix=radix,
    groups=groups,
    base_width=64,
    average_pool=True,
    avd_first=False,
    project=True,
    same_pool=False,
    train=True,
    dtype=jnp.float32,
  )
  x = jax.ShapeDtypeStruct((8, 16, 16, 8), jnp.float32)
  variables = jax.eval_shape(block.init, jax.random.key(0), x, None)
  assert_gradients_local(
    lambda v, x: block.apply(v, x, None, mutable='batch_stats'), variables, x
  )


@functools.cache
def fresh(seed=0, devices=1):
  """A new state."""
  model = create_segmentor(TINY | {'dtype': 'float32'})
  optimizer = create_optimizer(CONFIG.optimizer, 10)
  variables = initial_variables(model, seed)
  state = create_state(model, optimizer, variables, mesh_of(devices))
  return jax.device_get(state)


def test_fresh_state_is_a_function_of_the_seed():
  one, four, other = (fresh(*x).params for x in ((0, 1), (0, 4), (1, 1)))
  jax.tree.map(np.testing.assert_array_equal, one, four)
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  assert all((a != b).any() for a, b in pairs if a.ndim == 4)


def test_fresh_state_is_drawn_as_the_modules_draw():
  """Every variable, but for chance, is what `model.init` gives."""
  model = create_segmentor(TINY | {'dtype': 'float32'})
  drawn = jax.jit(
    lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), train=False)
  )(jax.random.key(0))
  ours, theirs = map(flatten_dict, (initial_variables(model, 0), drawn))
  assert ours.keys() == theirs.keys()
  for path, values in ours.items():
    other = np.asarray(theirs[path])
    assert (values.shape, values.dtype) == (other.shape, other.dtype)
    if path[-1] == 'kernel':
      # Five standard errors of the difference of two standard deviations.
      margin = 5 / np.sqrt(values.size)
      assert values.std() == pytest.approx(other.std(), rel=margin), path
      assert abs(values.mean()) < margin * values.std(), path
    else:
      np.testing.assert_array_equal(values, other, err_msg='/'.join(path))


def test_fresh_state_has_the_published_distributions():
  """He normal (fan out) in the backbone, N(0, 0.01) in the classifiers."""
  state = fresh()
  kernel = state.params['backbone']['layer4_0']['conv3']['kernel']
  fan_out = kernel.shape[-1]
  assert kernel.std() == pytest.approx(np.sqrt(2 / fan_out), rel=0.05)
  classifier = state.params['decode_head']['classifier']['conv_seg']
  assert classifier['kernel'].std() == pytest.approx(0.01, rel=0.3)
  assert not classifier['bias'].any()
  assert int(state.step) == 0


@pytest.mark.parametrize('large', [1, 40, 10_000])
def test_norm_of_gradients_is_optax(monkeypatch, large):
  """Leaves that are summed alone, a few together, and all together."""
  monkeypatch.setattr(step_module, 'LARGE', large)
  rng = np.random.default_rng(0)
  shapes = [(), (3,), (5, 7), (1, 1, 4, 9), (64,), (2,), (30,), (11,)]
  tree = {str(i): rng.normal(size=shape) for i, shape in enumerate(shapes)}
  np.testing.assert_allclose(
    global_norm(tree), optax.tree.norm(tree), rtol=1e-14
  )
