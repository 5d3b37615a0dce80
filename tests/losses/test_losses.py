"""Every loss against a twin in PyTorch, on one device and on four."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from collectives import assert_gradients_local, mesh_of
from golden import reference
from golden.reference import assert_close, quick_jit, random, relative_error
from losses import twins

from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.losses.objective import create_loss
from resnest_jax.losses.pixels import order_statistic
from resnest_jax.models import implementations
from resnest_jax.models.layers import resize
from resnest_jax.sharding import batch_sharding

pytestmark = pytest.mark.usefixtures('float64')

ROW = 'configs/ade20k_pspnet.py'
WEIGHTS = (0.5, 2.0, 0.0, 1.5)
# A term's options as a configuration has them, in the order of the twin.
OPTIONS = {
  'cross_entropy': ('avg_non_ignore', 'class_weights', 'label_smoothing'),
  'ohem': ('ohem_threshold', 'ohem_min_kept'),
  'focal': ('focal_gamma', 'focal_alpha', 'focal_activation'),
  'lovasz': ('lovasz_per_image',),
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


def twin(name, logits, labels):
  term, *options = LOSSES[name]
  logits = torch.tensor(logits, requires_grad=True)
  value = sum(
    weight * getattr(twins, each)(logits, labels, *options)
    for each, weight in (SUM if term == 'sum' else {term: 1.0}).items()
  )
  return value.item(), torch.autograd.grad(value, logits)[0].numpy()


def make_loss(name, align_corners=False):
  term, *values = LOSSES[name]
  terms = SUM if term == 'sum' else {'cross_entropy': 0.0, term: 1.0}
  options = {f'terms.{key}': weight for key, weight in terms.items()}
  options |= zip(OPTIONS.get(term, ()), values, strict=False)
  options = {f'loss.{key}': value for key, value in options.items()}
  return create_loss(load_config(ROW, options).loss, 4, align_corners)


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
  return quick_jit(
    lambda *x: {name: value_and_gradient(name, *x) for name in LOSSES},
    in_shardings=batch_sharding(mesh_of(devices)),
  )


@functools.cache
def results(kind='mixed', devices=1):
  return jax.device_get(on(devices)(*batch(kind)))


@EVERY
@pytest.mark.parametrize('kind', ['mixed', 'one class'])
def test_value_and_gradient_are_the_twins(name, kind):
  value, gradient, *_ = results(kind)[name]
  expected, slope = twin(name, *batch(kind))
  rel = 1e-13 if name.startswith('over') else 1e-12
  assert value == pytest.approx(expected, rel=rel)
  assert relative_error(gradient, slope) < 1e-12
  # Exactly none at ignored pixels, of which the second row sees others.
  rows = [row.any() for row in (*gradient[0, :2], gradient[3])]
  assert rows == [False, True, False]


def test_corners_may_be_aligned():
  """As of logits that were upsampled before."""
  logits, labels = batch('mixed')

  def both(x):
    for name in LOSSES:
      yield make_loss(name, True)(x, labels)[0]
      whole = resize(x, labels.shape[1:], align_corners=True)
      yield make_loss(name)(whole, labels)[0]

  def values(x):
    return jnp.stack([*both(x)])

  value, slope = (
    quick_jit(values)(logits),
    quick_jit(jax.jacrev(values))(logits),
  )
  np.testing.assert_allclose(value[::2], value[1::2], rtol=1e-12)
  assert_close([*slope[::2]], [*slope[1::2]], 1e-12)
  others = np.array([results()[name][0] for name in LOSSES])
  assert (np.abs(value[::2] / others - 1) > 1e-4).all()


def test_rows_are_products_or_sums():
  logits, labels = batch('mixed')
  name = next(iter(LOSSES))
  found, dots = [], []
  for rows in ('product', 'sums'):
    with implementations.use(rows=rows):
      found.append(value_and_gradient(name, logits, labels)[:2])
      step = functools.partial(value_and_gradient, name)
      dots.append(
        str(jax.make_jaxpr(step)(logits, labels)).count('dot_general')
      )
  (value, gradient), (other, slope) = found
  assert float(other) == pytest.approx(float(value), rel=1e-14)
  assert relative_error(slope, gradient) < 1e-14
  assert dots[0] > dots[1] > 0


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
    expected = pytest.approx(twin(same, logits, labels)[0], rel=1e-12)
    assert value == expected, name
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
  right = twins.accuracy(*batch('mixed'))
  for _, _, accuracy, _ in results().values():
    assert accuracy == pytest.approx(right, rel=1e-13)


def test_terms_are_told_before_their_weights():
  names = 'over all pixels', 'dice', 'lovasz of the batch'
  expected = [results()[name][0] for name in names]
  terms = results()['a sum of terms'][3]
  np.testing.assert_allclose([terms[x] for x in SUM], expected, rtol=1e-12)


def test_four_devices_do_what_one_does():
  """The images differ in their number of valid pixels; one has none."""
  assert_close(results(devices=4), results(), 1e-10)


def test_lovasz_of_images_keeps_pixels_on_their_device():
  loss, (logits, labels) = make_loss('lovasz of images'), batch('mixed')
  assert_gradients_local(lambda v, x: loss(v * x, labels), 1.0, logits)


@EVERY
def test_upsampled_logits_never_exist(name):
  """Nothing is larger than a map of one value a pixel."""
  logits = reference.struct(2, 16, 16, 4)
  labels = reference.struct(2, 128, 128, dtype=jnp.int32)
  loss = make_loss(name)
  program = jax.make_jaxpr(jax.grad(lambda *x: loss(*x)[0]))(logits, labels)
  made = [
    x for each in reference.equations(program.jaxpr) for x in each.outvars
  ]
  assert max(x.aval.size for x in made) == labels.size


@pytest.mark.parametrize('shape', [(50, 67), (3, 4), (2, 9)])
def test_sizes_that_are_no_multiple(shape):
  """The last tile is not full; labels may be smaller than the logits."""
  logits = 3 * random(2, 3, 4, 4, seed=1)
  labels = np.random.default_rng(1).integers(0, 4, (2, *shape))
  evaluate = jax.jit(value_and_gradient, static_argnums=0)
  *ours, accuracy, _ = evaluate('over all pixels', logits, labels)
  assert_close(tuple(ours), twin('over all pixels', logits, labels), 1e-12)
  assert accuracy == pytest.approx(twins.accuracy(logits, labels), abs=1e-12)


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


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ('1,2,0.5', r'is \(1, 2, 0.5\), and there are 150'),
    ('inverse_sqrt', "is 'inverse_sqrt', and there are 150"),
  ],
)
def test_class_weights_of_another_number_are_refused(given, told):
  config = load_config(ROW, {'loss.class_weights': given})
  with pytest.raises(UserError, match=told):
    create_loss(config.loss, 150)
