"""The compiled step: the same on any number of devices, donated, seeded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden.reference import QUICK, TINY, filled_variables
from lengths import others_long

from resnest_jax.checkpoints.state import (
  TrainState,
  abstract_state,
  create_state,
)
from resnest_jax.config import load_config
from resnest_jax.models.initial import initial_variables
from resnest_jax.models.resnest import Bottleneck
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.sharding import (
  batch_sharding,
  make_mesh,
  replicated,
  shard_batch,
)
from resnest_jax.training import step as step_module
from resnest_jax.training.objective import create_loss
from resnest_jax.training.optimizer import create_optimizer
from resnest_jax.training.plans import WHOLE, Plan
from resnest_jax.training.step import global_norm, make_train_step

CONFIG = load_config('configs/cityscapes_pspnet.py')
BATCH, HEIGHT, WIDTH = 8, 32, 48


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def mesh_of(devices):
  return make_mesh(devices=jax.devices()[:devices])


def training_batch():
  """What the pipeline yields, with padding and ignored pixels."""
  rng = np.random.default_rng(0)
  shape = (BATCH, HEIGHT, WIDTH)
  size = np.tile(np.int32([HEIGHT, WIDTH]), (BATCH, 1))
  size[1], size[6] = (20, 48), (32, 31)
  labels = rng.integers(0, 7, shape).astype(np.uint8)
  labels[rng.random(shape) < 0.2] = 255
  photometric = np.tile(np.float32([0, 1, 1, 0, 1]), (BATCH, 1))
  photometric[3] = [20, 1.2, 0.8, 5, 1]
  return {
    'image': rng.integers(0, 256, (*shape, 3)).astype(np.uint8),
    'label': labels,
    'size': size,
    'photometric': photometric,
  }


class Run:
  """The compiled step on a number of devices, and what it did once."""

  def __init__(self, devices, plan=WHOLE, **changes):
    mesh = mesh_of(devices)
    model = create_segmentor(TINY | changes)
    optimizer = create_optimizer(CONFIG.optimizer, 10)
    step = make_train_step(
      model,
      optimizer,
      mesh,
      seed=0,
      loss=create_loss(CONFIG.loss, 7),
      aux_weight=0.4,
      plan=plan,
    )
    self.batch = shard_batch(training_batch(), mesh)
    abstract = abstract_state(model, optimizer, mesh)
    self.step = step.lower(abstract, self.batch).compile(QUICK)
    variables = filled_variables(
      {'params': abstract.params, 'batch_stats': abstract.batch_stats}
    )
    self.start = jax.device_get(
      TrainState(
        step=np.zeros((), np.int32),
        opt_state=optimizer.init(variables['params']),
        **variables,
      )
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
  assert on_one.scalars.keys() == on_four.scalars.keys()
  for name, value in on_one.scalars.items():
    np.testing.assert_allclose(on_four.scalars[name], value, rtol=1e-10)
  # After the first step the momentum is the gradient and the decay.
  leaves = jax.tree.leaves(on_one.after)
  assert len(leaves) > 2 * len(jax.tree.leaves(on_one.after.params))
  for expected, ours in zip(
    leaves, jax.tree.leaves(on_four.after), strict=True
  ):
    scale = max(abs(np.asarray(expected)).max(), 1e-6)
    error = abs(np.asarray(ours) - np.asarray(expected)).max() / scale
    assert error < 1e-10


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


def check_local(text):
  """The batch is summed over, and never collected or exchanged."""
  assert 'all-reduce' in text
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text


@pytest.mark.parametrize('run', others_long(['on_four', 'in_parts'], 'on_four'))
def test_no_device_gathers_the_batch(run, request):
  check_local(request.getfixturevalue(run).step.as_text())


@pytest.mark.parametrize(('radix', 'groups'), [(1, 1), (1, 2), (2, 2), (4, 2)])
def test_no_block_gathers_the_batch(radix, groups):
  mesh = mesh_of(4)
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

  def loss(params, stats, x):
    y, _ = block.apply(
      {'params': params, 'batch_stats': stats}, x, None, mutable='batch_stats'
    )
    return jnp.sum(y**2)

  whole, split = replicated(mesh), batch_sharding(mesh)
  step = jax.jit(
    jax.grad(loss, (0, 2)),
    in_shardings=(whole, whole, split),
    out_shardings=(whole, split),
  )
  stats, params = variables['batch_stats'], variables['params']
  check_local(step.lower(params, stats, x).compile(QUICK).as_text())


@pytest.fixture(scope='module')
def fresh():
  """(seed, devices) -> new state."""
  model = create_segmentor(TINY | {'dtype': 'float32'})
  optimizer = create_optimizer(CONFIG.optimizer, 10)
  return {
    (seed, devices): jax.device_get(
      create_state(
        model, optimizer, initial_variables(model, seed), mesh_of(devices)
      )
    )
    for seed, devices in ((0, 1), (0, 4), (1, 1))
  }


def test_fresh_state_is_a_function_of_the_seed(fresh):
  one, four, other = (jax.tree.leaves(x.params) for x in fresh.values())
  for first, second in zip(one, four, strict=True):
    np.testing.assert_array_equal(first, second)
  kernels = [i for i, leaf in enumerate(one) if leaf.ndim == 4]
  assert all((one[i] != other[i]).any() for i in kernels)


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


def test_fresh_state_has_the_published_distributions(fresh):
  """He normal (fan out) in the backbone, N(0, 0.01) in the classifiers."""
  state = fresh[0, 1]
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
