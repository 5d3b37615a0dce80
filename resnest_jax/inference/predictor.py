"""A trained network that turns pictures into label maps: docs/prediction.md.

model = resnest_jax.from_checkpoint('runs/pspnet')
prediction = model.predict('street.jpg')
"""

import collections
import contextlib
import dataclasses
import functools
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

from resnest_jax import sharding
from resnest_jax.checkpoints.integrity import tree_digest
from resnest_jax.data.images import MAX_PIXELS
from resnest_jax.data.own.classes import label_set
from resnest_jax.data.pipeline import (
  make_eval_batch,
  make_eval_iterator,
  padded_shapes,
  resize_sample,
)
from resnest_jax.data.rasters import as_image
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.inference import steps
from resnest_jax.inference.predictions import ClassPrediction, Prediction
from resnest_jax.inference.protocols import (
  CenterCrop,
  Protocol,
  choose_protocol,
)
from resnest_jax.inference.streaming import Stream
from resnest_jax.labels import IGNORE, IMAGENET, LabelSet, class_names
from resnest_jax.weights.pretrained import Weights, load_trained

# For weights that do not say how they were trained, by their number of classes:
# ADE20K's and Cityscapes' long and short edge, and height and width, in pixels.
IMAGE_SCALES = {150: (2048, 512), 19: (2048, 1024)}
CROP_SIZES = {150: (512, 512), 19: (512, 1024)}
ACCELERATOR_BATCH_SIZE = 4  # A CPU is as fast one by one.
# Edges of the crops on which the authors have evaluated their classifiers.
CROP_EDGES = {'resnest101': 256, 'resnest200': 320, 'resnest269': 416}
CROP_EDGE = 224  # All others'.
# By GluonCV, whose crops have another rule.
OF_GLUON = ('resnest14', 'resnest26')


@dataclasses.dataclass(eq=False)
class _Pictures:
  """A split that keeps the reasons why pictures cannot be read."""

  sources: Sequence[Any]
  read: Callable[[Any], dict]
  bands: Sequence[str]
  # (index, why it cannot be read), appended by the threads.
  unreadable: collections.deque = dataclasses.field(
    default_factory=collections.deque
  )

  def __len__(self) -> int:
    return len(self.sources)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      return self.read(self.sources[index])
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
    temperature: of the probabilities: logits are divided by it before.
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
    temperature: float = 1.0,
    about: Mapping[str, Any] | None = None,
  ):
    """Places `params` and `batch_stats` on the devices; compiles nothing yet.

    Args:
      protocol: None: the whole picture, fitted into 2048 x 512 pixels.
      batch_size: rounded up to a multiple of the devices; None: one on each
        CPU device, four on each accelerator.
      temperature: of a protocol with logits; see `Protocol.has_logits`.
    """
    for name, value in ('batch_size', batch_size), ('max_pixels', max_pixels):
      if value is not None and value < 1:
        raise UserError(f'{name} is {value}; give 1 or more.')
    self.max_pixels = max_pixels
    self.classes, self.palette = tuple(labels.classes), labels.palette
    self.protocol = protocol or self._protocol()
    self.temperature = temperature if self.protocol.has_logits else 1.0
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
    options = {
      'mesh': self._mesh,
      # Looked up late, as the attribute may be set after this.
      'on_compile': lambda height, width: self.on_compile(height, width),
    }
    network = model, len(self.classes)
    temperature = {'temperature': self.temperature}
    self._step = self._make_step(*network, **options, **temperature)
    self._make_stream = functools.partial(Stream, *network, **options)

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
        Of a network of other bands (H, W, bands) in their order and type.
      probabilities: whether to return them for all classes: 4 * C bytes a
        pixel (600 MB a megapixel with 150 classes), and several times that
        while they are computed.
    """
    if not isinstance(image, list | tuple):
      image = self._read(image)
      batches = self._in_order([image], batch_size=1)
      ((_, found),) = self._results(batches, probabilities)
      return self._prediction(image, *found)
    # A wrong array fails now, before others are predicted.
    sources = []
    for index, each in enumerate(image):
      try:
        sources.append(self._kept(each))
      except UserError as error:
        raise UserError(f'image {index} of the list: {error}') from error
    results: dict[int, Prediction] = {}
    each = self.predict_each(sources, probabilities=probabilities)
    for index, result in each:
      if isinstance(result, UserError):
        raise result
      results[index] = result
    return [results[index] for index in range(len(sources))]

  def predict_each(
    self, images: Sequence[Any], *, probabilities: bool | str = False
  ) -> Iterator[tuple[int, Prediction | UserError]]:
    """Predicts any number of pictures, with few in memory at a time.

    Yields the index in `images`, and the `Prediction` or the `UserError` of a
    picture that cannot be read. Pictures of one padded shape share batches, so
    the order differs. `probabilities` may be `steps.LARGEST`.
    """
    if not len(images):
      return
    rule, bands = self.protocol.rule, self.protocol.normalization.bands
    pictures = _Pictures(images, lambda x: self._sample(self._read(x)), bands)
    data = {'image_scale': self.protocol.image_scale, 'num_threads': 0}
    data |= {'augmentation': 'imagenet' if rule else 'mmseg'}
    # The pipeline of evaluation: the same pixels and padding as in eval.py.
    batches = make_eval_iterator(
      ConfigDict(data | {'center_crop': rule}),
      pictures,
      batch_size=self._rows(1 if probabilities is True else len(images)),
      bucket=self.protocol.bucket,
      skip_unreadable=True,
      keep_size=self.protocol.keep_size,
    )
    with contextlib.closing(batches):
      for index, found in self._results(batches, probabilities):
        yield index, self._prediction(images[index], *found)
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
    for _, found in self._results(batches, probabilities):
      yield self._prediction(held.popleft(), *found)

  @functools.cached_property
  def stream(self) -> Callable[..., Iterator[tuple[int, np.ndarray]]]:
    """`streaming.Stream` of these weights, for pictures of any size.

    The protocol is `slide`, and the picture keeps its size.
    """
    stream = self._make_stream(protocol=self.protocol)
    return functools.partial(stream, self._variables, number=self.batch_size)

  @property
  def digest(self) -> str:
    """Differs between weights."""
    return tree_digest(self._variables)

  def _read(self, image: Any) -> np.ndarray:
    how = self.protocol.normalization
    pixels = as_image(image, how, self.max_pixels)
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

  def _sample(self, image: np.ndarray) -> dict[str, Any]:
    # The pipeline wants a label. A broadcast scalar takes no memory.
    label = np.broadcast_to(np.uint8(IGNORE), image.shape[:2])
    label = -1 if self.protocol.rule else label
    return {'image': image, 'label': label, 'name': ''}

  def _in_order(
    self, images: Iterable[np.ndarray], batch_size: int
  ) -> Iterator[steps.Batch]:
    """Batches of neighbours; empty slots fill up the last one."""
    protocol = self.protocol
    scale = None if protocol.keep_size else protocol.image_scale
    options = {'image_scale': scale, 'center_crop': protocol.rule}
    samples = (
      resize_sample(index, self._sample(image), **options)
      for index, image in enumerate(images)
    )
    slots = sharding.divisible_batch_size(batch_size, self._mesh)
    # `make_eval_iterator` would sort pictures into groups of one padded shape.
    while group := list(itertools.islice(samples, slots)):
      yield make_eval_batch(
        group, slots, *padded_shapes(group, protocol.bucket)
      )

  def _results(
    self, batches: Iterable[steps.Batch], probabilities: bool | str
  ) -> Iterator[tuple[int, list[np.ndarray | None]]]:
    """The index of each picture, and what the step gives of it."""
    run = functools.partial(self._run, probabilities=probabilities)
    for batch, outputs in steps.run_ahead(run, batches):
      outputs = [x if x is None else np.asarray(x) for x in outputs]
      for slot, index in steps.filled(batch):
        inside = self._inside(batch, slot)
        # Copies, because views would keep the padded batch alive.
        yield index, [x if x is None else x[inside].copy() for x in outputs]

  def _inside(self, batch: steps.Batch, slot: int) -> tuple:
    return slot, *map(slice, batch['label_size'][slot])

  def _run(self, batch: steps.Batch, probabilities: bool | str):
    started = time.perf_counter()
    outputs = self._step(self._variables, batch, probabilities)
    if self.on_step is not None:
      jax.block_until_ready(outputs)
      self.on_step(batch, time.perf_counter() - started)
    return outputs

  def _kept(self, source: Any) -> np.ndarray | str | Path:
    if isinstance(source, str | Path):
      return source
    return as_image(source, self.protocol.normalization)

  def _prediction(
    self, source: Any, labels: np.ndarray, probabilities: np.ndarray | None
  ) -> Prediction:
    found = labels, self.classes, self.palette, self._kept(source)
    return Prediction(*found, probabilities, self.protocol.normalization)


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
    return lambda variables, batch, _: step(variables, batch)[1:2]

  def _inside(self, batch: steps.Batch, slot: int) -> tuple:
    del batch
    return (slot,)

  def _prediction(
    self, source: Any, probabilities: np.ndarray
  ) -> ClassPrediction:
    probabilities = np.float32(probabilities)
    return ClassPrediction(probabilities, self.classes, self._kept(source))


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
    image_scale: (long edge, short edge) in pixels; None: the training's; (0, 0)
      for 'whole' and 'slide': pictures keep their size. Of a classifier twice
      the edge of its crops, and no other parameter of a protocol means
      anything.
    slide_crop: height and width of a window; None: the training's crop.
    slide_stride: pixels between windows; None: two thirds of a window.
    scales: of ms_flip and encoding; None: 0.5 to 1.75 in steps of 0.25.
    flip: of both: whether to add mirrors; None: yes.
    batch_size: see `Predictor`.
    max_pixels: see `Predictor`.
    bucket: padded heights and widths are multiples of it: a larger one compiles
      fewer shapes and computes more.

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
  options['temperature'] = weights.temperature
  if weights.description.task == 'classifier':
    given['protocol'] = None if protocol == Protocol.name else protocol
    how = class_labels(weights), center_crop_of(weights, **given)
    return ClassPredictor(model, variables, *how, **options)
  number = config['num_classes']
  labels = label_set(number, weights.classes, weights.palette)
  chosen = choose_protocol(
    protocol,
    image_scale=weights.image_scale or IMAGE_SCALES.get(number, (2048, 512)),
    crop=weights.crop_size or CROP_SIZES.get(number, (512, 512)),
    given=given,
  )
  how = {'bucket': bucket, 'normalization': weights.normalized()}
  chosen = dataclasses.replace(chosen, **how)
  return Predictor(model, variables, labels, chosen, **options)


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
  **others: Any,
) -> CenterCrop:
  """How a classifier's weights want to see pictures; see `from_checkpoint`."""
  for key, value in others.items():
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
