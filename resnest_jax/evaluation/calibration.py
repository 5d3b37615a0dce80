"""How sure a network may be: a temperature for its logits, and its error.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017: logits are
divided by the number that gives the labels the least negative log likelihood
(NLL). The expected calibration error (ECE) is the mean distance between the
probability of the winning class and how often it is right, over bins of that.

Two passes over a split keep no logits. The first one sums derivatives of the
NLL at fixed temperatures, the second one bins at the temperature they give.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import CubicHermiteSpline

from resnest_jax.errors import UserError
from resnest_jax.evaluation.evaluate import Evaluator
from resnest_jax.evaluation.metrics import ratio
from resnest_jax.evaluation.results import numbers
from resnest_jax.files import check_writable
from resnest_jax.inference.label_maps import Measure
from resnest_jax.inference.protocols import CenterCrop, Protocol
from resnest_jax.weights.temperature import Place

# 1 / T, by which the NLL is convex: its derivative, which has a single zero, is
# close to a cubic from one to the next, and T off by less than 0.1 %.
INVERSES = 2.0 ** np.arange(-4, 4.5, 0.5)
BINS = 15  # As in the paper, of equal width.


def check(protocol: Protocol | CenterCrop, place: Place) -> None:
  """Raises `UserError` where nothing can be fitted, or kept."""
  if not protocol.has_logits:
    raise UserError(
      f'--calibrate divides logits, and {protocol.name!r} decides by means of '
      'probabilities. Add --config.eval.protocol=whole, or slide.'
    )
  check_writable(place.file.parent, 'leave --calibrate out')


def slopes(scores: jax.Array, _, label: jax.Array):
  """Measures two derivatives of the NLL, (B, rows, INVERSES, 2)."""
  below, own, labelled = _compared(scores, label)

  def at(inverse):
    weights = jax.nn.softmax(inverse * below, 2)
    mean = (weights * below).sum(2)
    variance = (weights * below**2).sum(2) - mean**2
    found = jnp.stack([mean - own, variance], -1)
    return jnp.where(labelled[..., None], found, 0).sum(2)

  # One by one: each takes the memory of a tile's scores.
  return jnp.moveaxis(jax.lax.map(at, INVERSES.astype(scores.dtype)), 0, 2)


def _compared(scores, label):
  """Logits less the largest one, the label's own, and where there is one."""
  below = scores - scores.max(2, keepdims=True)
  classes = jnp.arange(scores.shape[2])
  is_own = label[:, :, None] == classes[:, None]
  return below, jnp.where(is_own, below, 0).sum(2), label < len(classes)


def fit(sums: np.ndarray) -> float:
  """The temperature of the least NLL, 1 / 16 to 16, by the sums of `slopes`."""
  if not np.any(sums):
    raise UserError(
      'nothing in this split has a label to fit a temperature to. Give another '
      '--split, or leave --calibrate out.'
    )
  slope, curvature = sums.T
  if slope[0] >= 0 or slope[-1] <= 0:  # It grows with 1 / T.
    return float(1 / INVERSES[-1 if slope[0] < 0 else 0])
  # By log(1 / T), whose derivative is 1 / T.
  curve = CubicHermiteSpline(np.log(INVERSES), slope, INVERSES * curvature)
  return float(np.exp(-curve.roots(extrapolate=False)[0]))


def reliability(temperature: float) -> Measure:
  """Measures bins of the winning class's probability at 1 and a temperature.

  Of a row (B, rows, 2, BINS, 4): numbers of labelled pixels, sums of that
  probability, numbers of those that are right, and sums of the NLL.
  """

  def measure(scores, classes, label):
    below, own, labelled = _compared(scores, label)

    def at(inverse):
      total = jnp.exp(inverse * below).sum(2)
      sure, loss = 1 / total, jnp.log(total) - inverse * own
      place = jnp.clip(jnp.ceil(sure * BINS) - 1, 0, BINS - 1)
      place = jnp.where(labelled, place, BINS)[:, :, None]
      inside = place == jnp.arange(BINS)[:, None]  # (B, rows, BINS, columns)
      values = jnp.ones_like(sure), sure, classes == label, loss
      sums = [jnp.where(inside, x[:, :, None], 0).sum(-1) for x in values]
      return jnp.stack(sums, -1)

    return jnp.stack([at(1 / t) for t in (1.0, temperature)], 2)

  return measure


def calibrated(
  sums: np.ndarray, make: Callable[..., Evaluator], variables: Any
) -> dict[str, Any]:
  """`calibration` of metrics.json; makes an evaluator for the second pass."""
  temperature = fit(sums)
  second = make(measure=reliability(temperature))(variables)
  before, after = map(_errors, second.measured)
  return {'temperature': temperature, 'before': before, 'after': after}


def _errors(bins: np.ndarray) -> dict[str, Any]:
  count, sure, right, loss = bins.T
  shares = zip(count, ratio(sure, count), ratio(right, count), strict=True)
  return {
    'ECE': float(np.abs(sure - right).sum() / count.sum()),
    'NLL': float(loss.sum() / count.sum()),
    'bins': [
      {'count': int(n), **numbers({'confidence': p, 'accuracy': q})}
      for n, p, q in shares
    ],
  }
