"""The compiled step: the same on any number of devices, donated, seeded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collectives import assert_gradients_local, assert_local, mesh_of
from flax.traverse_util import flatten_dict
from golden.reference import TINY, random, struct
from lengths import others_long
from training.one_step import assert_close, compiled_step, training_batch

from resnest_jax.models.initial import initial_variables, variable_shapes
from resnest_jax.models.segmentor import create_backbone, create_segmentor
from resnest_jax.sharding import replicate
from resnest_jax.training import step as step_module
from resnest_jax.training.gradients import WHOLE, Plan

pytestmark = pytest.mark.usefixtures('float64')


@functools.cache
def run(devices, plan=WHOLE, **changes):
  """The compiled step, its input, state and scalars, and two steps' losses."""
  model, mesh = create_segmentor(TINY | changes), mesh_of(devices)
  batch = training_batch(8, 32, 48)
  step, start, batch = compiled_step(model, mesh, batch, plan=plan)
  before = replicate(start, mesh)
  after, scalars = step(before, batch)
  states = (start.replace(step=np.int32(count)) for count in (0, 1))
  losses = [step(replicate(x, mesh), batch)[1]['loss'] for x in states]
  return step, before, after, jax.device_get(scalars), losses


OPTIONS = {
  'whole': {},
  # Two micro-batches, an image of each on every device. A backbone of one
  # block, so that the loop over them compiles soon.
  'parts': {'plan': Plan(micro_batches=2), 'stage_sizes': (1, 0, 0, 0)},
}


@pytest.mark.parametrize('kind', others_long(OPTIONS, 'whole'))
def test_four_devices_do_what_one_does(kind):
  """With dropout: its draws do not depend on the devices either."""
  (_, _, *one), (step, _, *four) = (run(n, **OPTIONS[kind]) for n in (1, 4))
  # After the first step the momentum is the gradient and the decay.
  assert_close(four, one)
  assert_local(step)


def test_loss_is_the_sum_of_both_heads():
  _, _, after, scalars, _ = run(1)
  total = scalars['decode_loss'] + scalars['aux_loss']
  assert scalars['loss'] == pytest.approx(total, rel=1e-12)
  assert int(after.step) == 1


def test_dropout_is_drawn_from_the_step():
  *_, scalars, (again, other) = run(1)
  assert again == scalars['loss']
  assert abs(other - again) > 1e-6


def test_state_is_donated():
  _, before, after, *_ = run(4)
  assert all(x.is_deleted() for x in jax.tree.leaves(before))
  assert not any(x.is_deleted() for x in jax.tree.leaves(after))


@pytest.mark.parametrize(('radix', 'groups'), [(1, 1), (1, 2), (2, 2), (4, 2)])
def test_no_block_gathers_the_batch(radix, groups):
  block = {'stage_sizes': (0, 1, 0, 0), 'radix': radix, 'groups': groups}
  model = create_backbone(TINY | block | {'dtype': 'float32'})

  def apply(variables, x):
    options = {'train': True, 'mutable': ['batch_stats']}
    return model.apply(variables, x, **options)[0][0][1:]

  assert_gradients_local(apply, variable_shapes(model), struct(8, 64, 64, 3))


def test_initial_variables_are_drawn_as_the_modules_draw():
  """Every variable, but for chance, is what `model.init` gives."""
  model = create_segmentor(TINY | {'dtype': 'float32'})
  draw = jax.jit(functools.partial(model.init, train=False))
  drawn = draw(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  seeds = (initial_variables(model, seed) for seed in (0, 1))
  ours, seeded, theirs = map(flatten_dict, (*seeds, drawn))
  assert ours.keys() == theirs.keys()
  for path, values in ours.items():
    other = np.asarray(theirs[path])
    assert (values.shape, values.dtype) == (other.shape, other.dtype)
    if path[-1] == 'kernel':
      # Five standard errors of the difference of two standard deviations.
      margin = 5 / np.sqrt(values.size)
      assert values.std() == pytest.approx(other.std(), rel=margin), path
      assert abs(values.mean()) < margin * values.std(), path
      assert (values != seeded[path]).any()
    else:
      np.testing.assert_array_equal(values, other, err_msg='/'.join(path))
  # He normal (fan out) in the backbone, N(0, 0.01) in the classifiers.
  kernel = ours['params', 'backbone', 'layer4_0', 'conv3', 'kernel']
  assert kernel.std() == pytest.approx((2 / kernel.shape[-1]) ** 0.5, rel=0.05)
  classifier = ours['params', 'decode_head', 'classifier', 'conv_seg', 'kernel']
  assert classifier.std() == pytest.approx(0.01, rel=0.3)


def test_the_authors_heads_begin_as_layers_of_pytorch():
  """Uniform, biases too; nothing else differs."""
  ours, theirs = (
    flatten_dict(initial_variables(create_segmentor(TINY | {'head': x}), 0))
    for x in ('encoding_pspnet', 'pspnet')
  )
  assert ours.keys() == theirs.keys()
  for path, values in ours.items():
    kernel = ours.get((*path[:-1], 'kernel'))
    if path[1] == 'backbone' or kernel is None:
      np.testing.assert_array_equal(values, theirs[path])
      continue
    bound = (kernel.size / kernel.shape[-1]) ** -0.5
    assert 0.5 * bound < np.abs(values).max() <= bound, path
    if values.size > 1000:
      assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize('large', [1, 40, 10_000])
def test_norm_of_gradients_is_optax(monkeypatch, large):
  """Leaves that are summed alone, a few together, and all together."""
  monkeypatch.setattr(step_module, 'LARGE', large)
  shapes = [(), (3,), (5, 7), (1, 1, 4, 9), (64,), (2,), (30,), (11,)]
  tree = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
  norm = step_module.global_norm(tree)
  np.testing.assert_allclose(norm, optax.tree.norm(tree), rtol=1e-14)
