"""Rematerialisation, what is frozen, averages and bfloat16."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints.stored import variables_of
from flax.traverse_util import flatten_dict
from golden.reference import TINY, filled_variables, quick_jit

from benchmarks.scale_model import tree_bytes
from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import start_state
from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.jax_private import jaxprs_in_params
from resnest_jax.losses.objective import create_loss
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.remat import in_groups, parse
from resnest_jax.models.segmentor import create_segmentor, for_training
from resnest_jax.training.freezing import frozen_parameters, train_the_rest
from resnest_jax.training.gradients import WHOLE, Plan
from resnest_jax.training.optimizer import create_optimizer
from resnest_jax.training.step import next_average, update

ROW = 'configs/ade20k_pspnet.py'
# Three blocks of one stage: a group of two and one of one.
SMALL = TINY | {'stage_sizes': (3, 0, 0, 0), 'head': 'fcn', 'dropout': 0.3}


def made(dtype, **changes):
  model = create_segmentor(SMALL | {'dtype': dtype} | changes)
  return model, filled_variables(variable_shapes(model))


def one_step(model, variables, optimizer, plan=WHOLE):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.standard_normal((4, 24, 32, 3)))
  labels = jnp.asarray(rng.integers(0, 7, (4, 24, 32)))
  state = start_state(optimizer, jax.tree.map(jnp.asarray, variables))
  step = partial(
    update,
    model=model,
    optimizer=optimizer,
    loss=create_loss(load_config(ROW).loss, 7),
    aux_weight=0.4,
    plan=plan,
  )
  return state, quick_jit(step)(state, images, labels, jax.random.key(1))


def in_training(model):
  """Logits as a function of the parameters, and its arguments."""
  shapes = variable_shapes(model)
  images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)

  def logits(params, stats, images):
    output, _ = model.apply(
      {'params': params, 'batch_stats': stats},
      images,
      train=True,
      mutable=['batch_stats'],
      rngs={'dropout': jax.random.key(0)},
    )
    return output

  return logits, (shapes['params'], shapes['batch_stats'], images)


def kept_bytes(model):
  """What differentiation keeps from the forward pass."""
  logits, arguments = in_training(model)

  def residuals(params, *others):
    return jax.vjp(lambda params: logits(params, *others), params)[1]

  return tree_bytes(jax.eval_shape(residuals, *arguments))


@pytest.mark.long
@pytest.mark.usefixtures('float64')
def test_remat_changes_no_value():
  """Nor are running statistics updated twice; the dropout is drawn alike."""
  model, variables = made('float64')
  expected, *others = (
    one_step(for_training(model, remat=remat), variables, optax.sgd(0.1))[1]
    for remat in ('none', 'blocks', 'stages')
  )
  largest = max(abs(x).max() for x in jax.tree.leaves(expected[2]))
  for ours in others:
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
      assert abs(a - b).max() <= 1e-12 * max(largest, abs(b).max())


def test_remat_keeps_less():
  model, _ = made('float32')
  whole, blocks, stages, stem = (
    kept_bytes(for_training(model, remat=remat))
    for remat in ('none', 'blocks', 'stages', 'stem')
  )
  assert stages < blocks < 0.3 * whole
  assert blocks < stem < whole
  # Of a group of two blocks, the input of one is kept less.
  features = 8 * 16 * 16 * 32 * 4
  assert blocks - stages == features


def count_sums(model):
  """Sums over axes in a step's forward and backward pass."""

  def count(jaxpr):
    return sum(
      equation.primitive.name == 'reduce_sum'
      or sum(map(count, jaxprs_in_params(equation.params)))
      for equation in jaxpr.eqns
    )

  logits, arguments = in_training(model)
  gradient = jax.grad(lambda *x: sum(y.sum() for y in logits(*x)))
  return count(jax.make_jaxpr(gradient)(*arguments).jaxpr)


def test_remat_does_not_compute_statistics_again():
  """On several devices each of those sums is a message."""
  model, _ = made('float32')
  none, blocks, stages = (
    count_sums(for_training(model, remat=remat))
    for remat in ('none', 'blocks', 'stages')
  )
  # Each block's global average for the attention is a sum as well; in a group
  # all blocks but the last are computed twice.
  assert blocks - none == 2 * 3
  assert stages - none == 2 * 3 + 2


def test_names_of_remat():
  assert parse('none') == ()
  assert parse('stem, layer3') == ('blocks', 'stem', 'layer3')
  assert [len(group) for group in in_groups('a' * 23)] == [5, 5, 5, 5, 3]
  assert [len(group) for group in in_groups('abcd')] == [2, 2]
  with pytest.raises(UserError, match=r"'layer5'.*layer4, heads"):
    parse('layer5')


def test_frozen_parts_stay():
  """Parameters and statistics; no decay, no momentum, no backward pass."""
  config = load_config(ROW)
  model, variables = made('float32', stage_sizes=(1, 1, 0, 0))
  optimizer = train_the_rest(create_optimizer(config.optimizer, 10), 2)
  trained = for_training(model, freeze=2)
  before, (after, _, grads) = one_step(
    trained, variables, optimizer, Plan(freeze=2)
  )
  old, new, slopes = (
    flatten_dict(x) for x in (before.params, after.params, grads)
  )
  frozen = flatten_dict(frozen_parameters(before.params, 2))
  names = {path[1] for path, stays in frozen.items() if stays}
  stem = {f'stem_{kind}{i}' for kind in ('conv', 'bn') for i in (1, 2, 3)}
  assert names == {*stem, 'layer1_0'}
  for path, stays in frozen.items():
    assert (np.asarray(old[path]) == np.asarray(new[path])).all() == stays, path
    assert stays == (not slopes[path].any()), path
  stats = flatten_dict(before.batch_stats)
  for path, value in flatten_dict(after.batch_stats).items():
    same = (np.asarray(value) == np.asarray(stats[path])).all()
    assert same == (path[1] in names), path
  sizes = sum(new[path].size for path, stays in frozen.items() if not stays)
  momentum = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim)
  assert momentum == sizes


def test_frozen_norms_are_those_of_the_statistics():
  shapes = variable_shapes(made('float32')[0])['params']
  backbone, everywhere = (
    flatten_dict(frozen_parameters(shapes, 0, norms), sep='/')
    for norms in ('backbone', 'all')
  )
  assert backbone['backbone/layer1_0/conv2/bn1/bias']
  assert not backbone['backbone/layer1_0/conv2/fc1/bias']
  assert not backbone['decode_head/convs_0/bn/scale']
  assert everywhere['decode_head/convs_0/bn/scale']


def test_average_is_the_closed_form():
  """Decays 1/10, 2/11, 3/12, ... until they reach the limit."""
  average, values = {'w': jnp.zeros(2)}, np.random.default_rng(0).random(30)
  expected = 0.0
  for step, value in enumerate(values):
    average = next_average(
      average, {'w': jnp.full(2, value)}, jnp.asarray(step, jnp.int32), 0.5
    )
    decay = min(0.5, (1 + step) / (10 + step))
    expected = decay * expected + (1 - decay) * value
  np.testing.assert_allclose(average['w'], expected, rtol=1e-5)


def test_averages_are_what_a_checkpoint_offers(tmp_path):
  variables = {'params': {'kernel': jnp.ones(3)}, 'batch_stats': {}}
  state = start_state(optax.sgd(0.1), variables, ema=True)
  state = state.replace(ema=jax.tree.map(lambda x: x + 7, state.ema))
  assert state.eval_variables() is state.ema
  with store.open_checkpoints(tmp_path) as manager:
    store.save(manager, state, {})
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  found, _ = variables_of(tmp_path, 'latest', shapes.variables())
  assert (found['params']['kernel'] == 8).all()


def test_bfloat16_rounds_and_no_more():
  """Each activation is rounded by at most 2 ** -9 of itself.

  Fifteen layers one after the other round their inputs, products and outputs;
  if they are independent, 45 roundings add up to sqrt(45) 2 ** -9 = 1.3 % of
  the logits, and normalisation may double what it is given.
  """
  outputs = {}
  for dtype in ('float32', 'bfloat16'):
    model, variables = made(dtype, dropout=0.0)
    _, (state, scalars, grads) = one_step(model, variables, optax.sgd(0.1))
    leaves = jax.tree.leaves((state.params, state.batch_stats, grads, scalars))
    assert {x.dtype for x in leaves} == {jnp.dtype('float32')}
    images = np.random.default_rng(1).standard_normal((2, 24, 32, 3))
    logits = quick_jit(
      lambda v, x, model=model: model.apply(v, x, train=False).logits
    )(variables, images)
    assert logits.dtype == jnp.float32
    outputs[dtype] = logits, scalars['loss']
  (exact, loss), (rounded, rounded_loss) = outputs.values()
  error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
  assert 2**-9 < error < 2 * np.sqrt(45) * 2**-9
  assert 0 < abs(rounded_loss - loss) / loss < 2 * np.sqrt(45) * 2**-9
