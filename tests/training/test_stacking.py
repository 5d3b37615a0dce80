"""The step in other forms: blocks in a loop, rows of images over devices."""

import functools
import re

import jax
import numpy as np
import pytest
from collectives import assert_local, mesh_of
from golden.reference import QUICK, TINY, quick_jit, random
from hosts import finish, start_pair
from jax.sharding import NamedSharding, PartitionSpec
from training.one_step import BATCH, assert_close, step_on, training_batch

from resnest_jax import sharding
from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import abstract_state, create_state
from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.losses.objective import create_loss
from resnest_jax.models import implementations
from resnest_jax.models.initial import initial_variables
from resnest_jax.models.segmentor import create_segmentor, scanned
from resnest_jax.models.stacking import stack, stacked, unstack
from resnest_jax.training.step import create_training
from resnest_jax.weights.files import write_weights
from resnest_jax.weights.start import start_variables
from resnest_jax.weights.state_dict import export_state_dict

pytestmark = pytest.mark.usefixtures('float64')


def configuration(**train):
  """Six blocks in the third stage, of which five are alike."""
  config = load_config('configs/ade20k_pspnet.py:mini').to_dict()
  config['model'] |= TINY | {'stage_sizes': (1, 1, 6, 1)}
  config['train'] |= {'batch_size': BATCH} | train
  return config


def trainable(implementation, devices=1, pretrained='', **train):
  """The training, the state that a run starts from, and the mesh."""
  config, mesh = configuration(**train), mesh_of(devices)
  with implementations.use(blocks=implementation):
    training = create_training(config, mesh)
  settings = {'seed': 0, 'pretrained': pretrained}
  variables, _ = start_variables(training.model, settings)
  # None is on a device yet.
  assert {type(x) for x in jax.tree.leaves(variables)} == {np.ndarray}
  parts = training.model, training.optimizer, variables, mesh
  return training, create_state(*parts, ema='ema_decay' in train), mesh


def by_name(state):
  """All arrays of a state, each block by its own name."""
  return unstack(jax.device_get(state), stacked(state.params))


@functools.cache
def step(implementation, devices=1, **train):
  """State and scalars after a step, and the program."""
  training, state, mesh = trainable(implementation, devices, **train)
  batch = sharding.shard_batch(training_batch(), mesh)
  program = training.step.lower(state, batch).compile(QUICK)
  state, scalars = program(state, batch)
  return (by_name(state), jax.device_get(scalars)), program


def assert_same_step(ours, expected):
  """But for rounding; `ours` with one more loop."""
  assert_close(ours[0], expected[0])
  more, fewer = (x[1].as_text().count(' while(') for x in (ours, expected))
  assert more > fewer


def test_a_loop_on_four_devices_does_what_its_blocks_do_on_one():
  on_four = step('scanned', 4)
  assert_same_step(on_four, step('unrolled'))
  assert_local(on_four[1])


@pytest.mark.long
def test_a_loop_that_is_computed_again_and_one_over_micro_batches():
  assert_same_step(step('scanned', remat='blocks'), step('unrolled'))
  in_parts = {'micro_batch_size': BATCH // 2}
  assert_same_step(step('scanned', **in_parts), step('unrolled', **in_parts))


def test_what_is_stacked():
  _, state, _ = trainable('scanned')
  assert stacked(state.params) == {'layer3': 5}
  kernel = state.params['backbone']['layer3_rest']['conv3']['kernel']
  assert kernel.shape == (5, 1, 1, 32, 128)
  # Each is drawn as if it stood alone.
  alone = trainable('unrolled')[1]
  assert not stacked(alone.params)
  fourth = alone.params['backbone']['layer3_4']['conv3']['kernel']
  np.testing.assert_array_equal(kernel[3], fourth)


def test_what_needs_blocks_by_name_has_them():
  assert stacked(trainable('scanned', remat='stages')[1].params) == {}


@pytest.mark.parametrize(
  ('implementation', 'other', 'train'),
  [('scanned', 'unrolled', {}), ('unrolled', 'scanned', {'ema_decay': 0.9})],
)
def test_either_goes_on_from_the_other(implementation, other, train, tmp_path):
  # Apart from each other, and from what they are at the start.
  state = jax.tree.map(
    lambda x: x + np.arange(x.size, dtype=x.dtype).reshape(x.shape),
    trainable(implementation, **train)[1],
  )
  with store.open_checkpoints(tmp_path) as manager:
    store.save(manager, state, {})
  (model, optimizer, *_), _, mesh = trainable(other, 4, **train)
  abstract = abstract_state(model, optimizer, mesh, ema=bool(train))
  with store.open_checkpoints(tmp_path, read_only=True) as manager:
    restored, _ = store.restore(manager, int(state.step), abstract)
  assert jax.tree.structure(restored) == jax.tree.structure(abstract)
  jax.tree.map(np.testing.assert_array_equal, by_name(restored), by_name(state))
  (kernel, *_) = jax.tree.leaves(restored.params)
  assert len(kernel.sharding.device_set) == 4


def test_files_are_the_same(tmp_path):
  """To the checksum, and without a trace of stacked blocks."""
  abouts = []
  for implementation in ('scanned', 'unrolled'):
    with store.open_checkpoints(tmp_path / implementation) as manager:
      store.save(manager, trainable(implementation)[1], {})
    folder = store.checkpoint_dir(tmp_path / implementation) / '0'
    abouts.append((folder / 'about' / 'metadata').read_text())
    names = (folder / 'model' / '_METADATA').read_text()
    assert ('layer3_5' in names, 'layer3_rest' in names) == (True, False)
  assert abouts[0] == abouts[1]


def test_frozen_blocks_have_no_optimizer_state():
  """Their places are kept, which have no array that tells how many."""
  config = configuration(freeze=4) | {'pretrained': 'somewhere'}
  with implementations.use(blocks='scanned'):
    model, optimizer, *_ = create_training(config, mesh_of(1))
  by_blocks = scanned(model, loop=False)
  parts = optimizer, initial_variables(by_blocks, 0), mesh_of(1)
  state, alone = (create_state(x, *parts) for x in (model, by_blocks))
  names = by_name(state)
  assert jax.tree.structure(names) == jax.tree.structure(alone)
  again = stack(names, stacked(state.params))
  jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(state))


@pytest.mark.parametrize('train', [{}, {'ema_decay': 0.9}])
def test_starts_from_weights(train, tmp_path):
  """Which have blocks by name, as all weights."""
  model = create_segmentor(configuration()['model'])
  weights = initial_variables(model, 1)
  tensors = export_state_dict(model, weights, 'mmseg')
  path, _ = write_weights(tmp_path / 'x', 'official', tensors, {})
  state = by_name(trainable('scanned', pretrained=str(path), **train)[1])
  for variables in (state.variables(), state.eval_variables()):
    jax.tree.map(np.testing.assert_array_equal, variables, weights)
  assert (state.ema is None) == (not train)


# Rows of images over devices: what one device computes, and no more sent.


def spatial_mesh(data, spatial):
  return sharding.make_mesh(data, spatial, jax.devices()[: data * spatial])


@functools.cache
def on_one():
  return step_on(spatial_mesh(1, 1))[0]


@pytest.mark.long
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_devices_that_share_rows_do_what_one_does(platform):
  with implementations.use(platform):
    arrays, text = step_on(spatial_mesh(2, 2))
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
  for process in start_pair('tests/training/one_step.py', out):
    finish(process)
  with np.load(out) as arrays:
    assert_close(dict(arrays), on_one())


TERMS = ('cross_entropy', 'ohem', 'focal', 'dice', 'lovasz')


@pytest.mark.parametrize('devices', [(1, 4), (2, 2)])
@pytest.mark.parametrize('term', TERMS)
@pytest.mark.parametrize('aligned', [False, True])
def test_loss_of_shared_rows(aligned, term, devices):
  """Value and gradient, with labels to ignore and rows between devices."""
  terms = {f'loss.terms.{name}': float(name == term) for name in TERMS}
  config = load_config('configs/ade20k_pspnet.py', terms)
  loss = create_loss(config.loss, 5, aligned)
  logits = random(2, 8, 6, 5)
  labels = np.random.default_rng(1).choice([0, 1, 2, 3, 4, 255], (2, 64, 48))

  both = jax.value_and_grad(lambda x, labels: loss(x, labels)[0])
  expected = quick_jit(both)(logits, labels)
  mesh = spatial_mesh(*devices)
  rows = NamedSharding(mesh, PartitionSpec('data', 'spatial'))
  split = quick_jit(sharding.shared_rows(mesh)(both), in_shardings=(rows, rows))
  for ours, theirs in zip(split(logits, labels), expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_meshes_and_rows_that_are_not_there():
  assert sharding.make_mesh(spatial=2).shape == {'data': 2, 'spatial': 2}
  with pytest.raises(UserError, match=r'mesh.spatial=3 do not make the 4'):
    sharding.make_mesh(spatial=3)
  with pytest.raises(UserError, match='one of 1, 2, 4'):
    sharding.make_mesh(2, 4)
  sharding.check_rows(64, 8, spatial_mesh(1, 4))
  sharding.check_rows(70, 8, spatial_mesh(4, 1))
  with pytest.raises(UserError, match=r'70 rows .* multiple of 32'):
    sharding.check_rows(70, 8, spatial_mesh(1, 4))
