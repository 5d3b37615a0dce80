"""Checks that an export passes before it gets its name."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from resnest_jax.data.preprocess import Normalization
from resnest_jax.errors import UserError
from resnest_jax.export.pictures import fit
from resnest_jax.export.program import make_program
from resnest_jax.inference.predictor import Prediction, Predictor
from resnest_jax.inference.protocols import Protocol
from resnest_jax.labels import LabelSet
from resnest_jax.models.classifier import Classifier
from resnest_jax.models.features import Features
from resnest_jax.text import listed

# Of the pixels: compilers round differently, which flips classes at borders.
MIN_AGREEMENT = 0.999
MAX_DEVIATION = 0.01  # Of a probability of a pixel,
MAX_CLASS_DEVIATION = 1e-4  # and of a picture.
# Divides `pictures.NUMBER`: a program is compiled for one batch size.
BATCH_SIZE = 4
# The version that the tests use. It is installed without its dependencies,
# because it forbids our orbax-checkpoint, from which it imports nothing.
JAX2ONNX = '0.17.1'
INSTALL_JAX2ONNX = f'pip install --no-deps jax2onnx=={JAX2ONNX}'

# uint8 (b, H, W, 3) -> (labels,) or (labels, probabilities).
Runner = Callable[[np.ndarray], Sequence[np.ndarray]]


class Model(NamedTuple):
  """A network in float32, as all exports are."""

  model: nn.Module
  variables: Mapping[str, Any]
  labels: LabelSet | None  # None: of `Features`
  normalization: Normalization


class Reference:
  """The checkpoint's `predictions` for `images`, uint8 (n, H, W, 3)."""

  def __init__(
    self,
    net: Model,
    pictures: Sequence[np.ndarray],
    size: tuple[int, int],
    probabilities: bool = False,
  ):
    """Predicts the pictures, stretched to `size` (height, width)."""
    self.images = np.stack([fit(picture, size) for picture in pictures])
    # Exports do not resize. With this scale the predictor does not either.
    self._protocol = Protocol(image_scale=(max(size), min(size)))
    found = self._predictor(net).predict_frames(
      self.images, probabilities=probabilities
    )
    self.predictions: list[Prediction] = list(found)

  def _predictor(self, net: Model) -> Predictor:
    *network, normalization = net
    protocol = dataclasses.replace(self._protocol, normalization=normalization)
    return Predictor(*network, protocol)

  def compare(self, name: str, run: Runner) -> float:
    """Returns the share of pixels to which an export gives the same class.

    Raises:
      UserError: the share is below `MIN_AGREEMENT`, or a probability is off by
        more than `MAX_DEVIATION`.
    """
    agreeing, deviation = 0, 0.0
    for start in range(0, len(self.images), BATCH_SIZE):
      part = slice(start, start + BATCH_SIZE)
      labels, *more = map(np.asarray, run(self.images[part]))
      for slot, expected in enumerate(self.predictions[part]):
        agreeing += np.count_nonzero(labels[slot] == expected.labels)
        if more:
          off = np.abs(more[0][slot] - expected.probabilities).max()
          # max() and > would let NaN pass.
          deviation = max(deviation, float(np.nan_to_num(off, nan=1.0)))
    share = agreeing / self.images[..., 0].size
    if share < MIN_AGREEMENT or deviation > MAX_DEVIATION:
      off = f', and probabilities differ by up to {deviation:.3f}'
      raise UserError(
        f'{name} gives {share:.3%} of the pixels of {len(self.images)} '
        f"pictures the checkpoint's class{off if deviation else ''}; "
        f'{MIN_AGREEMENT:.1%} must agree. Nothing was written. Please report '
        'it with the versions of your packages (pip list), and export without '
        'this format by --formats.'
      )
    return share

  def run_of(self, net: Model) -> Runner:
    """Runs another model by the `Predictor`, for pictures of this size."""
    predictor = self._predictor(net)

    def run(images: np.ndarray) -> list[np.ndarray]:
      found = predictor.predict_frames(images)
      return [np.stack([each.labels for each in found])]

    return run


class OutputReference(Reference):
  """What the checkpoint's own program gives for `images`."""

  def __init__(
    self,
    net: Model,
    pictures: Sequence[np.ndarray],
    size: tuple[int, int],
    probabilities: bool = False,
  ):
    """Takes the pictures stretched to `size`; there are no probabilities."""
    del probabilities
    self.images = np.stack([fit(picture, size) for picture in pictures])
    self._size = size
    self._expected = self.run_of(net)

  def run_of(self, net: Model) -> Runner:
    """Runs another model, for pictures of this size."""
    model, variables, _, normalization = net
    program = make_program(
      model, variables, self._size, normalization=normalization
    )
    return jax.jit(program)


class FeatureReference(OutputReference):
  """The checkpoint's features of `images`."""

  def compare(self, name: str, run: Runner) -> float:
    """Returns 1 less the largest difference, over its level's largest value.

    Raises `UserError` if that is below `MIN_AGREEMENT`.
    """
    most = 0.0
    for start in range(0, len(self.images), BATCH_SIZE):
      part = self.images[start : start + BATCH_SIZE]
      for found, expected in zip(run(part), self._expected(part), strict=True):
        off = np.abs(found - expected).max() / np.abs(expected).max()
        most = max(most, float(np.nan_to_num(off, nan=1.0)))
    if most > 1 - MIN_AGREEMENT:
      raise UserError(
        f'the features of {name} differ from the checkpoint by {most:.1e} of '
        f'the largest; {1 - MIN_AGREEMENT:.0e} is accepted. Nothing was '
        'written. Please report it with the versions of your packages (pip '
        'list), and export without this format by --formats.'
      )
    return 1 - most


class ClassReference(OutputReference):
  """The checkpoint's probabilities of `images`."""

  def compare(self, name: str, run: Runner) -> float:
    """Returns 1, the share of pictures to which an export gives the same class.

    Raises `UserError` if it is less, or a probability is off by more than
    `MAX_CLASS_DEVIATION`.
    """
    agreeing, most = 0, 0.0
    for start in range(0, len(self.images), BATCH_SIZE):
      part = self.images[start : start + BATCH_SIZE]
      (found,), (expected,) = map(np.asarray, run(part)), self._expected(part)
      agreeing += np.count_nonzero(found.argmax(1) == expected.argmax(1))
      off = np.abs(found - expected).max()
      most = max(most, float(np.nan_to_num(off, nan=1.0)))
    share = agreeing / len(self.images)
    if share < 1 or most > MAX_CLASS_DEVIATION:
      raise UserError(
        f'{name} gives {share:.1%} of {len(self.images)} pictures the '
        f"checkpoint's class, and probabilities differ by up to {most:.1e}; "
        f'all must agree, to {MAX_CLASS_DEVIATION:.0e}. Nothing was written. '
        'Please report it with the versions of your packages (pip list), and '
        'export without this format by --formats.'
      )
    return share


def reference_of(
  net: Model,
  pictures: Sequence[np.ndarray],
  size: tuple[int, int],
  probabilities: bool = False,
) -> Reference:
  """The reference for exports of a network of any task."""
  if isinstance(net.model, Features):
    return FeatureReference(net, pictures, size)
  if isinstance(net.model, Classifier):
    return ClassReference(net, pictures, size)
  return Reference(net, pictures, size, probabilities)


def check_same_bits(
  name: str, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
  """Raises `UserError` if two trees of variables differ in any bit."""

  # Bytes rather than values: -0.0 equals 0.0, and NaN does not equal itself.
  def bits(leaf: Any) -> tuple:
    return leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()

  found, expected = flatten_dict(found), flatten_dict(expected)
  differing = [
    '/'.join(path)
    for path in found.keys() | expected.keys()
    if path not in found
    or path not in expected
    or bits(found[path]) != bits(expected[path])
  ]
  if differing:
    raise UserError(
      f'{name} does not give back what was written: {len(differing)} tensors '
      f'differ ({listed(sorted(differing))}). Nothing was kept; see whether '
      'the storage is in order.'
    )
