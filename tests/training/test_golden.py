"""Three training steps against mmsegmentation's, in float64."""

import functools

import jax
import numpy as np
import pytest
from golden import reference
from lengths import others_long

from resnest_jax.checkpoints.state import start_state
from resnest_jax.config import load_config
from resnest_jax.losses.objective import create_loss
from resnest_jax.models.segmentor import HEADS, create_segmentor
from resnest_jax.training.optimizer import create_optimizer, create_schedule
from resnest_jax.training.step import update
from resnest_jax.weights.state_dict import (
  COUNTER,
  export_state_dict,
  import_state_dict,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('float64')]

CONFIG = load_config('configs/cityscapes_pspnet.py')
ROWS = [f'cityscapes_{head}' for head in HEADS]


def batch(golden, step):
  """Images (B, H, W, 3) and labels (B, H, W) of one step."""
  size, (h, w) = int(golden['batch']), golden['hw']
  seed = int(golden['seed']) + step
  rng = np.random.default_rng(seed + 1000)
  labels = rng.integers(0, 19, (size, h // 8, w // 8))
  labels = labels.repeat(8, 1).repeat(8, 2)
  labels[rng.random(labels.shape) < 0.1] = 255
  return reference.images(seed, size, h, w), labels


@functools.cache
def steps(row):
  """The row's golden numbers and our three steps."""
  golden = reference.load(f'train_{row}_s14')
  changes = {'backbone': 'resnest14', 'stem_width': 64, 'dropout': 0.0}
  model = create_segmentor(
    reference.CONFIG | changes | {'head': row.split('_')[1]}
  )
  shapes = export_state_dict(model, reference.variables_of(model), 'mmseg')
  state_dict = reference.filled({k: v.shape for k, v in shapes.items()})
  total_steps = int(golden['max_iters'])
  optimizer = create_optimizer(CONFIG.optimizer, total_steps)
  schedule = create_schedule(CONFIG.optimizer, total_steps)
  state = start_state(optimizer, import_state_dict(model, state_dict))
  step = reference.quick_jit(
    functools.partial(
      update,
      model=model,
      optimizer=optimizer,
      loss=create_loss(CONFIG.loss, 19),
      aux_weight=CONFIG.loss.aux_weight,
    )
  )
  log, grads = [], []
  for index in range(3):
    state, scalars, grad = step(state, *batch(golden, index), jax.random.key(0))
    log.append({'learning_rate': schedule(index), **scalars})
    grads.append(grad)
  return {
    'golden': golden,
    'log': log,
    'grad0': export_state_dict(model, {'params': grads[0]}, 'mmseg'),
    'final': export_state_dict(model, state.variables(), 'mmseg'),
  }


@pytest.fixture(params=others_long(ROWS, 'cityscapes_pspnet'))
def run(request, float64):
  return steps(request.param)


def test_rate_and_losses(run):
  names = 'learning_rate', 'decode_loss', 'aux_loss'
  ours = [[float(scalars[name]) for name in names] for scalars in run['log']]
  np.testing.assert_allclose(ours, run['golden']['log'][:, :3], rtol=1e-8)


def test_accuracy(run):
  ours = []
  for step, scalars in enumerate(run['log']):
    valid = (batch(run['golden'], step)[1] != 255).sum()
    right = round(float(scalars['accuracy']) * valid)
    assert right / valid == pytest.approx(float(scalars['accuracy']), rel=1e-14)
    # The reference multiplies float32 numbers.
    factor = np.float32(100 / (valid + np.finfo(np.float32).eps))
    ours.append(np.float32(right) * factor)
  np.testing.assert_array_equal(ours, run['golden']['log'][:, 3])


def summary(tensor):
  flat = np.ravel(tensor)
  return np.array([flat.sum(), np.sqrt(flat @ flat), flat[0], flat[-1]])


@pytest.mark.parametrize('what', ['grad0', 'final'])
def test_every_tensor(run, what):
  """Sum, norm, first and last element, relative to the tensor's scale."""
  golden, tensors = run['golden'], run[what]
  compared = set()
  for name, expected in zip(golden['names'], golden[what], strict=True):
    if name not in tensors:  # Statistics have no gradient.
      assert np.isnan(expected).all()
      assert '.running_' in name
      continue
    # A bias before a normalisation has no effect: its gradient is rounding.
    scale = max(abs(expected).max(), 1e-6)
    error = abs(summary(tensors[name]) - expected).max() / scale
    assert error < 1e-8, name
    compared.add(str(name))
  # Counters are only written, as zero.
  assert compared == {name for name in tensors if not name.endswith(COUNTER)}
