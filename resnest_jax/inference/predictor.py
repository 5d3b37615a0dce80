"""A trained network that turns pictures into label maps: docs/prediction.md.

model = resnest_jax.from_checkpoint('runs/pspnet')
prediction = model.predict('street.jpg')
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from resnest_jax import drawing, sharding
from resnest_jax.data.images import MAX_PIXELS
from resnest_jax.data.own.classes import label_set
from resnest_jax.data.pictures import as_rgb
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.inference import steps
from resnest_jax.inference.frames import batches_in_order, unlabelled
from resnest_jax.inference.protocols import (
  CenterCrop,
  Protocol,
  choose_protocol,
)
from resnest_jax.labels import IMAGENET, LabelSet, class_names
from resnest_jax.text import listed, percent, plural
from resnest_jax.weights.pretrained import Weights, load_trained

# For weights that do not say how they were trained, by their number of classes:
# ADE20K's and Cityscapes' long and short edge, and height and width, in pixels.
IMAGE_SCALES = {150: (2048, 512), 19: (2048, 1024)}
CROP_SIZES = {150: (512, 512), 19: (512, 1024)}
SHOWN = 1024
ACCELERATOR_BATCH_SIZE = 4  # A CPU is as fast one by one.
# Index, and what is found: a label map and probabilities, or these alone.
Found = tuple
# Edges of the crops on which the authors have evaluated their classifiers.
CROP_EDGES = {'resnest101': 256, 'resnest200': 320, 'resnest269': 416}
CROP_EDGE = 224  # All others'.
# By GluonCV, whose crops have another rule.
OF_GLUON = ('resnest14', 'resnest26')


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """The label map of a picture.

  Attributes:
    labels: uint8 (H, W), the class of every pixel.
    classes: C names: `classes[labels[y, x]]`.
    palette: uint8 (C, 3), RGB.
    source: the picture, an array or its path.
    probabilities: float32 (H, W, C) if requested, else None.
  """

  labels: np.ndarray
  classes: tuple[str, ...]
  palette: np.ndarray
  source: np.ndarray | str | Path
  probabilities: np.ndarray | None = None

  @property
  def image(self) -> np.ndarray:
    """The picture, uint8 (H, W, 3) RGB."""
    # Read again from a path, so that thousands of predictions fit in memory.
    # Its size was accepted when it was predicted.
    return as_rgb(self.source, max(self.labels.size, MAX_PIXELS))

  def colors(self) -> np.ndarray:
    """The label map in the classes' colours, uint8 (H, W, 3) RGB."""
    return drawing.colour(self.labels, self.palette)

  def overlay(self, opacity: float = 0.5, legend: bool = False) -> np.ndarray:
    """The picture under the classes' colours, uint8 (H, W, 3) RGB.

    `opacity` is from 0 to 1; `legend` adds a strip with the classes' names.
    """
    check_opacity(opacity)
    mixed = drawing.overlay(self.image, self.labels, self.palette, opacity)
    if not legend:
      return mixed
    height, width = self.labels.shape
    zoom = max(round(min(height, width) / 500), 1)
    drawn = [self.labels], self.classes, self.palette, width, zoom
    return np.vstack([mixed, drawing.legend(*drawn)])

  def __repr__(self) -> str:
    height, width = self.labels.shape
    found = [self.classes[k] for k in np.unique(self.labels)]
    what = f'{width}x{height} pixels, {plural(len(found), "class")}'
    return f'<Prediction: {what}: {listed(found)}>'

  def _repr_png_(self) -> bytes:
    """What a notebook shows: the overlay, at most `SHOWN` pixels long."""
    try:
      picture = self.overlay()
    except UserError:  # The file has gone since.
      picture = self.colors()
    if max(picture.shape) > SHOWN:
      picture = drawing.fit(picture, (SHOWN, SHOWN), smooth=True)
    return drawing.encoded('.png', picture)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassPrediction:
  """The class of a picture.

  Attributes:
    probabilities: float32 (C,), of all classes.
    classes: their names.
    source: the picture, an array or its path.
  """

  probabilities: np.ndarray
  classes: tuple[str, ...]
  source: np.ndarray | str | Path

  @property
  def label(self) -> int:
    """The number of the most probable class."""
    return int(self.probabilities.argmax())

  def top(self, number: int = steps.BEST) -> list[tuple[str, float]]:
    """Names and probabilities of the most probable classes, in order."""
    order = np.argsort(-self.probabilities, kind='stable')[:number]
    return [(self.classes[i], float(self.probabilities[i])) for i in order]

  def __str__(self) -> str:
    return said_of(self.top())

  def __repr__(self) -> str:
    return f'<ClassPrediction: {self}>'


def said_of(top: Sequence[tuple[str, float]]) -> str:
  """Classes and their probabilities in words: 'cat 98.0 %, dog 2.0 %'."""
  return ', '.join(f'{name} {percent(share, 1)} %' for name, share in top)


def check_opacity(opacity: float) -> None:
  if not 0 <= opacity <= 1:
    raise UserError(
      f'opacity is {opacity}; it must be from 0 (invisible) to 1.'
    )


class _Pictures:
  """A split that keeps the reasons why pictures cannot be read."""

  def __init__(
    self,
    sources: Sequence[Any],
    read: Callable[[Any], np.ndarray],
    classify: bool,
  ):
    self.sources, self._read, self._classify = sources, read, classify
    # (index, why it cannot be read), appended by the threads.
    self.unreadable: collections.deque = collections.deque()

  def __len__(self) -> int:
    return len(self.sources)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      image = self._read(self.sources[index])
      return unlabelled(image, classify=self._classify)
    except UserError as error:
      self.unreadable.append((index, error))
      raise UnreadableSample(str(error)) from error


class Predictor:
  """A network on all devices, compiled once for each padded shape.

  Attributes:
    classes, palette: C names, and uint8 (C, 3), RGB.
    protocol: how pictures are shown to the network.
    batch_size: pictures at a time, over all devices.
    max_pixels: of files; larger ones are unreadable.
    about: origin of the weights and description of the network, for JSON.
    on_compile: may be set; called with a padded height and width in pixels
      before the network is compiled for it.
    on_step: may be set; called with a batch and the seconds that the devices
      took for it, which makes them idle between batches.
  """

  _protocol: ClassVar[type] = Protocol

  def __init__(
    self,
    model: nn.Module,
    variables: Mapping[str, Any],
    labels: LabelSet,
    protocol: Protocol | CenterCrop | None = None,
    *,
    batch_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    about: Mapping[str, Any] | None = None,
  ):
    """Places the variables on the devices; nothing is compiled yet.

    Args:
      model: a `Segmentor`.
      variables: its `params` and `batch_stats`.
      labels: its classes.
      protocol: None: the whole picture, fitted into 2048 x 512 pixels.
      batch_size: rounded up to a multiple of the devices; None: one on each
        CPU device, four on each accelerator.
      max_pixels: see the attribute.
      about: see the attribute.
    """
    if batch_size is not None and batch_size < 1:
      raise UserError(f'batch_size is {batch_size}; give 1 or more.')
    if max_pixels < 1:
      raise UserError(f'max_pixels is {max_pixels}; give 1 or more.')
    self.max_pixels = max_pixels
    self.classes, self.palette = tuple(labels.classes), labels.palette
    self.protocol = protocol or self._protocol()
    self.about = dict(about or {})
    self.on_compile: Callable[[int, int], None] = lambda height, width: None
    self.on_step: Callable[[steps.Batch, float], None] | None = None
    self._mesh = sharding.make_mesh()
    if batch_size is None:
      on_cpu = jax.devices()[0].platform == 'cpu'
      of_one = 1 if on_cpu else ACCELERATOR_BATCH_SIZE
      batch_size = of_one * self._mesh.shape['data']
    self.batch_size = sharding.divisible_batch_size(batch_size, self._mesh)
    replicated = sharding.replicated(self._mesh)
    self._variables = jax.device_put(dict(variables), replicated)
    self._step = self._make_step(
      model,
      len(self.classes),
      mesh=self._mesh,
      # Looked up late, as the attribute may be set after this.
      on_compile=lambda height, width: self.on_compile(height, width),
    )

  def _make_step(self, *arguments: Any, **options: Any) -> Callable:
    protocol = {'protocol': self.protocol}
    return steps.make_predict_step(*arguments, **options, **protocol)

  def predict(
    self, image: Any, *, probabilities: bool = False
  ) -> Prediction | list[Prediction]:
    """Predicts a picture, or a list of pictures, in its order.

    Args:
      image: uint8 (H, W, 3) RGB (OpenCV reads files as BGR) or (H, W) grey, a
        path, an image of Pillow, or a list of these; `UserError` if it is none.
      probabilities: whether to return them for all classes: 4 * C bytes a
        pixel (600 MB a megapixel with 150 classes), and several times that
        while they are computed.
    """
    if not isinstance(image, list | tuple):
      image = self._read(image)
      batches = self._in_order([image], batch_size=1)
      (found,) = self._results(batches, probabilities)
      return self._prediction(found, image)
    # A wrong array fails now, before others are predicted.
    sources = [
      each if isinstance(each, str | Path) else _numbered(index, each)
      for index, each in enumerate(image)
    ]
    results: dict[int, Prediction] = {}
    each = self.predict_each(sources, probabilities=probabilities)
    for index, result in each:
      if isinstance(result, UserError):
        raise result
      results[index] = result
    return [results[index] for index in range(len(sources))]

  def predict_each(
    self, images: Sequence[Any], *, probabilities: bool = False
  ) -> Iterator[tuple[int, Prediction | UserError]]:
    """Predicts any number of pictures, with few in memory at a time.

    Yields the index in `images`, and the `Prediction` or the `UserError` of a
    picture that cannot be read. Pictures of one padded shape share batches, so
    the order differs.
    """
    if not len(images):
      return
    rule = self.protocol.rule
    pictures = _Pictures(images, self._read, classify=bool(rule))
    # The pipeline of evaluation: the same pixels and padding as in eval.py.
    batches = make_eval_iterator(
      ConfigDict(
        {
          'image_scale': self.protocol.image_scale,
          'num_threads': 0,
          'augmentation': 'imagenet' if rule else 'mmseg',
          'center_crop': rule,
        }
      ),
      pictures,
      batch_size=self._rows(1 if probabilities else len(images)),
      bucket=self.protocol.bucket,
      skip_unreadable=True,
      keep_size=self.protocol.keep_size,
    )
    with contextlib.closing(batches):
      for found in self._results(batches, probabilities):
        yield found[0], self._prediction(found, images[found[0]])
        while pictures.unreadable:
          yield pictures.unreadable.popleft()
    yield from pictures.unreadable

  def predict_frames(
    self, frames: Iterable[np.ndarray], *, probabilities: bool = False
  ) -> Iterator[Prediction]:
    """Predicts a stream of pictures of one size, in its order.

    Frames are uint8 (H, W, 3) RGB. At most three batches are read ahead.
    """
    # Results come in the order of frames.
    held: collections.deque[np.ndarray] = collections.deque()

    def taken():
      for frame in frames:
        held.append(self._read(frame))
        yield held[-1]

    rows = self._rows(1) if probabilities else self.batch_size
    batches = self._in_order(taken(), batch_size=rows)
    for found in self._results(batches, probabilities):
      yield self._prediction(found, held.popleft())

  def _read(self, image: Any) -> np.ndarray:
    pixels = as_rgb(image, self.max_pixels)
    height, width = self.protocol.largest(pixels.shape[:2])
    # A small limit is meant for files.
    if height * width > (most := max(self.max_pixels, MAX_PIXELS)):
      name = image if isinstance(image, str | Path) else 'the image'
      raise UserError(
        f'{name} would be resized to {width} x {height} pixels, more than '
        f'{most}. Give smaller image_scale or scales, or larger max_pixels.'
      )
    return pixels

  def _rows(self, number: int) -> int:
    # Powers of two bound the number of batch sizes, each of which is compiled.
    rows = min(self.batch_size, 1 << (number - 1).bit_length())
    return sharding.divisible_batch_size(rows, self._mesh)

  def _in_order(
    self, images: Iterable[np.ndarray], batch_size: int
  ) -> Iterator[steps.Batch]:
    protocol = self.protocol
    return batches_in_order(
      images,
      image_scale=None if protocol.keep_size else protocol.image_scale,
      batch_size=sharding.divisible_batch_size(batch_size, self._mesh),
      bucket=protocol.bucket,
      center_crop=protocol.rule,
    )

  def _results(
    self, batches: Iterable[steps.Batch], probabilities: bool
  ) -> Iterator[Found]:
    """Index, labels and probabilities of each picture."""
    # A batch is dispatched before the previous one's results are awaited.
    pending = None
    for batch in itertools.chain(batches, [None]):
      started = batch and (batch, *self._run(batch, probabilities))
      if pending:
        yield from self._found(*pending)
      pending = started

  def _found(self, batch: steps.Batch, *outputs: Any) -> Iterator[Found]:
    outputs = [x if x is None else np.asarray(x) for x in outputs]
    for slot, index in enumerate(batch['index'].tolist()):
      height, width = batch['label_size'][slot]
      if index >= 0:
        own = (x if x is None else x[slot, :height, :width] for x in outputs)
        yield index, *own

  def _run(self, batch: steps.Batch, probabilities: bool):
    started = time.perf_counter()
    outputs = self._step(self._variables, batch, probabilities)
    if self.on_step is not None:
      jax.block_until_ready(outputs)
      self.on_step(batch, time.perf_counter() - started)
    return outputs

  def _prediction(self, found: Found, source: Any) -> Prediction:
    # Copies, because views would keep the padded batch alive.
    _, labels, probabilities = found
    if probabilities is not None:
      probabilities = np.array(probabilities)
    if not isinstance(source, str | Path):
      source = as_rgb(source)
    return Prediction(
      np.array(labels), self.classes, self.palette, source, probabilities
    )


class ClassPredictor(Predictor):
  """A classifier on all devices, which gives each picture one class.

  It is used as a `Predictor`, and gives a `ClassPrediction` with all
  probabilities for each picture. `protocol` is a `CenterCrop`; there are no
  colours in `palette`.
  """

  _protocol = CenterCrop

  def _make_step(self, *arguments: Any, **options: Any) -> Callable:
    options['normalization'] = self.protocol.normalization
    step = steps.make_class_step(*arguments, **options)
    return lambda variables, batch, _: step(variables, batch)

  def _found(self, batch: steps.Batch, *outputs: Any) -> Iterator[Found]:
    probabilities = np.asarray(outputs[1], np.float32)
    for slot, index in enumerate(batch['index'].tolist()):
      if index >= 0:
        yield index, probabilities[slot]

  def _prediction(self, found: Found, source: Any) -> ClassPrediction:
    # A copy, because a view would keep those of the batch alive.
    source = source if isinstance(source, str | Path) else as_rgb(source)
    return ClassPrediction(np.array(found[1]), self.classes, source)


def _numbered(index: int, image: Any) -> np.ndarray:
  try:
    return as_rgb(image)
  except UserError as error:
    raise UserError(f'image {index} of the list: {error}') from error


def from_checkpoint(
  source: str | Path,
  *,
  checkpoint: str | int = 'latest',
  protocol: str = 'whole',
  image_scale: tuple[int, int] | None = None,
  slide_crop: tuple[int, int] | None = None,
  slide_stride: tuple[int, int] | None = None,
  scales: Sequence[float] | None = None,
  flip: bool | None = None,
  batch_size: int | None = None,
  bucket: int = Protocol.bucket,
  max_pixels: int = MAX_PIXELS,
) -> Predictor:
  """A trained network, ready to predict: a `ClassPredictor` of a classifier.

  Args:
    source: workdir of a training, published name, path or address; see
      `load_pretrained`.
    checkpoint: of a training: 'latest', 'best' (by mIoU or top1) or a step.
    protocol: 'whole', 'slide', 'ms_flip_0x', 'ms_flip_1x' or 'encoding';
      docs/evaluation.md describes them and the next five parameters.
    image_scale: (long edge, short edge) in pixels; None: the training's. Of a
      classifier twice the edge of its crops, and no other parameter of a
      protocol means anything.
    slide_crop: height and width of a window; None: the training's crop.
    slide_stride: pixels between windows; None: two thirds of a window.
    scales: of ms_flip and encoding; None: 0.5 to 1.75 in steps of 0.25.
    flip: of both: whether to add mirrors; None: yes.
    batch_size: see `Predictor`.
    bucket: padded heights and widths are multiples of it: a larger one compiles
      fewer shapes and computes more.
    max_pixels: see `Predictor`.

  Raises:
    UserError: the source is missing, damaged or a backbone alone, or a
      parameter is invalid.
  """
  # Orbax logs warnings through absl even when it only restores a checkpoint.
  with _errors_only(logging.getLogger('absl')):
    model, variables, weights = load_trained(source, checkpoint)
  config = weights.description.config
  given = {'image_scale': image_scale, 'scales': scales, 'flip': flip}
  given |= {'slide_crop': slide_crop, 'slide_stride': slide_stride}
  about = {'weights': weights.provenance, 'model': config}
  options = {'batch_size': batch_size, 'max_pixels': max_pixels, 'about': about}
  if weights.description.task == 'classifier':
    given |= {'protocol': protocol}
    how = class_labels(weights), center_crop_of(weights, **given)
    return ClassPredictor(model, variables, *how, **options)
  number = config['num_classes']
  chosen = choose_protocol(
    protocol,
    image_scale=weights.image_scale or IMAGE_SCALES.get(number, (2048, 512)),
    crop=weights.crop_size or CROP_SIZES.get(number, (512, 512)),
    given=given,
  )
  return Predictor(
    model,
    variables,
    label_set(number, weights.classes, weights.palette),
    dataclasses.replace(
      chosen, bucket=bucket, normalization=weights.normalized()
    ),
    **options,
  )


@contextlib.contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


def center_crop_of(
  weights: Weights,
  image_scale: Sequence[int] | None = None,
  protocol: str = Protocol.name,
  **others: Any,
) -> CenterCrop:
  """How a classifier's weights want to see pictures; see `from_checkpoint`."""
  named = {} if protocol == Protocol.name else {'protocol': protocol}
  for key, value in (named | others).items():
    if value is not None:
      raise UserError(
        f'{key} is {value!r}, which is for segmentors; a classifier sees the '
        'middle of a picture. Leave it out.'
      )
  backbone = weights.description.config['backbone']
  edge = CROP_EDGES.get(backbone, CROP_EDGE)
  edges = {*(image_scale or weights.image_scale or (edge,))}
  if len(edges) != 1 or not 1 <= min(edges) <= 2**13:
    raise UserError(
      f'image_scale is {image_scale}; of a classifier, whose crops are square, '
      f'it is twice one number of pixels from 1 to {2**13}, such as {edge} '
      f'{edge}.'
    )
  rule = 'gluon' if backbone in OF_GLUON else CenterCrop.rule
  rule = weights.center_crop or rule
  return CenterCrop(edges.pop(), rule, weights.normalized())


def class_labels(weights: Weights) -> LabelSet:
  """The classes of a classifier's weights: theirs, ImageNet's or numbers."""
  number, names = weights.description.config['num_classes'], weights.classes
  if not names and number == len(IMAGENET.classes):
    return IMAGENET
  return class_names('own', names or map(str, range(number)))


def print_notes(predictor: Predictor) -> None:
  """Prints what was assumed of its weights."""
  for note in predictor.about['weights'].get('notes', ()):
    print(f'note: {note}', flush=True)
