"""Three training steps against mmsegmentation's, in float64."""

import functools

import jax
import numpy as np
import pytest
from golden import reference
from lengths import others_long
from training.one_step import objective

from resnest_jax.checkpoints.state import start_state
from resnest_jax.config import load_config
from resnest_jax.models.segmentor import HEADS, create_segmentor
from resnest_jax.training.optimizer import create_optimizer, create_schedule
from resnest_jax.training.step import update
from resnest_jax.weights import state_dict as names

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('float64')]

CONFIG = load_config('configs/cityscapes_pspnet.py')


def batch(golden, step):
  size, (h, w) = int(golden['batch']), golden['hw']
  seed = int(golden['seed']) + step
  rng = np.random.default_rng(seed + 1000)
  labels = rng.integers(0, 19, (size, h // 8, w // 8))
  labels = labels.repeat(8, 1).repeat(8, 2)
  labels[rng.random(labels.shape) < 0.1] = 255
  return reference.images(seed, size, h, w), labels


@functools.cache
def steps(head):
  """The row's golden numbers, and scalars and tensors of our three steps."""
  golden = reference.load(f'train_cityscapes_{head}_s14')
  changes = {'backbone': 'resnest14', 'stem_width': 64, 'dropout': 0.0}
  model = create_segmentor(reference.CONFIG | changes | {'head': head})
  export = functools.partial(names.export_state_dict, model, kind='mmseg')
  shapes = export(reference.variables_of(model))
  state_dict = reference.filled({k: v.shape for k, v in shapes.items()})
  total_steps = int(golden['max_iters'])
  optimizer = create_optimizer(CONFIG.optimizer, total_steps)
  schedule = create_schedule(CONFIG.optimizer, total_steps)
  state = start_state(optimizer, names.import_state_dict(model, state_dict))
  options = objective(CONFIG, 19) | {'model': model, 'optimizer': optimizer}
  step = reference.quick_jit(functools.partial(update, **options))
  log, grads = [], []
  for index in range(3):
    state, scalars, grad = step(state, *batch(golden, index), jax.random.key(0))
    log.append({'learning_rate': schedule(index), **scalars})
    grads.append({'params': grad})
  tensors = {'grad0': export(grads[0]), 'final': export(state.variables())}
  return golden, log, tensors


@pytest.fixture(params=others_long(HEADS, 'pspnet'))
def run(request, float64):
  return steps(request.param)


def test_rate_and_losses(run):
  golden, log, _ = run
  keys = 'learning_rate', 'decode_loss', 'aux_loss'
  ours = [[float(scalars[key]) for key in keys] for scalars in log]
  np.testing.assert_allclose(ours, golden['log'][:, :3], rtol=1e-8)


def test_accuracy(run):
  golden, log, _ = run
  ours = []
  for step, scalars in enumerate(log):
    valid = (batch(golden, step)[1] != 255).sum()
    right = round(float(scalars['accuracy']) * valid)
    assert right / valid == pytest.approx(float(scalars['accuracy']), rel=1e-14)
    # The reference multiplies float32 numbers.
    factor = np.float32(100 / (valid + np.finfo(np.float32).eps))
    ours.append(np.float32(right) * factor)
  np.testing.assert_array_equal(ours, golden['log'][:, 3])


@pytest.mark.parametrize('what', ['grad0', 'final'])
def test_every_tensor(run, what):
  """Sum, norm, first and last element, relative to the tensor's scale."""
  golden, _, tensors = run
  # Counters are only written, as zero.
  left = {name for name in tensors[what] if not name.endswith(names.COUNTER)}
  for name, expected in zip(golden['names'], golden[what], strict=True):
    if name not in left:  # Statistics have no gradient.
      assert np.isnan(expected).all()
      assert '.running_' in name
      continue
    left.remove(name)
    flat = np.ravel(tensors[what][name])
    ours = [flat.sum(), np.linalg.norm(flat), flat[0], flat[-1]]
    # A bias before a normalisation has no effect: its gradient is rounding.
    scale = max(abs(expected).max(), 1e-6)
    assert abs(ours - expected).max() < 1e-8 * scale, name
  assert left == set()
