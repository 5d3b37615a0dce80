"""Training steps against mmsegmentation's and the authors', in float64."""

import functools

import jax
import numpy as np
import optax
import pytest
from golden import reference
from lengths import others_long
from training.one_step import objective

from resnest_jax.checkpoints.state import start_state
from resnest_jax.config import load_config
from resnest_jax.losses.images import image_loss
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training.optimizer import create_optimizer, create_schedule
from resnest_jax.training.step import update
from resnest_jax.weights import state_dict as names

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('float64')]

CONFIG = load_config('configs/cityscapes_pspnet.py')
ENCODING = 'encoding_train_deeplab_s14_citys'
IMAGENET = 'imagenet_train_s14_torch'
RUNS = [f'train_cityscapes_{head}_s14' for head in reference.MMSEG_HEADS]
RUNS += [ENCODING, IMAGENET]


def batch(golden, step):
  size, (h, w) = int(golden['batch']), golden['hw']
  seed = int(golden['seed']) + step
  rng = np.random.default_rng(seed + 1000)
  if 'classes' in golden:
    # Mixed as PyTorch-Encoding does, with any partner.
    classes = int(golden['classes'])
    targets = np.eye(classes)[rng.integers(0, classes, size)]
    weight, partners = rng.beta(0.2, 0.2), rng.permutation(size)
    both = reference.images(seed, size, h, w), targets
    return [weight * x + (1 - weight) * x[partners] for x in both]
  labels = rng.integers(0, 19, (size, h // 8, w // 8))
  labels = labels.repeat(8, 1).repeat(8, 2)
  labels[rng.random(labels.shape) < 0.1] = 255
  return reference.images(seed, size, h, w), labels


def mmseg(golden, name):
  changes = {'backbone': 'resnest14', 'stem_width': 64, 'dropout': 0.0}
  head = name.split('_')[2]
  model = create_segmentor(reference.CONFIG | changes | {'head': head})
  variables = reference.filled_as(model, 'mmseg')
  return CONFIG, model, variables, int(golden['max_iters'])


def encoding(golden):
  row = load_config('configs/ade20k_encoding_deeplabv3_50.py')
  row.optimizer.learning_rate = float(golden['lr'])
  steps = int(golden['epochs'] * golden['iters_per_epoch'])
  return row, *reference.encoding(golden, dropout=0.0), steps


def imagenet(golden):
  row = load_config('configs/imagenet_resnest50.py')
  row.optimizer.learning_rate, row.optimizer.warmup_steps = 0.01, 3
  row.optimizer.nesterov, row.optimizer.first_count = False, 0
  classes = int(golden['classes'])
  model = create_classifier('resnest14', classes, dtype='float64')
  return row, model, reference.filled_as(model, 'official'), 12


def with_their_decay(optimizer, golden, model, named):
  """Theirs also decays six scales, whose names have no 'bn'."""
  exempt = set(golden['exempt'].tolist())
  decays = {k: np.full(x.shape, 1e-4 * (k not in exempt)) for k, x in named}
  decays = names.import_state_dict(model, decays)['params']

  def add(path, update, param, decay):
    return update + decay * param if path[-1].key == 'scale' else update

  def update(updates, params):
    return jax.tree.map_with_path(add, updates, params, decays)

  assert sum(x.max() > 0 for x in jax.tree.leaves(decays)) == 34
  return optax.chain(optax.stateless(update), optimizer)


@functools.cache
def steps(name):
  """The run's golden numbers, and scalars and tensors of our steps."""
  golden = reference.load(name)
  kind = {ENCODING: 'encoding', IMAGENET: 'official'}.get(name, 'mmseg')
  makers = {'encoding': encoding, 'official': imagenet}
  made = makers.get(kind, functools.partial(mmseg, name=name))(golden)
  config, model, variables, total_steps = made
  export = functools.partial(names.export_state_dict, model, kind=kind)
  optimizer = create_optimizer(config.optimizer, total_steps)
  schedule = create_schedule(config.optimizer, total_steps)
  options = objective(config, 19, kind == 'encoding')
  if kind == 'official':
    options['loss'] = functools.partial(
      image_loss, label_smoothing=config.loss.label_smoothing
    )
    named = export(variables).items()
    optimizer = with_their_decay(optimizer, golden, model, named)
  state = start_state(optimizer, variables)
  options |= {'model': model, 'optimizer': optimizer}
  step = reference.quick_jit(functools.partial(update, **options))
  log, grads = [], []
  for index in range(len(golden['log'])):
    state, scalars, grad = step(state, *batch(golden, index), jax.random.key(0))
    log.append({'learning_rate': schedule(index), **scalars})
    grads.append({'params': grad})
  tensors = {'grad0': export(grads[0]), 'final': export(state.variables())}
  return golden, log, tensors


@pytest.fixture(params=others_long(RUNS, RUNS[1], ENCODING, IMAGENET))
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
  if 'classes' in golden:
    keys, theirs = ['learning_rate', 'loss'], golden['log'][:, [0, 2]]
  ours = [[float(scalars[key]) for key in keys] for scalars in log]
  np.testing.assert_allclose(ours, theirs, rtol=1e-8)


def test_accuracy(run):
  golden, log, _ = run
  if 'classes' in golden:
    return
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
