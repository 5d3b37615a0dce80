"""Checks that an export passes before it gets its name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from resnest_jax.data.preprocess import Normalization
from resnest_jax.data.resize import resize_image
from resnest_jax.errors import UserError
from resnest_jax.export.program import SIZES, make_program
from resnest_jax.inference.protocols import Protocol
from resnest_jax.inference.steps import make_predict_step
from resnest_jax.labels import IGNORE, LabelSet
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

# Inputs and outputs are as of `make_program`.
Runner = Callable[..., Sequence[np.ndarray]]
# Of batches, the outputs that were found and those that are expected.
Pairs = Iterable[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]]


class Model(NamedTuple):
  """A network in float32, as all exports are."""

  model: nn.Module
  variables: Mapping[str, Any]
  labels: LabelSet | None  # None: of `Features`
  normalization: Normalization
  temperature: float = 1.0  # Of probabilities.


class Reference:
  """The checkpoint's outputs for `inputs`, arrays (n, ...) by their names."""

  def __init__(
    self,
    net: Model,
    pictures: Sequence[np.ndarray],
    size: tuple[int, int],
    probabilities: bool = False,
    canvas: bool = False,
    free: bool = False,
  ):
    """Takes the pictures stretched to `size` (height, width).

    On a `canvas` they are only made smaller, and only if they do not fit; a
    `free` one has this size for the comparison alone. `probabilities`: whether
    those of a segmentor are compared as well.
    """
    self.net, self.size = net, size
    self.canvas, self.free = canvas, free
    self.probabilities = probabilities
    if canvas:
      self.inputs = on_canvas(pictures, size)
    else:
      self.inputs = {
        'images': np.stack([resize_image(x, size) for x in pictures])
      }
    self.number = len(pictures)
    run = self.run_of(net, probabilities)
    if isinstance(net.model, Features | Classifier):
      self.expected = lambda part: run(*self.part(part))
      features = isinstance(net.model, Features)
      self._measure = compare_features if features else compare_classes
    else:  # Kept for all formats.
      outputs = run(*self.inputs.values())
      self.expected = lambda part: [x[part] for x in outputs]
      self._measure = compare_labels

  def part(self, part: slice) -> list[np.ndarray]:
    """The inputs of some of the pictures."""
    return [x[part] for x in self.inputs.values()]

  def run_of(self, net: Model, probabilities: bool = False) -> Runner:
    """Runs a model, of another file, say, for inputs like these."""
    more = {'temperature': net.temperature}
    if isinstance(net.model, Features | Classifier):
      more['normalization'] = net.normalization
      return jax.jit(make_program(*net[:2], self.size, **more))
    # What `predict` does with a picture that it has not resized.
    more['protocol'] = Protocol(normalization=net.normalization)
    step = make_predict_step(net.model, len(net.labels.classes), **more)
    variables = jax.device_put(dict(net.variables))

    def run(images: np.ndarray, *sizes: np.ndarray) -> list[np.ndarray]:
      sizes = sizes or [np.full(len(images), x, np.int32) for x in self.size]
      size, outputs = np.stack(sizes, 1), []
      for i in range(len(images)):  # One by one: some are large.
        one = {'image': images[i : i + 1], 'size': size[i : i + 1]}
        one |= {'label': one['image'][..., 0], 'label_size': one['size']}
        labels, *more = step(variables, one, probabilities)
        inside = (labels != IGNORE)[..., None]
        outputs.append([labels, *(x * inside for x in more if x is not None)])
      return [np.concatenate(x) for x in zip(*outputs, strict=True)]

    return run

  def compare(self, name: str, run: Runner) -> float:
    """How far an export agrees, 0 to 1; see `compare_labels` and the others."""
    starts = range(0, self.number, BATCH_SIZE)
    parts = [slice(start, start + BATCH_SIZE) for start in starts]
    pairs = ((run(*self.part(x)), self.expected(x)) for x in parts)
    return self._measure(name, pairs)


def on_canvas(
  pictures: Sequence[np.ndarray], canvas: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Pictures and their true sizes as `make_program` takes them."""
  shape = len(pictures), *canvas, pictures[0].shape[-1]
  images, sizes = np.zeros(shape, pictures[0].dtype), []
  for image, picture in zip(images, pictures, strict=True):
    size = picture.shape[:2]
    if (ratio := min(np.divide(canvas, size))) < 1:
      size = tuple(max(int(length * ratio), 1) for length in size)
      picture = resize_image(picture, size)
    image[: size[0], : size[1]] = picture
    sizes.append(size)
  sizes = np.array(sizes, np.int32).T
  return {'images': images, **dict(zip(SIZES, sizes, strict=True))}


def compare_labels(name: str, pairs: Pairs) -> float:
  """The share of pixels of the same class, besides the padding of both.

  Raises `UserError` if it is below `MIN_AGREEMENT`, or a probability is off by
  more than `MAX_DEVIATION`.
  """
  same, most, number = [], 0.0, 0
  for (labels, *more), (expected, *probabilities) in pairs:
    seen = np.minimum(labels, expected) != IGNORE
    same.append((np.asarray(labels) == expected)[seen])
    number += len(labels)
    if more:
      most = max(most, _largest(more[0] - probabilities[0]))
  same = np.concatenate(same)
  share = float(same.mean())
  if share < MIN_AGREEMENT or most > MAX_DEVIATION:
    off = f', and probabilities differ by up to {most:.3f}' if most else ''
    raise _disagreement(
      f'{name} gives {share:.3%} of the pixels of {number} pictures the '
      f"checkpoint's class{off}; {MIN_AGREEMENT:.1%} must agree"
    )
  return share


def compare_features(name: str, pairs: Pairs) -> float:
  """1 less the largest difference, over its level's largest value.

  Raises `UserError` if that is below `MIN_AGREEMENT`.
  """
  most = max(
    _largest((found - expected) / np.abs(expected).max())
    for levels in pairs
    for found, expected in zip(*levels, strict=True)
  )
  if most > 1 - MIN_AGREEMENT:
    raise _disagreement(
      f'the features of {name} differ from the checkpoint by {most:.1e} of '
      f'the largest; {1 - MIN_AGREEMENT:.0e} is accepted'
    )
  return 1 - most


def compare_classes(name: str, pairs: Pairs) -> float:
  """1, the share of pictures of the same class.

  Raises `UserError` if it is less, or a probability is off by more than
  `MAX_CLASS_DEVIATION`.
  """
  pairs = [(x, y) for (x,), (y,) in pairs]
  found, expected = map(np.concatenate, zip(*pairs, strict=True))
  same = found.argmax(1) == expected.argmax(1)
  most = _largest(found - expected)
  if not same.all() or most > MAX_CLASS_DEVIATION:
    raise _disagreement(
      f'{name} gives {same.mean():.1%} of {len(same)} pictures the '
      f"checkpoint's class, and probabilities differ by up to {most:.1e}; all "
      f'must agree, to {MAX_CLASS_DEVIATION:.0e}'
    )
  return 1.0


def _largest(difference: np.ndarray) -> float:
  # max() and > would let NaN pass.
  return float(np.nan_to_num(np.abs(difference).max(), nan=1.0))


def _disagreement(what: str) -> UserError:
  return UserError(
    f'{what}. Nothing was written. Please report it with the versions of your '
    'packages (pip list), and export without this format by --formats.'
  )


def check_same_bits(
  name: str, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
  """Raises `UserError` if two trees of variables differ in any bit."""

  # Bytes rather than values: -0.0 equals 0.0, and NaN does not equal itself.
  def bits(tree: Mapping[str, Any]) -> set[tuple]:
    leaves = {'/'.join(k): np.asarray(v) for k, v in flatten_dict(tree).items()}
    return {(k, v.dtype, v.shape, v.tobytes()) for k, v in leaves.items()}

  differing = {name for name, *_ in bits(found) ^ bits(expected)}
  if differing:
    raise UserError(
      f'{name} does not give back what was written: {len(differing)} tensors '
      f'differ ({listed(sorted(differing))}). Nothing was kept; see whether '
      'the storage is in order.'
    )
