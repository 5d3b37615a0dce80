"""The loss that a configuration describes: a weighted sum of terms."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from resnest_jax.errors import UserError
from resnest_jax.losses.areas import dice_loss, lovasz_softmax
from resnest_jax.losses.pixels import (
  focal_loss,
  ohem_cross_entropy,
  pixel_accuracy,
  segmentation_loss,
)
from resnest_jax.losses.tiles import Logits
from resnest_jax.models.layers import Array
from resnest_jax.text import shorten

# (logits, labels) -> loss, accuracy, name -> value of each term, unweighted.
Loss = Callable[[Array, Array], tuple[Array, Array, dict[str, Array]]]


def create_loss(
  config: Mapping[str, Any], num_classes: int, align_corners: bool = False
) -> Loss:
  """Creates the loss of `config.loss`: terms whose weight is 0 are left out.

  It takes logits (B, h, w, classes) and labels int (B, H, W), and gives the
  scalar loss, the accuracy on valid pixels in [0, 1], and name -> value of the
  terms before their weights. `align_corners` is how logits become those of
  pixels. Raises `UserError` for too few class weights, or a name of some.
  """
  given = config['class_weights']
  if given is not None and (type(given) is str or len(given) != num_classes):
    raise UserError(
      f'config.loss.class_weights is {shorten(repr(given))}, and there are '
      f'{num_classes} classes; give one number for each class, in the order '
      'of the classes (train.py alone counts pixels for a name).'
    )
  average = {'avg_non_ignore': config['avg_non_ignore']}
  target = average | {'class_weights': given and tuple(given)}
  target['label_smoothing'] = config['label_smoothing']
  terms = {
    'cross_entropy': partial(segmentation_loss, **target),
    'ohem': partial(
      ohem_cross_entropy,
      threshold=config['ohem_threshold'],
      min_kept=config['ohem_min_kept'],
      **target,
    ),
    'focal': partial(
      focal_loss,
      gamma=config['focal_gamma'],
      alpha=config['focal_alpha'],
      activation=config['focal_activation'],
      **average,
    ),
    'dice': dice_loss,
    'lovasz': partial(lovasz_softmax, per_image=config['lovasz_per_image']),
  }
  weights = {
    name: config['terms'][name] for name in terms if config['terms'][name]
  }

  def loss(logits, labels):
    logits = Logits(logits, align_corners)
    values = {name: terms[name](logits, labels) for name in weights}
    if 'cross_entropy' in values:  # Its pass over the pixels gives both.
      values['cross_entropy'], accuracy = values['cross_entropy']
    else:
      accuracy = pixel_accuracy(logits, labels)
    total = sum(weights[name] * value for name, value in values.items())
    return total, accuracy, values if len(values) > 1 else {}

  return loss
