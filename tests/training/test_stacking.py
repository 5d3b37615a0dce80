"""Blocks that train as one: the same step, and the same files."""

import jax
import numpy as np
import pytest
from golden.reference import QUICK
from safetensors.numpy import save_file
from training.one_step import BATCH, training_batch

from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import abstract_state, create_state
from resnest_jax.config import load_config
from resnest_jax.models import forms
from resnest_jax.models.flops import count_flops
from resnest_jax.models.initial import initial_variables
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.models.stacking import stack, stacked, unstack
from resnest_jax.sharding import make_mesh, shard_batch
from resnest_jax.training.step import create_training
from resnest_jax.weights.start import start_variables
from resnest_jax.weights.state_dict import export_state_dict


def configuration(**train):
  """Six blocks in the third stage, of which five are alike."""
  config = load_config('configs/ade20k_pspnet.py:mini').to_dict()
  config['model'] |= {
    'stage_sizes': (1, 1, 6, 1),
    'stem_width': 4,
    'width': 4,
    'head_channels': 8,
    'aux_channels': 8,
    'num_classes': 7,
    'dtype': 'float64',
  }
  config['train'] |= {'batch_size': BATCH} | train
  return config


def mesh_of(devices):
  return make_mesh(devices=jax.devices()[:devices])


def fresh(training, mesh, pretrained='', ema=False):
  """The state that a run starts from."""
  model, optimizer, *_ = training
  settings = {'seed': 0, 'pretrained': pretrained}
  variables, _ = start_variables(model, settings)
  return create_state(model, optimizer, variables, mesh, ema=ema)


def trainable(form, devices=1, **train):
  """The training, its fresh state, and its mesh."""
  config, mesh = configuration(**train), mesh_of(devices)
  with forms.use(blocks=form):
    training = create_training(config, mesh)
  ema = config['train']['ema_decay'] > 0
  return training, fresh(training, mesh, ema=ema), mesh


def by_name(state):
  """All arrays of a state, each block by its own name."""
  return unstack(jax.device_get(state), stacked(state.params))


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def step(form, devices, **train):
  """State and scalars after a step, and the program."""
  training, state, mesh = trainable(form, devices, **train)
  batch = shard_batch(training_batch(), mesh)
  program = training.step.lower(state, batch).compile(QUICK)
  state, scalars = program(state, batch)
  return by_name(state), jax.device_get(scalars), program.as_text()


@pytest.fixture(scope='module')
def unrolled():
  return step('unrolled', 1)


def assert_same_step(ours, expected):
  """But for rounding; `ours` with one more loop, and neither with gathers."""
  assert ours[2].count(' while(') > expected[2].count(' while(')
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in ours[2]
  for name, value in expected[1].items():
    np.testing.assert_allclose(ours[1][name], value, rtol=1e-10)
  assert jax.tree.structure(ours[0]) == jax.tree.structure(expected[0])
  for right, leaf in zip(
    jax.tree.leaves(expected[0]), jax.tree.leaves(ours[0]), strict=True
  ):
    scale = max(np.abs(right).max(), 1e-6)
    assert np.abs(leaf - right).max() / scale < 1e-10


def test_a_loop_on_four_devices_does_what_its_blocks_do_on_one(unrolled):
  assert_same_step(step('scanned', 4), unrolled)


@pytest.mark.long
def test_a_loop_whose_blocks_are_computed_again(unrolled):
  assert_same_step(step('scanned', 1, remat='blocks'), unrolled)


@pytest.mark.long
def test_a_loop_in_the_loop_over_micro_batches():
  in_parts = {'micro_batch_size': BATCH // 2}
  assert_same_step(
    step('scanned', 1, **in_parts), step('unrolled', 1, **in_parts)
  )


def test_what_is_stacked(unrolled):
  _, state, _ = trainable('scanned')
  assert stacked(state.params) == {'layer3': 5}
  kernel = state.params['backbone']['layer3_rest']['conv3']['kernel']
  assert kernel.shape == (5, 1, 1, 16, 64)
  # Each is drawn as if it stood alone.
  alone = trainable('unrolled')[1]
  assert not stacked(alone.params)
  fourth = alone.params['backbone']['layer3_4']['conv3']['kernel']
  np.testing.assert_array_equal(kernel[3], fourth)
  assert np.abs(fourth).max() > 0


def test_what_needs_blocks_by_name_has_them():
  with forms.use(blocks='scanned'):
    training = create_training(configuration(remat='stages'), mesh_of(1))
  assert training.model.backbone.stacked() == {}


@pytest.mark.parametrize('train', [{}, {'ema_decay': 0.9}])
@pytest.mark.parametrize(
  ('form', 'other'), [('scanned', 'unrolled'), ('unrolled', 'scanned')]
)
def test_either_goes_on_from_the_other(form, other, train, tmp_path):
  _, state, _ = trainable(form, **train)
  # Apart from each other, and from what they are at the start.
  state = jax.tree.map(
    lambda x: x + np.arange(x.size, dtype=x.dtype).reshape(x.shape), state
  )
  with store.open_checkpoints(tmp_path) as manager:
    store.save(manager, state, {})
  training, _, mesh = trainable(other, 4, **train)
  abstract = abstract_state(
    training.model, training.optimizer, mesh, ema=bool(train)
  )
  with store.open_checkpoints(tmp_path, read_only=True) as manager:
    restored, _ = store.restore(manager, int(state.step), abstract)
  assert jax.tree.structure(restored) == jax.tree.structure(abstract)
  jax.tree.map(np.testing.assert_array_equal, by_name(restored), by_name(state))
  (kernel, *_) = jax.tree.leaves(restored.params)
  assert len(kernel.sharding.device_set) == 4


def test_files_are_the_same(tmp_path):
  """To the checksum, and without a trace of stacked blocks."""
  abouts = []
  for form in ('scanned', 'unrolled'):
    with store.open_checkpoints(tmp_path / form) as manager:
      store.save(manager, trainable(form)[1], {})
    folder = store.checkpoint_dir(tmp_path / form) / '0'
    abouts.append((folder / 'about' / 'metadata').read_text())
    assert 'layer3_5' in (folder / 'model' / '_METADATA').read_text()
    assert 'layer3_rest' not in (folder / 'model' / '_METADATA').read_text()
  assert abouts[0] == abouts[1]


def test_frozen_blocks_have_no_optimizer_state():
  """Their places are kept, which have no array that tells how many."""
  freeze = {'freeze': 4}
  with forms.use(blocks='scanned'):
    config = configuration(**freeze) | {'pretrained': 'somewhere'}
    training = create_training(config, mesh_of(1))
  state = fresh(training, mesh_of(1))
  counts = stacked(state.params)
  names = by_name(state)
  backbone = training.model.backbone.clone(scanned=False)
  alone = training._replace(model=training.model.clone(backbone=backbone))
  alone = fresh(alone, mesh_of(1))
  assert jax.tree.structure(names) == jax.tree.structure(alone)
  again = stack(names, counts)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(state))


@pytest.mark.parametrize('train', [{}, {'ema_decay': 0.9}])
def test_starts_from_weights(train, tmp_path):
  """Which have blocks by name, as all weights."""
  model = create_segmentor(configuration()['model'])
  weights = initial_variables(model, 1)
  path = tmp_path / 'weights.safetensors'
  tensors = export_state_dict(model, weights, 'mmseg')
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
  training, _, mesh = trainable('scanned', **train)
  state = fresh(training, mesh, str(path), ema=bool(train))
  jax.tree.map(
    np.testing.assert_array_equal, by_name(state).variables(), weights
  )
  jax.tree.map(
    np.testing.assert_array_equal, by_name(state).best_variables(), weights
  )
  assert (state.ema is None) == (not train)


def test_operations_of_a_loop_count_as_often_as_it_runs():
  counted = []
  for form in ('scanned', 'unrolled'):
    training, state, _ = trainable(form)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    counted.append(
      count_flops(
        lambda x, training=training, state=state: training.model.apply(
          state.variables(), x, train=False
        ),
        images,
      )
    )
  assert counted[0] == counted[1] > 1e6
