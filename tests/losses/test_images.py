"""The loss of classifiers and their mixed targets, against the authors'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import reference

from resnest_jax.losses.images import image_loss
from resnest_jax.training.mixing import Mixing, mix

pytestmark = pytest.mark.usefixtures('float64')

GOLDEN = reference.load('imagenet_loss')


def mixed(x, weight, case):
  """With any partner, as PyTorch-Encoding."""
  return weight * x + (1 - weight) * x[GOLDEN[f'perm{case}']]


@pytest.mark.parametrize('case', ['0', '1'])
def test_loss_and_gradient_are_theirs(case):
  logits, labels, weight, smoothing = (
    GOLDEN[f'{name}{case}'] for name in ('logits', 'labels', 'lam', 'eta')
  )
  hard = np.eye(logits.shape[1])[labels]
  targets = {
    '': mixed(hard, weight, case),
    'smoothing_': hard,
    # GluonCV's partners: the batch from its end.
    'gluon_': mix(hard, jnp.array([weight])),
  }
  assert reference.relative_error(
    targets[''], GOLDEN[f'mixed_targets{case}']
  ) < (1e-12 if case == '0' else 1e-7)  # The second one is of float32.
  for name, target in targets.items():
    loss, gradient = jax.value_and_grad(
      lambda x, target=target: image_loss(x, target, float(smoothing))[0]
    )(logits)
    np.testing.assert_allclose(loss, GOLDEN[f'{name}loss{case}'], rtol=1e-12)
    theirs = GOLDEN[f'{name}grad{case}']
    assert reference.relative_error(gradient, theirs) < 1e-12


def test_accuracy_is_the_share_of_the_best_class():
  logits = jnp.log(jnp.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]))
  targets = jnp.array([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]])
  loss, accuracy, _ = image_loss(logits, targets)
  assert accuracy == pytest.approx(0.375)
  expected = -(0.75 * np.log(0.6) + 0.25 * np.log(0.3) + np.log(0.2)) / 2
  assert loss == pytest.approx(expected, rel=1e-12)
  half = image_loss(logits.astype(jnp.bfloat16), targets)[0]
  assert half.dtype == jnp.float32


def test_groups_are_mixed_from_both_ends():
  x = np.arange(6.0)[:, None]
  ours = mix(x, jnp.array([0.25, 0.5]))[:, 0]
  np.testing.assert_allclose(ours, [1.5, 1.0, 0.5, 4.0, 4.0, 4.0])


def test_weights_have_the_beta_distribution():
  """By Kolmogorov and Smirnov's test; another for each group and key."""
  from scipy import stats

  mixing, count = Mixing(2, 0.2, 2), 50_000
  images = jnp.tile(jnp.array([1.0, 0.0]), count)
  labels = jnp.tile(jnp.array([1, 0]), count)
  drawn, targets = mixing(images, labels, jax.random.key(5))
  np.testing.assert_array_equal(targets[:, 1], drawn)
  weights = np.asarray(drawn[::2])
  assert stats.kstest(weights, 'beta', args=(0.2, 0.2)).pvalue > 0.001
  neighbours = np.corrcoef(weights[:-1], weights[1:])[0, 1]
  assert abs(neighbours) < 4 / np.sqrt(count)
  whole = Mixing(2, 0.2, 0)(images, labels, jax.random.key(6))[0]
  assert len(np.unique(whole)) == 2
  same, hard = Mixing(2, 0.0, 2)(images, labels, jax.random.key(5))
  np.testing.assert_array_equal(same, images)
  np.testing.assert_array_equal(hard[:, 1], labels)
