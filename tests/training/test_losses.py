"""The loss against a slow NumPy twin in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import relative_error
from training.twins import upsample

from resnest_jax.data.labels import IGNORE
from resnest_jax.models.layers import resize
from resnest_jax.training.losses import segmentation_loss


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def twin(logits, labels):
  """Each pixel's loss (0 where ignored), and whether its class is right."""
  logits = upsample(upsample(logits, labels.shape[1], 1), labels.shape[2], 2)
  top = logits.max(-1, keepdims=True)
  log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
  losses, right = np.zeros(labels.shape), np.zeros(labels.shape, bool)
  for pixel in zip(*np.nonzero(labels != IGNORE), strict=True):
    losses[pixel] = log_sum[pixel] - logits[pixel][labels[pixel]]
    right[pixel] = logits[pixel].argmax() == labels[pixel]
  return losses, right


def example():
  """Logits (2, 3, 4, 5), labels (2, 24, 20) with a quarter ignored."""
  rng = np.random.default_rng(0)
  logits = 3 * rng.standard_normal((2, 3, 4, 5))
  labels = rng.integers(0, 5, (2, 24, 20))
  labels[rng.random(labels.shape) < 0.25] = IGNORE
  return logits, labels


def evaluate(logits, labels, avg_non_ignore):
  """Loss, accuracy, gradient."""

  def loss(logits):
    return segmentation_loss(logits, labels, avg_non_ignore=avg_non_ignore)

  (value, accuracy), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    jnp.asarray(logits)
  )
  return float(value), float(accuracy), grad


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_loss_and_accuracy_are_the_twins(avg_non_ignore):
  logits, labels = example()
  loss, accuracy, _ = evaluate(logits, labels, avg_non_ignore)
  losses, right = twin(logits, labels)
  valid = (labels != IGNORE).sum()
  count = valid if avg_non_ignore else labels.size
  assert loss == pytest.approx(losses.sum() / count, rel=1e-13)
  assert accuracy == pytest.approx(right.sum() / valid, rel=1e-13)


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_gradient_is_the_difference_quotient(avg_non_ignore):
  logits, labels = example()
  _, _, grad = evaluate(logits, labels, avg_non_ignore)
  valid = (labels != IGNORE).sum()
  count = valid if avg_non_ignore else labels.size
  expected, step = np.zeros_like(logits), 1e-5
  for index in np.ndindex(logits.shape):
    change = np.zeros_like(logits)
    change[index] = step
    ends = [twin(logits + s * change, labels)[0].sum() for s in (1, -1)]
    expected[index] = (ends[0] - ends[1]) / (2 * step * count)
  assert relative_error(grad, expected) < 1e-7


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_batch_without_labels_costs_nothing(avg_non_ignore):
  logits, labels = example()
  labels[:] = IGNORE
  loss, accuracy, grad = evaluate(logits, labels, avg_non_ignore)
  assert (loss, accuracy) == (0, 0)
  assert not np.any(grad)


def test_logits_far_apart_stay_finite():
  logits = np.zeros((1, 2, 2, 3))
  logits[..., 0] = 1e4
  labels = np.full((1, 4, 4), 1)
  loss, _, grad = evaluate(logits, labels, False)
  assert loss == pytest.approx(1e4)
  assert np.isfinite(grad).all()


@pytest.mark.parametrize('shape', [(50, 67), (3, 4), (2, 9), (7, 8)])
def test_sizes_that_are_no_multiple(shape):
  """The last tile is not full; labels may be smaller than the logits."""
  rng = np.random.default_rng(1)
  logits = 3 * rng.standard_normal((2, 3, 4, 5))
  labels = rng.integers(0, 5, (2, *shape))
  losses, right = twin(logits, labels)
  value, accuracy, grad = evaluate(logits, labels, False)
  assert relative_error(value, losses.mean()) < 1e-12
  assert accuracy == pytest.approx(right.mean(), abs=1e-12)
  bump = np.zeros_like(logits)
  bump[1, 2, 1, 3] = 1e-4
  slope = (
    twin(logits + bump, labels)[0].mean()
    - twin(logits - bump, labels)[0].mean()
  ) / 2e-4
  assert float(grad[1, 2, 1, 3]) == pytest.approx(slope, rel=1e-6)


def test_gradient_of_the_plain_form():
  """In tiles as in one piece, for values and gradients."""
  logits, labels = example()

  def plain(logits):
    z = resize(jnp.asarray(logits), labels.shape[1:])
    chosen = jax.nn.one_hot(labels, z.shape[-1])
    losses = -jnp.sum(chosen * jax.nn.log_softmax(z), -1)
    return jnp.sum(jnp.where(labels == IGNORE, 0, losses)) / labels.size

  value, _, grad = evaluate(logits, labels, False)
  expected, expected_grad = jax.value_and_grad(plain)(logits)
  assert relative_error(value, float(expected)) < 1e-12
  assert relative_error(grad, expected_grad) < 1e-12
