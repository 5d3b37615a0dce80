"""Groups, schedules and steps of the optimizers, against torch in float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from golden.reference import TINY, load, random

from resnest_jax.config import load_config
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training import optimizer as library
from resnest_jax.training.freezing import frozen_parameters
from resnest_jax.training.optimizer import create_optimizer, create_schedule

pytestmark = pytest.mark.usefixtures('float64')

TOTAL_STEPS = 50


def settings(**options):
  options = {f'optimizer.{key}': value for key, value in options.items()}
  options['train.total_steps'] = TOTAL_STEPS
  return load_config('configs/ade20k_pspnet.py', options).optimizer


WARMUP = {'warmup_steps': 2, 'warmup_ratio': 0.1}
GROUPS = {'layer_decay': 0.5, 'head_multiplier': 10.0}
ADAM = {'beta2': 0.99, 'epsilon': 1e-3}
# One kernel, scale or bias of every layer by the network's names: its shape,
# and its share of the rate with GROUPS.
PARAMETERS = {
  'auxiliary_head/conv_seg/bias': ((5,), 10),
  'backbone/layer1_0/conv1/kernel': ((2, 2), 1 / 16),
  'backbone/layer2_0/bn1/bias': ((3,), 1 / 8),
  'backbone/layer3_22/conv2/fc1/bias': ((2,), 1 / 4),
  'backbone/layer4_0/conv2/bn0/scale': ((2,), 1 / 2),
  'backbone/stem_bn1/scale': ((2,), 1 / 32),
  'backbone/stem_conv1/kernel': ((3, 2), 1 / 32),
  'decode_head/conv_seg/kernel': ((2, 5), 10),
}


def small_params():
  flat = {name: random(*shape) for name, (shape, _) in PARAMETERS.items()}
  return unflatten_dict(flat, sep='/')


def gradients(params, step):
  return jax.tree.map(lambda x: np.cos(step + 9 * x), params)


def run(optimizer, start):
  """Parameters after a few steps, and the optimizer's state."""
  params, state = start, optimizer.init(start)
  update = jax.jit(optimizer.update)
  for step in range(4):
    updates, state = update(gradients(start, step), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def torchs(make, config, start):
  """The same parameters by torch, with a group for each; by name."""
  leaves = flatten_dict(jax.tree.map(torch.tensor, start), sep='/')
  optimizer = make({'params': [leaf]} for leaf in leaves.values())
  schedule = create_schedule(config, TOTAL_STEPS)
  for step in range(4):
    grads = flatten_dict(gradients(start, step), sep='/')
    size = np.sqrt(sum((x**2).sum() for x in grads.values()))
    for name, group in zip(leaves, optimizer.param_groups, strict=True):
      gradient = torch.tensor(grads[name])
      leaves[name].grad = gradient * min(1, config.clip_norm / size)
      decayed = config.decay_norm_bias or name.endswith('kernel')
      group['weight_decay'] = config.weight_decay * decayed
      group['lr'] = float(schedule(step)) * PARAMETERS[name][1]
    optimizer.step()
  return {name: leaf.numpy() for name, leaf in leaves.items()}


MAKERS = {
  'sgd': partial(torch.optim.SGD, momentum=0.9),
  'nesterov': partial(torch.optim.SGD, momentum=0.9, nesterov=True),
  'adamw': partial(torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-3),
}


@pytest.mark.parametrize('name', MAKERS)
@pytest.mark.parametrize('clip_norm', [2.0, 100.0])
@pytest.mark.parametrize('decay_norm_bias', [True, False])
def test_step_is_torchs(name, decay_norm_bias, clip_norm):
  decay = {'weight_decay': 0.05, 'decay_norm_bias': decay_norm_bias}
  options = decay | {'learning_rate': 0.02} | WARMUP | GROUPS | ADAM
  options |= {'name': 'adamw' if name == 'adamw' else 'sgd'}
  options |= {'nesterov': name == 'nesterov'}
  config = settings(clip_norm=clip_norm, **options)
  params = small_params()
  actual, _ = run(create_optimizer(config, TOTAL_STEPS), params)
  actual, before = (flatten_dict(x, sep='/') for x in (actual, params))
  for key, theirs in torchs(MAKERS[name], config, params).items():
    assert abs(theirs - before[key]).max() > 1e-4
    np.testing.assert_allclose(actual[key], theirs, rtol=1e-12, atol=1e-14)


def test_default_is_plain_sgd_bit_for_bit():
  """Its state too, so that checkpoints of plain SGD are read."""
  config = settings()
  params = jax.tree.map(jnp.float32, small_params())
  plain = optax.chain(
    optax.add_decayed_weights(5e-4),
    optax.sgd(create_schedule(config, TOTAL_STEPS), momentum=0.9),
  )
  ours = run(create_optimizer(config, TOTAL_STEPS), params)
  jax.tree.map(np.testing.assert_array_equal, ours, run(plain, params))


@pytest.mark.parametrize(
  ('schedule', 'warmup_steps'), [('poly', 10), ('cosine', 0)]
)
def test_rate_is_the_closed_form(schedule, warmup_steps):
  warmup = {'warmup_steps': warmup_steps, 'warmup_ratio': 0.1}
  rate = create_schedule(settings(schedule=schedule, **warmup), TOTAL_STEPS)
  length = TOTAL_STEPS - warmup_steps
  for step in (0, 7, 9, 10, 11, 49, 50, 60):
    done = min(step - warmup_steps, length) / length
    if step < warmup_steps:
      expected = 0.01 * (0.1 + 0.9 * step / warmup_steps)
    elif schedule == 'poly':
      expected = 0.0099 * (1 - done) ** 0.9 + 1e-4
    else:
      expected = 0.0099 * (1 + math.cos(math.pi * done)) / 2 + 1e-4
    assert float(rate(jnp.int32(step))) == pytest.approx(expected, rel=1e-12)


RATES = load('imagenet_rates')


def rates_to_zero(peak, steps, warmup_steps, **options):
  """A schedule, and how close a rate of theirs in float64 has to be."""
  options |= {'min_learning_rate': 0.0, 'warmup_ratio': 0.0}
  config = settings(learning_rate=peak, **options).to_dict()
  config['warmup_steps'] = int(warmup_steps)
  # Some roundings of the rate itself. Optax subtracts from the peak, which
  # leaves one of the peak in the first steps, up to 3e-13 of their rates.
  eps = 2**-52
  close = partial(pytest.approx, rel=8 * eps, abs=eps * peak)
  return create_schedule(config, int(steps)), close


@pytest.mark.parametrize('name', [x for x in RATES if f'{x}_args' in RATES])
def test_rate_is_the_authors(name):
  """Of their PyTorch scripts: cosine for ImageNet, poly for segmentors."""
  peak, epochs, length, *warmup = RATES[f'{name}_args'].tolist()
  schedule = 'cosine' if name.startswith('cos') else 'poly'
  steps = epochs * length, length * sum(warmup)
  rate, close = rates_to_zero(peak, *steps, schedule=schedule)
  for step, expected, *_ in RATES[name]:
    assert rate(int(step)) == close(expected)


def test_rate_is_that_of_mxnet_whose_first_update_is_1():
  """Which the log of the authors' run prints with six decimals."""
  peak, epochs, length, warmup = RATES['gluon_args'].tolist()
  steps, options = (epochs * length, warmup * length), {'schedule': 'cosine'}
  rate, close = rates_to_zero(peak, *steps, first_count=1, **options)
  for *_, update, printed, expected in RATES['gluon_log']:
    assert rate(int(update) - 1) == close(expected)
    assert rate(int(update) - 1) == pytest.approx(printed, abs=5.1e-7)
  golden = load('imagenet_gluon')
  assert golden['cosine_args'].tolist() == [steps[0], peak, steps[1], 0]
  pairs = zip(golden['cosine_updates'], golden['cosine_lr'], strict=True)
  for update, expected in pairs:
    assert rate(int(update) - 1) == close(expected)


def test_momentum_is_that_of_mxnet_but_for_the_decay_it_keeps():
  """MXNet 1.9.1 keeps the decay of the weights that it has just moved."""
  golden = load('imagenet_gluon')
  config = settings(nesterov=True, learning_rate=0.1, weight_decay=0.01)
  optimizer = create_optimizer(config, 10**9)
  weights, *expected = golden['nag_weights']
  state = optimizer.init({'kernel': weights})
  for gradient, theirs in zip(golden['nag_grads'], expected, strict=True):
    # `part` finds a head.
    before = {'kernel': weights}
    updates, state = optimizer.update({'kernel': gradient}, state, before)
    change = updates['kernel']
    weights = weights + change
    np.testing.assert_allclose(weights, theirs, rtol=1e-8)
    state = jax.tree.map(
      lambda x, change=change: x + 0.01 * change if x.shape else x, state
    )


def test_rate_beyond_the_end_is_the_least_one():
  """Compiled in float32, 1 - t * (1 / T) is below 0 at the end."""
  with jax.enable_x64(False):
    rate = jax.jit(create_schedule(settings(), 40))
    for step in (40, 50):
      assert rate(jnp.int32(step)) == np.float32(1e-4)


def columns(params, config, freeze=0, norms='none'):
  """Of the table of groups; the numbers of parameters as ints."""
  frozen = frozen_parameters(params, freeze, norms)
  table = library.group_table(params, config, frozen)
  names, numbers, rates, decays = (list(x.cells) for x in table.columns)
  return names, [int(x.replace(',', '')) for x in numbers], rates, decays


@pytest.fixture
def params():
  return variable_shapes(create_segmentor(TINY))['params']


def test_table_has_every_parameter_once(params):
  config = settings(layer_decay=0.5, decay_norm_bias=False)
  names, numbers, rates, decays = columns(params, config)
  assert names[:3] == ['stem', 'stem, norms and biases', 'stage 1']
  assert names[-2:] == ['heads', 'heads, norms and biases']
  assert sum(numbers) == sum(x.size for x in jax.tree.leaves(params))
  assert rates[1::2] == rates[::2]
  expected = [0.01 / 2**i for i in (5, 4, 3, 2, 1, 0)]
  assert [float(x) for x in rates[::2]] == pytest.approx(expected, rel=2e-3)
  assert decays == ['0.0005', '0'] * 6
  assert len(columns(params, settings())[0]) == 6


@pytest.mark.parametrize(
  ('freeze', 'norms', 'expected'),
  [
    (2, 'none', ['frozen'] * 2 + ['0.01'] * 4),
    (5, 'none', ['frozen'] * 5 + ['0.01']),
    # Normalisations of the backbone, or of all, next to trained convolutions.
    (0, 'backbone', ['0.01', 'frozen'] * 5 + ['0.01']),
    (1, 'all', ['frozen'] + ['0.01', 'frozen'] * 5),
  ],
)
def test_table_says_what_is_frozen(params, freeze, norms, expected):
  frozen = frozen_parameters(params, freeze, norms)
  _, numbers, rates, decays = columns(params, settings(), freeze, norms)
  assert rates == expected
  assert [x == '-' for x in decays] == [x == 'frozen' for x in rates]
  pairs = zip(numbers, rates, strict=True)
  sizes = jax.tree.map(lambda x, stays: x.size * stays, params, frozen)
  counted = sum(number for number, rate in pairs if rate == 'frozen')
  assert counted == sum(jax.tree.leaves(sizes))
