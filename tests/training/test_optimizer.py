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
from golden.reference import TINY

from resnest_jax.config import load_config
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training.freezing import frozen_parameters
from resnest_jax.training.optimizer import (
  create_optimizer,
  create_schedule,
  group_table,
)
from resnest_jax.weights.state_dict import variable_shapes

pytestmark = pytest.mark.usefixtures('float64')

TOTAL_STEPS = 50


def settings(**options):
  options = {f'optimizer.{key}': value for key, value in options.items()}
  options['train.total_steps'] = TOTAL_STEPS
  return load_config('configs/ade20k_pspnet.py', options).optimizer


# One kernel, scale or bias of every layer by the network's names: its shape,
# and its share of the rate with layer_decay 0.5 and head_multiplier 10.
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
  rng = np.random.default_rng(0)
  flat = {k: rng.standard_normal(shape) for k, (shape, _) in PARAMETERS.items()}
  return unflatten_dict(flat, sep='/')


def gradients(params):
  """Those of a few steps."""
  rng = np.random.default_rng(1)
  return [
    jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), params)
    for _ in range(4)
  ]


def run(optimizer, params):
  """Parameters after a step for each gradient; the optimizer's last state."""
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for grads in gradients(params):
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def torchs(make, config, params):
  """The same parameters by torch, with a group for each; by name."""
  leaves = {
    name: torch.tensor(x) for name, x in flatten_dict(params, sep='/').items()
  }
  decayed = [config.decay_norm_bias or x.endswith('kernel') for x in leaves]
  optimizer = make(
    {'params': [leaf], 'weight_decay': config.weight_decay * decay}
    for leaf, decay in zip(leaves.values(), decayed, strict=True)
  )
  schedule = create_schedule(config, TOTAL_STEPS)
  for step, grads in enumerate(gradients(params)):
    grads = flatten_dict(grads, sep='/')
    for name, group in zip(leaves, optimizer.param_groups, strict=True):
      leaves[name].grad = torch.tensor(grads[name])
      group['lr'] = float(schedule(step)) * PARAMETERS[name][1]
    optimizer.step()
  return leaves


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
@pytest.mark.parametrize('decay_norm_bias', [True, False])
def test_step_is_torchs(name, decay_norm_bias):
  config = settings(
    name=name,
    learning_rate=0.02,
    weight_decay=0.05,
    warmup_steps=2,
    warmup_ratio=0.1,
    layer_decay=0.5,
    head_multiplier=10.0,
    decay_norm_bias=decay_norm_bias,
    beta2=0.99,
    epsilon=1e-3,
  )
  params = small_params()
  make = partial(torch.optim.AdamW, lr=1.0, betas=(0.9, 0.99), eps=1e-3)
  if name == 'sgd':
    make = partial(torch.optim.SGD, lr=1.0, momentum=0.9)
  expected = torchs(make, config, params)
  actual, _ = run(create_optimizer(config, TOTAL_STEPS), params)
  before = flatten_dict(params, sep='/')
  for name, mine in flatten_dict(actual, sep='/').items():
    theirs = expected[name].numpy()
    assert abs(theirs - before[name]).max() > 1e-4
    np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14)


def test_default_is_plain_sgd_bit_for_bit():
  """Its state too, so that checkpoints of plain SGD are read."""
  config = settings()
  params = jax.tree.map(jnp.float32, small_params())
  plain = optax.chain(
    optax.add_decayed_weights(5e-4),
    optax.sgd(create_schedule(config, TOTAL_STEPS), momentum=0.9),
  )
  actual = run(create_optimizer(config, TOTAL_STEPS), params)
  expected = run(plain, params)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
  ('schedule', 'warmup_steps'), [('poly', 10), ('cosine', 0)]
)
def test_rate_is_the_closed_form(schedule, warmup_steps):
  config = settings(
    schedule=schedule, warmup_steps=warmup_steps, warmup_ratio=0.1
  )
  rate = create_schedule(config, TOTAL_STEPS)
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


def test_rate_beyond_the_end_is_the_least_one():
  """Compiled in float32, 1 - t * (1 / T) is below 0 at the end."""
  with jax.enable_x64(False):
    rate = jax.jit(create_schedule(settings(), 40))
    assert float(rate(jnp.int32(40))) == float(np.float32(1e-4))
    assert float(rate(jnp.int32(50))) == float(np.float32(1e-4))


def test_long_gradients_are_shortened_and_short_ones_kept():
  params = {'decode_head': jnp.zeros(2)}
  config = settings(clip_norm=2.0, weight_decay=0.0, momentum=0.0)
  optimizer = create_optimizer(config, TOTAL_STEPS)
  for gradient, expected in (
    ([3.0, 4.0], [-0.012, -0.016]),
    ([0.3, 0.4], [-0.003, -0.004]),
  ):
    grads = {'decode_head': jnp.asarray(gradient)}
    update, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(update['decode_head'], expected, rtol=1e-12)


def test_table_has_every_parameter_once():
  params = variable_shapes(create_segmentor(TINY))['params']
  config = settings(layer_decay=0.5, decay_norm_bias=False)
  names, numbers, rates, decays = (
    list(column.cells) for column in group_table(params, config).columns
  )
  assert names[:3] == ['stem', 'stem, norms and biases', 'stage 1']
  assert names[-2:] == ['heads', 'heads, norms and biases']
  assert len(names) == 12
  total = sum(x.size for x in jax.tree.leaves(params))
  assert sum(int(number.replace(',', '')) for number in numbers) == total
  assert rates[1::2] == rates[::2]
  assert [float(rate) for rate in rates[::2]] == pytest.approx(
    [0.01 / 32, 0.01 / 16, 0.01 / 8, 0.01 / 4, 0.01 / 2, 0.01], rel=2e-3
  )
  assert decays == ['0.0005', '0'] * 6
  assert group_table(params, settings()).row_count == 6


def test_table_says_what_is_frozen():
  params = variable_shapes(create_segmentor(TINY))['params']
  for freeze, norms, expected in (
    (2, 'none', ['frozen'] * 2 + ['0.01'] * 4),
    (5, 'none', ['frozen'] * 5 + ['0.01']),
    # Normalisations of the backbone, or of all, next to trained convolutions.
    (0, 'backbone', ['0.01', 'frozen'] * 5 + ['0.01']),
    (1, 'all', ['frozen'] + ['0.01', 'frozen'] * 5),
  ):
    frozen = frozen_parameters(params, freeze, norms)
    table = group_table(params, settings(), frozen)
    _, numbers, rates, decays = (list(x.cells) for x in table.columns)
    assert rates == expected
    assert [x == '-' for x in decays] == [x == 'frozen' for x in rates]
    counted = sum(
      int(number.replace(',', ''))
      for number, rate in zip(numbers, rates, strict=True)
      if rate == 'frozen'
    )
    trees = jax.tree.leaves(frozen), jax.tree.leaves(params)
    assert counted == sum(
      x.size for stays, x in zip(*trees, strict=True) if stays
    )
