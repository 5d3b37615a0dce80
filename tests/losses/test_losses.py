"""Every loss against a NumPy twin in float64, on one device and on four."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import assert_local, mesh_of
from golden.reference import QUICK, relative_error
from losses import twins

from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.jax_private import jaxprs_in_params
from resnest_jax.losses.objective import create_loss
from resnest_jax.losses.pixels import order_statistic
from resnest_jax.models.layers import resize
from resnest_jax.sharding import batch_sharding, replicated

pytestmark = pytest.mark.usefixtures('float64')

ROW = 'configs/ade20k_pspnet.py'
WEIGHTS = (0.5, 2.0, 0.0, 1.5)


# A term's options as a configuration has them, in the order of the twin.
OPTIONS = {
  'cross_entropy': ('avg_non_ignore', 'class_weights', 'label_smoothing'),
  'ohem': ('threshold', 'min_kept'),
  'focal': ('gamma', 'alpha', 'activation'),
  'dice': (),
  'lovasz': ('per_image',),
}
# Name -> the term and its options.
LOSSES = {
  'over all pixels': ('cross_entropy', False),
  'over valid pixels': ('cross_entropy', True),
  'weights over all': ('cross_entropy', False, WEIGHTS),
  'weights over valid': ('cross_entropy', True, WEIGHTS),
  'smoothing and weights': ('cross_entropy', True, WEIGHTS, 0.3),
  'ohem, below a threshold': ('ohem', 0.3, 10),
  'ohem, at least so many': ('ohem', 0.001, 60),
  'ohem, fewer than wanted': ('ohem', 0.1, 100_000),
  'ohem, the largest': ('ohem', None, 60),
  'sigmoid focal': ('focal', 2.0, 0.25, 'sigmoid'),
  'softmax focal': ('focal', 1.5, 0.5, 'softmax'),
  'dice': ('dice',),
  'lovasz of the batch': ('lovasz', False),
  'lovasz of images': ('lovasz', True),
  'a sum of terms': ('sum',),
}
SUM = {'cross_entropy': 2.0, 'dice': 0.25, 'lovasz': 0.5}


EVERY = pytest.mark.parametrize('name', LOSSES)


def twin(name, logits, labels, at):
  """`at`: the logits by which pixels are chosen."""
  term, *options = LOSSES[name]
  if term == 'ohem':
    options.append(at)
  return sum(
    weight * getattr(twins, each)(logits, labels, *options)
    for each, weight in (SUM if term == 'sum' else {term: 1.0}).items()
  )


def make_loss(name):
  term, *values = LOSSES[name]
  terms = SUM if term == 'sum' else {'cross_entropy': 0.0} | {term: 1.0}
  prefix = '' if term == 'cross_entropy' else f'{term}_'
  options = {f'terms.{key}': weight for key, weight in terms.items()}
  names = [prefix + key for key in OPTIONS.get(term, ())]
  options |= zip(names, values, strict=False)
  options = {f'loss.{key}': value for key, value in options.items()}
  return create_loss(load_config(ROW, options).loss, 4)


def value_and_gradient(name, logits, labels):
  """Also the accuracy and the values of the terms."""
  loss = make_loss(name)
  gradient = jax.grad(lambda x: loss(x, labels)[0])(logits)
  value, *more = loss(logits, labels)
  return value, gradient, *more


def batch(kind):
  """Logits (4, 4, 3, 4), labels (4, 18, 9), of which some are ignored."""
  rng = np.random.default_rng(0)
  logits = 2 * rng.standard_normal((4, 4, 3, 4))
  labels = rng.integers(0, 4, (4, 18, 9))
  if kind == 'one class':
    labels[:] = 1
  labels[rng.random(labels.shape) < 0.2] = twins.IGNORE
  labels[0, :7] = twins.IGNORE  # All that the first row of logits reaches.
  labels[1][labels[1] == 3] = 0  # A class that is not in every image.
  labels[3] = twins.IGNORE
  if kind == 'no label':
    labels[:] = twins.IGNORE
  return logits, labels


@functools.cache
def on(devices):
  """Function of logits and labels: all losses, on one device or four."""
  mesh = mesh_of(devices)
  whole, split = replicated(mesh), batch_sharding(mesh)
  function = jax.jit(
    lambda *x: {name: value_and_gradient(name, *x) for name in LOSSES},
    in_shardings=(split, split),
    out_shardings={name: (whole, split, whole, whole) for name in LOSSES},
  )
  return function.lower(*batch('mixed')).compile(QUICK)


@functools.cache
def results(kind='mixed', devices=1):
  return jax.device_get(on(devices)(*batch(kind)))


def slope(name, logits, labels, change):
  """How much the twin's loss grows, to first order."""
  ends = [twin(name, logits + s * change, labels, logits) for s in (1, -1)]
  return (ends[0] - ends[1]) / 2


@EVERY
@pytest.mark.parametrize('kind', ['mixed', 'one class'])
def test_value_and_gradient_are_the_twins(name, kind):
  logits, labels = batch(kind)
  value, gradient, *_ = results(kind)[name]
  rel = 1e-13 if name.startswith('over') else 1e-12
  assert value == pytest.approx(twin(name, logits, labels, logits), rel=rel)
  step = 1e-5
  expected = [
    slope(name, logits, labels, step * change.reshape(logits.shape)) / step
    for change in np.eye(logits.size)
  ]
  assert relative_error(gradient.ravel(), expected) < 1e-7


@EVERY
def test_ignored_pixels_have_no_gradient(name):
  gradient = results()[name][1]
  assert not gradient[3].any()
  assert not gradient[0, 0].any()
  assert gradient[0, 1].any()


@EVERY
def test_batch_without_labels_costs_nothing(name):
  value, gradient, accuracy, _ = results('no label')[name]
  assert (value, accuracy) == (0, 0)
  assert not np.any(gradient)


def test_equal_logits():
  logits, labels = np.zeros((4, 4, 3, 4)), batch('mixed')[1]
  for name, (value, gradient, *_) in on(1)(logits, labels).items():
    # Of equal losses it keeps all, not so many as a sort happens to put first.
    same = 'over all pixels' if name == 'ohem, the largest' else name
    expected = twin(same, logits, labels, logits)
    assert value == pytest.approx(expected, rel=1e-12), name
    assert np.isfinite(gradient).all(), name


def test_logits_far_apart_stay_finite():
  logits, labels = batch('mixed')
  for name, (value, gradient, *_) in on(1)(1e4 * logits, labels).items():
    assert 0 < value < 1e5, name
    assert np.isfinite(gradient).all(), name
  logits = np.tile([1e4, 0, 0, 0], (4, 4, 3, 1))
  value, gradient, *_ = on(1)(logits, np.ones_like(labels))['over all pixels']
  assert value == pytest.approx(1e4)
  assert np.isfinite(gradient).all()


def test_accuracy_is_that_of_the_largest_logit():
  z, y, _ = twins.valid_pixels(*batch('mixed'))
  right = (z.argmax(-1) == y).mean()
  for _, _, accuracy, _ in results().values():
    assert accuracy == pytest.approx(right, rel=1e-13)


def test_terms_are_told_before_their_weights():
  names = 'over all pixels', 'dice', 'lovasz of the batch'
  expected = [results()[name][0] for name in names]
  terms = results()['a sum of terms'][3]
  np.testing.assert_allclose([terms[x] for x in SUM], expected, rtol=1e-12)


@EVERY
def test_four_devices_do_what_one_does(name):
  """The images differ in their number of valid pixels; one has none."""
  value, gradient, *_ = results()[name]
  split_value, split_gradient, *_ = results(devices=4)[name]
  assert split_value == pytest.approx(value, rel=1e-10)
  assert relative_error(split_gradient, gradient) < 1e-10


def test_lovasz_of_images_keeps_pixels_on_their_device():
  split = batch_sharding(mesh_of(4))
  loss = make_loss('lovasz of images')
  function = jax.jit(
    jax.grad(lambda *x: loss(*x)[0]),
    in_shardings=(split, split),
    out_shardings=split,
  )
  assert_local(function.lower(*batch('mixed')).compile(QUICK))


def array_sizes(jaxpr):
  """Sizes of all arrays that a traced function makes, inner ones too."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from array_sizes(inner)


@EVERY
def test_upsampled_logits_never_exist(name):
  """Nothing is larger than a map of one value a pixel."""
  logits = jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.float32)
  labels = jax.ShapeDtypeStruct((2, 128, 128), jnp.int32)
  loss = make_loss(name)
  gradient = jax.make_jaxpr(jax.grad(lambda *x: loss(*x)[0]))(logits, labels)
  assert max(array_sizes(gradient.jaxpr)) == labels.size


@pytest.mark.parametrize('shape', [(50, 67), (3, 4), (2, 9)])
def test_sizes_that_are_no_multiple(shape):
  """The last tile is not full; labels may be smaller than the logits."""
  rng = np.random.default_rng(1)
  logits = 3 * rng.standard_normal((2, 3, 4, 4))
  labels = rng.integers(0, 4, (2, *shape))
  name = 'over all pixels'
  evaluate = jax.jit(value_and_gradient, static_argnums=0)
  value, gradient, accuracy, _ = evaluate(name, logits, labels)
  assert relative_error(value, twin(name, logits, labels, logits)) < 1e-12
  z, y, _ = twins.valid_pixels(logits, labels)
  assert accuracy == pytest.approx((z.argmax(-1) == y).mean(), abs=1e-12)
  bump = 1e-4 * rng.standard_normal(logits.shape)
  expected = slope(name, logits, labels, bump)
  assert (gradient * bump).sum() == pytest.approx(expected, rel=1e-6)


def test_gradient_of_the_plain_form():
  """In tiles as in one piece, for values and gradients."""
  logits, labels = batch('mixed')

  def plain(logits):
    z = resize(jnp.asarray(logits), labels.shape[1:])
    chosen = jax.nn.one_hot(labels, z.shape[-1])
    losses = -jnp.sum(chosen * jax.nn.log_softmax(z), -1)
    return jnp.sum(jnp.where(labels == twins.IGNORE, 0, losses)) / labels.size

  value, gradient, *_ = results()['over all pixels']
  expected, expected_gradient = jax.value_and_grad(plain)(logits)
  assert relative_error(value, float(expected)) < 1e-12
  assert relative_error(gradient, expected_gradient) < 1e-12


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_order_statistic_is_that_of_a_sort(dtype):
  rng = np.random.default_rng(3)
  values = rng.random(200).astype(dtype) ** 8
  values[:20] = rng.choice([0, 1, 1e-40, 0.5, -0.0], 20)
  valid = rng.random(200) < 0.7
  expected = np.sort(values[valid])
  for rank in (0, 1, 70, len(expected) - 1):
    found = jax.jit(order_statistic)(values, valid, rank)
    assert found == expected[rank]


def test_class_weights_of_another_number_are_refused():
  config = load_config(ROW, {'loss.class_weights': '1,2,0.5'})
  with pytest.raises(UserError, match='has 3 numbers, and there are 150'):
    create_loss(config.loss, 150)
