"""Training steps against mmsegmentation's and the authors', in float64."""

import functools

import jax
import numpy as np
import pytest
from golden import reference
from lengths import others_long
from training.one_step import objective

from resnest_jax.checkpoints.state import start_state
from resnest_jax.config import load_config
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training.optimizer import create_optimizer, create_schedule
from resnest_jax.training.step import update
from resnest_jax.weights import state_dict as names

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('float64')]

CONFIG = load_config('configs/cityscapes_pspnet.py')
ENCODING = 'encoding_train_deeplab_s14_citys'
RUNS = [f'train_cityscapes_{head}_s14' for head in reference.MMSEG_HEADS] + [
  ENCODING
]


def batch(golden, step):
  size, (h, w) = int(golden['batch']), golden['hw']
  seed = int(golden['seed']) + step
  rng = np.random.default_rng(seed + 1000)
  labels = rng.integers(0, 19, (size, h // 8, w // 8))
  labels = labels.repeat(8, 1).repeat(8, 2)
  labels[rng.random(labels.shape) < 0.1] = 255
  return reference.images(seed, size, h, w), labels


def mmseg(golden, name):
  changes = {'backbone': 'resnest14', 'stem_width': 64, 'dropout': 0.0}
  head = name.split('_')[2]
  model = create_segmentor(reference.CONFIG | changes | {'head': head})
  shapes = names.export_state_dict(
    model, reference.variables_of(model), 'mmseg'
  )
  state_dict = reference.filled({k: v.shape for k, v in shapes.items()})
  variables = names.import_state_dict(model, state_dict)
  return CONFIG, model, variables, int(golden['max_iters'])


def encoding(golden):
  row = load_config('configs/ade20k_encoding_deeplabv3_50.py')
  row.optimizer.learning_rate = float(golden['lr'])
  steps = int(golden['epochs'] * golden['iters_per_epoch'])
  return row, *reference.encoding(golden, dropout=0.0), steps


@functools.cache
def steps(name):
  """The run's golden numbers, and scalars and tensors of our steps."""
  golden = reference.load(name)
  kind = 'encoding' if name == ENCODING else 'mmseg'
  made = encoding(golden) if kind == 'encoding' else mmseg(golden, name)
  config, model, variables, total_steps = made
  export = functools.partial(names.export_state_dict, model, kind=kind)
  optimizer = create_optimizer(config.optimizer, total_steps)
  schedule = create_schedule(config.optimizer, total_steps)
  state = start_state(optimizer, variables)
  options = objective(config, 19, kind == 'encoding')
  options |= {'model': model, 'optimizer': optimizer}
  step = reference.quick_jit(functools.partial(update, **options))
  log, grads = [], []
  for index in range(len(golden['log'])):
    state, scalars, grad = step(state, *batch(golden, index), jax.random.key(0))
    log.append({'learning_rate': schedule(index), **scalars})
    grads.append({'params': grad})
  tensors = {'grad0': export(grads[0]), 'final': export(state.variables())}
  return golden, log, tensors


@pytest.fixture(params=others_long(RUNS, RUNS[1], ENCODING))
def run(request, float64):
  return steps(request.param)


def test_rate_and_losses(run):
  golden, log, _ = run
  keys = ['learning_rate', 'decode_loss', 'aux_loss']
  theirs = golden['log'][:, :3]
  if 'lr' in golden:  # Theirs: rate, heads' rate, sum, and both losses.
    keys.insert(1, 'loss')
    theirs = golden['log'][:, [0, 2, 3, 4]] * [1, 1, 1, golden['aux_weight']]
    np.testing.assert_allclose(golden['log'][:, 1], 10 * theirs[:, 0])
  ours = [[float(scalars[key]) for key in keys] for scalars in log]
  np.testing.assert_allclose(ours, theirs, rtol=1e-8)


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
  if 'lr' not in golden:  # The authors log no accuracy.
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
    # A bias before a normalisation has no effect: its gradient is rounding, of
    # some hundred float64 numbers near 1.
    scale = max(abs(expected).max(), 1e-5)
    assert abs(ours - expected).max() < 1e-8 * scale, name
  assert left == set()
