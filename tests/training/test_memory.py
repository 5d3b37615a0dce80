"""Rematerialisation, what is frozen, averages, bfloat16, micro-batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints.stored import variables_of
from flax.traverse_util import flatten_dict
from golden import reference
from golden.reference import TINY, quick_jit, random
from training.one_step import CONFIG, objective

from benchmarks.scale_model import tree_bytes
from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import start_state
from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.remat import in_groups, parse
from resnest_jax.models.segmentor import create_segmentor, for_training
from resnest_jax.training import gradients
from resnest_jax.training.freezing import frozen_parameters, train_the_rest
from resnest_jax.training.gradients import WHOLE, Plan, create_plan
from resnest_jax.training.optimizer import create_optimizer
from resnest_jax.training.step import next_average, update

# Three blocks of one stage: a group of two and one of one.
SMALL = TINY | {'stage_sizes': (3, 0, 0, 0), 'head': 'fcn', 'dropout': 0.3}
SGD = optax.sgd(0.1)


def made(dtype='float32', **changes):
  return create_segmentor(SMALL | {'dtype': dtype} | changes)


def batch():
  """Images that differ much in their statistics, and labels in their number."""
  rng = np.random.default_rng(0)
  images = rng.uniform(0.5, 2, (8, 1, 1, 1)) * rng.normal(size=(8, 24, 32, 3))
  labels = rng.integers(0, 7, (8, 24, 32))
  labels[rng.random(labels.shape) < rng.uniform(0, 1, (8, 1, 1))] = 255
  return images, labels


def stepping(model, optimizer=SGD, plan=WHOLE):
  """A state, and the compiled `update` of a state, images and labels."""
  parts = {'model': model, 'optimizer': optimizer, 'plan': plan}
  step = partial(update, key=jax.random.key(1), **parts, **objective())
  variables = jax.tree.map(jnp.asarray, reference.variables_of(model))
  return start_state(optimizer, variables), quick_jit(step)


def one_step(*arguments, **options):
  """The state before; after it, the scalars and the gradients."""
  state, step = stepping(*arguments, **options)
  return state, step(state, *batch())


def assert_same(ours, expected):
  """But for rounding; gradients in relation to the largest of them."""
  largest = max(abs(x).max() for x in jax.tree.leaves(expected[2]))
  reference.assert_close(ours[:2], expected[:2], 1e-12)
  reference.assert_close(ours[2], expected[2], 1e-12, float(largest))


def in_training(remat):
  """Logits as a function of the parameters, and their shapes."""
  model = for_training(made(), remat=remat)
  shapes = variable_shapes(model)

  def logits(params):
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes['batch_stats'])
    variables = {'params': params, 'batch_stats': stats}
    options = {'train': True, 'rngs': {'dropout': jax.random.key(0)}}
    images, changed = jnp.zeros((8, 64, 64, 3)), ['batch_stats']
    return model.apply(variables, images, **options, mutable=changed)[0]

  return logits, shapes['params']


def kept_bytes(remat):
  """What differentiation keeps from the forward pass."""
  logits, params = in_training(remat)
  return tree_bytes(jax.eval_shape(lambda x: jax.vjp(logits, x)[1], params))


@pytest.mark.long
@pytest.mark.usefixtures('float64')
def test_remat_changes_no_value():
  """Nor are running statistics updated twice; the dropout is drawn alike."""
  expected, *others = (
    one_step(for_training(made('float64'), remat=remat))[1]
    for remat in ('none', 'blocks', 'stages')
  )
  for ours in others:
    assert_same(ours, expected)


def test_remat_keeps_less():
  names = 'none', 'blocks', 'stages', 'stem'
  whole, blocks, stages, stem = map(kept_bytes, names)
  assert stages < blocks < 0.3 * whole
  assert blocks < stem < whole
  # Of a group of two blocks, the input of one is kept less.
  assert blocks - stages == 8 * 16 * 16 * 32 * 4


def count_sums(remat):
  """Sums over axes in a step's forward and backward pass."""
  logits, params = in_training(remat)
  gradient = jax.grad(lambda x: sum(y.sum() for y in logits(x)))
  program = jax.make_jaxpr(gradient)(params)
  names = [x.primitive.name for x in reference.equations(program.jaxpr)]
  return names.count('reduce_sum')


def test_remat_does_not_compute_statistics_again():
  """On several devices each of those sums is a message."""
  none, blocks, stages = map(count_sums, ('none', 'blocks', 'stages'))
  # Each block's global average for the attention is a sum as well; in a group
  # all blocks but the last are computed twice.
  assert (blocks - none, stages - none) == (2 * 3, 2 * 3 + 2)


def test_names_of_remat():
  assert parse('none') == ()
  assert parse('stem, layer3') == ('blocks', 'stem', 'layer3')
  assert [len(group) for group in in_groups('a' * 23)] == [5, 5, 5, 5, 3]
  assert [len(group) for group in in_groups('abcd')] == [2, 2]
  with pytest.raises(UserError, match=r"'layer5'.*layer4, heads"):
    parse('layer5')


def test_frozen_parts_stay():
  """Parameters and statistics; no decay, no momentum, no backward pass."""
  model = for_training(made(stage_sizes=(1, 1, 0, 0)), freeze=2)
  optimizer = train_the_rest(create_optimizer(CONFIG.optimizer, 10), 2)
  before, (after, _, grads) = one_step(model, optimizer, Plan(freeze=2))
  stem = {f'stem_{kind}{i}' for kind in ('conv', 'bn') for i in (1, 2, 3)}
  frozen = flatten_dict(frozen_parameters(before.params, 2))
  assert {x[1] for x, stays in frozen.items() if stays} == {*stem, 'layer1_0'}
  old, new = (flatten_dict(x.variables()) for x in (before, after))
  for path, value in old.items():
    same = (np.asarray(value) == np.asarray(new[path])).all()
    assert same == (path[2] in {*stem, 'layer1_0'}), path
  for path, slope in flatten_dict(grads).items():
    assert frozen[path] == (not slope.any()), path
  sizes = [old['params', *path].size for path in frozen if not frozen[path]]
  momentum = [x.size for x in jax.tree.leaves(after.opt_state) if x.ndim]
  assert sum(momentum) == sum(sizes)


def test_frozen_norms_are_those_of_the_statistics():
  params = variable_shapes(made())['params']
  block, head = 'backbone/layer1_0/conv2', 'decode_head/convs_0/bn/scale'
  names = f'{block}/bn1/bias', f'{block}/fc1/bias', head
  for norms, stay in (('backbone', (1, 0, 0)), ('all', (1, 0, 1))):
    frozen = flatten_dict(frozen_parameters(params, 0, norms), sep='/')
    assert tuple(frozen[name] for name in names) == stay


def test_average_is_the_closed_form():
  """Decays 1/10, 2/11, 3/12, ... until they reach the limit."""
  average, expected = {'w': jnp.zeros(2)}, 0.0
  for step, value in enumerate(np.random.default_rng(0).random(30)):
    new = {'w': jnp.full(2, value)}
    average = next_average(average, new, jnp.asarray(step, jnp.int32), 0.5)
    decay = min(0.5, (1 + step) / (10 + step))
    expected = decay * expected + (1 - decay) * value
  np.testing.assert_allclose(average['w'], expected, rtol=1e-5)


def test_averages_are_what_a_checkpoint_offers(tmp_path):
  variables = {'params': {'kernel': jnp.ones(3)}, 'batch_stats': {}}
  state = start_state(SGD, variables, ema=True)
  state = state.replace(ema=jax.tree.map(lambda x: x + 7, state.ema))
  assert state.eval_variables() is state.ema
  with store.open_checkpoints(tmp_path) as manager:
    store.save(manager, state, {})
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  found, _ = variables_of(tmp_path, 'latest', shapes.variables())
  assert (found['params']['kernel'] == 8).all()


def test_bfloat16_rounds_and_no_more():
  outputs = []
  for dtype in ('float32', 'bfloat16'):
    model = made(dtype, dropout=0.0)
    _, (state, scalars, grads) = one_step(model)
    leaves = jax.tree.leaves((state.variables(), grads, scalars))
    assert {str(x.dtype) for x in leaves} == {'float32'}
    images = random(2, 24, 32, 3, seed=1).astype('float32')
    variables = reference.variables_of(model)
    logits = reference.evaluate(model, variables, images).logits
    assert logits.dtype == jnp.float32
    outputs.append((logits, scalars['loss']))
  # Each activation is rounded by at most 2 ** -9 of itself. Fifteen layers one
  # after the other round their inputs, products and outputs; if they are
  # independent, 45 roundings add up to sqrt(45) 2 ** -9 = 1.3 % of the logits,
  # and normalisation may double what it is given.
  for exact, rounded, least in zip(*outputs, (2**-9, 0), strict=True):
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert least < error < 2 * np.sqrt(45) * 2**-9


# One block, so that compiling takes seconds.
ONE_BLOCK = {'dtype': 'float64', 'stage_sizes': (1, 0, 0, 0)}


@pytest.mark.usefixtures('float64')
def test_plain_micro_batches_are_steps_without_an_update():
  """Each has its own statistics, which enter the running ones in turn."""
  # Without dropout a part is a batch of its own.
  model, (images, labels) = made(**ONE_BLOCK, dropout=0.0), batch()
  state, whole = stepping(model)
  after, scalars, mean = one_step(model, plan=Plan(micro_batches=4))[1]
  parts, here = [], state
  for first in range(4):
    parts.append(whole(here, images[first::4], labels[first::4]))
    here = state.replace(batch_stats=parts[-1][0].batch_stats)
  valid = [(labels[first::4] != 255).sum() for first in range(4)]
  accuracy = np.average([x['accuracy'] for _, x, _ in parts], weights=valid)
  grads = jax.tree.map(lambda *x: sum(x) / 4, *(grads for _, _, grads in parts))
  loss = np.mean([x['loss'] for _, x, _ in parts])
  ours = after.batch_stats, (scalars['loss'], scalars['accuracy']), mean
  assert_same(ours, (here.batch_stats, (loss, accuracy), grads))


@pytest.mark.usefixtures('float64')
def test_frozen_statistics_make_plain_micro_batches_exact():
  """With dropout: an image's draw depends on its place alone."""
  model = made(**ONE_BLOCK, frozen_bn='all')
  (images, labels), results = batch(), []
  for plan in (Plan(micro_batches=4), WHOLE):
    state, step = stepping(model, plan=plan)
    # All labelled: the mean of means is the mean.
    results.append(step(state, images, labels % 255))
  assert_same(*results)
  (after, _, grads), _ = results
  stats = after.batch_stats, state.batch_stats
  jax.tree.map(np.testing.assert_array_equal, *stats)
  # Scales have gradients nevertheless, as with mmsegmentation's norm_eval.
  assert abs(grads['backbone']['stem_bn1']['scale']).min() > 0


ROW = 'configs/ade20k_pspnet.py:mini'


def test_what_a_log_says():
  configs = [load_config(ROW, {'train.micro_batch_size': n}) for n in (4, 0)]
  plans = [create_plan(config, 1) for config in configs]
  assert plans == [Plan(micro_batches=4), WHOLE]
  note, none = (gradients.micro_batch_note(plan, 16) for plan in plans)
  assert '4 x 4 images: batch norm has the statistics of 4' in note
  assert none == ''


@pytest.mark.parametrize(
  ('devices', 'overrides', 'message'),
  [
    (4, {'train.micro_batch_size': 2}, 'multiple of 4'),
    (1, {'train.micro_batch_size': 5}, 'divide train.batch_size, 16'),
    (1, {'train.micro_batch_size': 4, 'mesh.spatial': 2}, 'mesh.spatial=1'),
    (1, {'train.micro_batch_size': 1}, r'train\.remat=stages'),
    (1, {'train.freeze': 1}, 'config.pretrained'),
    (1, {'train.freeze_norms': True}, 'config.model.frozen_bn=backbone'),
  ],
)
def test_what_cannot_be_meant_is_refused(devices, overrides, message):
  with pytest.raises(UserError, match=message):
    create_plan(load_config(ROW, overrides), devices)
