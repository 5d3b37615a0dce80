"""A trained network that turns pictures into label maps.

    model = resnest_jax.from_checkpoint('runs/pspnet')
    prediction = model.predict('street.jpg')

`predict.py` uses the same class. docs/prediction.md.
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from resnest_jax import drawing, sharding
from resnest_jax.data.own.classes import label_set
from resnest_jax.data.pictures import as_rgb
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.inference import steps
from resnest_jax.inference.frames import batches_in_order, unlabelled
from resnest_jax.inference.protocols import Protocol, choose_protocol
from resnest_jax.labels import LabelSet
from resnest_jax.weights.pretrained import load_segmentor

# Where the weights do not say: the protocols of ADE20K and Cityscapes, by
# their number of classes. Long and short edge, and height and width, in pixels.
IMAGE_SCALES = {150: (2048, 512), 19: (2048, 1024)}
CROP_SIZES = {150: (512, 512), 19: (512, 1024)}
# Pictures at a time on each device: more do not help a CPU.
BATCH_SIZES = {'cpu': 1}
ACCELERATOR_BATCH_SIZE = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """What a network sees in a picture.

  Attributes:
    labels: uint8 (H, W), the class of every pixel.
    classes: C names; `classes[labels[y, x]]` is that of a pixel.
    palette: uint8 (C, 3), the classes' colours, RGB.
    source: the picture: an array, or the path that it is read from again.
    probabilities: float32 (H, W, C) where they were asked for, else None.
  """

  labels: np.ndarray
  classes: tuple[str, ...]
  palette: np.ndarray
  source: np.ndarray | str | Path
  probabilities: np.ndarray | None = None

  @property
  def image(self) -> np.ndarray:
    """The picture, uint8 (H, W, 3) RGB."""
    return as_rgb(self.source)

  def colors(self) -> np.ndarray:
    """The label map in the classes' colours, uint8 (H, W, 3) RGB."""
    return drawing.colour(self.labels, self.palette)

  def overlay(self, opacity: float = 0.5, legend: bool = False) -> np.ndarray:
    """The picture with the classes' colours over it, uint8 (H, W, 3) RGB.

    Args:
      opacity: of the colours, 0 (invisible) to 1.
      legend: whether to add a strip with the names of the classes below.
    """
    check_opacity(opacity)
    mixed = drawing.overlay(self.image, self.labels, self.palette, opacity)
    if not legend:
      return mixed
    width = mixed.shape[1]
    names = drawing.legend([self.labels], self.classes, self.palette, width)
    return np.vstack([mixed, names])


def check_opacity(opacity: float) -> None:
  """Raises `UserError` if it is not from 0 to 1."""
  if not 0 <= opacity <= 1:
    raise UserError(
      f'opacity is {opacity}; it must be from 0 (invisible) to 1.'
    )


class _Pictures:
  """Pictures as the evaluation pipeline reads them, in threads."""

  def __init__(self, sources: Sequence[Any]):
    self.sources = sources
    # (index, why it cannot be read), appended by the threads.
    self.unreadable: collections.deque = collections.deque()

  def __len__(self) -> int:
    return len(self.sources)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      return unlabelled(as_rgb(self.sources[index]))
    except UserError as error:
      self.unreadable.append((index, error))
      raise UnreadableSample(str(error)) from error


class Predictor:
  """A network with its variables on all devices, compiled as it is used.

  It compiles once for each padded shape and number of pictures at a time, so
  that pictures of similar sizes share a program.

  Attributes:
    classes: C names.
    palette: uint8 (C, 3), their colours, RGB.
    protocol: how pictures are shown to the network.
    batch_size: pictures at a time, over all devices.
    about: where the weights are from, and of which network; JSON-able.
    on_compile: is called with a padded height and width in pixels before the
      network is compiled for it. May be set.
    on_step: is called with a batch and the seconds that the devices took for
      it; they then do nothing while results are looked at. May be set.
  """

  def __init__(
    self,
    model: nn.Module,
    variables: Mapping[str, Any],
    labels: LabelSet,
    protocol: Protocol | None = None,
    *,
    batch_size: int | None = None,
    about: Mapping[str, Any] | None = None,
  ):
    """Places the variables on the devices; nothing is compiled yet.

    Args:
      model: a segmentor.
      variables: its `params` and `batch_stats`.
      labels: of its classes.
      protocol: None: the whole picture, fitted into 2048 x 512 pixels.
      batch_size: pictures at a time, over all devices, and rounded up to a
        multiple of their number; None: one on a CPU, four on each accelerator.
      about: see the attribute.

    Raises:
      UserError: the batch size is not positive.
    """
    if batch_size is not None and batch_size < 1:
      raise UserError(f'batch_size is {batch_size}; give 1 or more.')
    self.classes, self.palette = tuple(labels.classes), labels.palette
    self.protocol = protocol or Protocol()
    self.about = dict(about or {})
    self.on_compile: Callable[[int, int], None] = lambda height, width: None
    self.on_step: Callable[[steps.Batch, float], None] | None = None
    self._mesh = sharding.make_mesh()
    if batch_size is None:
      platform = jax.devices()[0].platform
      of_one = BATCH_SIZES.get(platform, ACCELERATOR_BATCH_SIZE)
      batch_size = of_one * self._mesh.shape['data']
    self.batch_size = sharding.divisible_batch_size(batch_size, self._mesh)
    replicated = sharding.replicated(self._mesh)
    self._variables = jax.device_put(dict(variables), replicated)
    self._step = steps.make_predict_step(
      model,
      len(self.classes),
      protocol=self.protocol,
      mesh=self._mesh,
      on_compile=lambda height, width: self.on_compile(height, width),
    )

  def predict(
    self, image: Any, *, probabilities: bool = False
  ) -> Prediction | list[Prediction]:
    """The classes of a picture's pixels, or of a list of pictures'.

    Args:
      image: uint8 (H, W, 3) RGB (not BGR, as OpenCV reads files) or (H, W)
        grey, a path, an image of Pillow, or a list of them.
      probabilities: whether to give those of all classes, too: 4 * C bytes a
        pixel, several times that while they are computed (600 MB a megapixel
        with 150 classes). The pictures of a list then go one by one.

    Returns:
      A `Prediction`, of a list a list in its order.

    Raises:
      UserError: something is no picture or cannot be read.
    """
    if not isinstance(image, list | tuple):
      image = as_rgb(image)
      batches = self._in_order([image], batch_size=1)
      (found,) = self._results(batches, probabilities)
      return self._prediction(found, image)
    # Paths are read when they are needed.
    sources = [
      each if isinstance(each, str | Path) else _numbered(index, each)
      for index, each in enumerate(image)
    ]
    results: dict[int, Prediction] = {}
    for index, result in self.predict_each(
      sources, probabilities=probabilities
    ):
      if isinstance(result, UserError):
        raise result
      results[index] = result
    return [results[index] for index in range(len(sources))]

  def predict_each(
    self, images: Sequence[Any], *, probabilities: bool = False
  ) -> Iterator[tuple[int, Prediction | UserError]]:
    """Predicts any number of pictures, of which few are in memory at a time.

    Args:
      images: as in `predict`; paths are read by threads, ahead.
      probabilities: as in `predict`.

    Yields:
      The place in `images` and the `Prediction`, or the `UserError` that says
      why it cannot be read. Those that share a padded shape come together,
      so the order is another one.
    """
    if not len(images):
      return
    pictures = _Pictures(images)
    batches = make_eval_iterator(
      ConfigDict({'image_scale': self.protocol.image_scale, 'num_threads': 0}),
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

    Args:
      frames: uint8 (H, W, 3) RGB. At most three batches are in memory.
      probabilities: as in `predict`.
    """
    held: collections.deque[np.ndarray] = collections.deque()

    def taken():
      for frame in frames:
        held.append(as_rgb(frame))
        yield held[-1]

    rows = self._rows(1) if probabilities else self.batch_size
    batches = self._in_order(taken(), batch_size=rows)
    for found in self._results(batches, probabilities):
      yield self._prediction(found, held.popleft())

  def _rows(self, number: int) -> int:
    """The rows of a batch: a power of two suffices for few pictures."""
    rows = min(self.batch_size, 1 << (number - 1).bit_length())
    return sharding.divisible_batch_size(rows, self._mesh)

  def _in_order(
    self, images: Iterable[np.ndarray], batch_size: int
  ) -> Iterator[steps.Batch]:
    scale = None if self.protocol.keep_size else self.protocol.image_scale
    return batches_in_order(
      images,
      image_scale=scale,
      batch_size=sharding.divisible_batch_size(batch_size, self._mesh),
      bucket=self.protocol.bucket,
    )

  def _results(
    self, batches: Iterable[steps.Batch], probabilities: bool
  ) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Index, labels and probabilities of each picture.

    A batch is on the devices while the one before it is looked at.
    """

    def of(batch, *outputs):
      outputs = [x if x is None else np.asarray(x) for x in outputs]
      for slot, index in enumerate(batch['index'].tolist()):
        height, width = batch['label_size'][slot]
        if index >= 0:
          yield (
            index,
            *(x if x is None else x[slot, :height, :width] for x in outputs),
          )

    pending = None
    for batch in itertools.chain(batches, [None]):
      started = batch and (batch, *self._run(batch, probabilities))
      if pending:
        yield from of(*pending)
      pending = started

  def _run(self, batch: steps.Batch, probabilities: bool):
    started = time.perf_counter()
    outputs = self._step(self._variables, batch, probabilities)
    if self.on_step is not None:
      jax.block_until_ready(outputs)
      self.on_step(batch, time.perf_counter() - started)
    return outputs

  def _prediction(
    self, found: tuple[int, np.ndarray, np.ndarray | None], source: Any
  ) -> Prediction:
    # Copies: of a batch, padded, this is a part.
    _, labels, probabilities = found
    if probabilities is not None:
      probabilities = np.array(probabilities)
    if not isinstance(source, str | Path):
      source = as_rgb(source)
    return Prediction(
      np.array(labels), self.classes, self.palette, source, probabilities
    )


def _numbered(index: int, image: Any) -> np.ndarray:
  try:
    return as_rgb(image)
  except UserError as error:
    raise UserError(f'image {index} of the list: {error}') from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Orbax warns of reading alone."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


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
) -> Predictor:
  """A trained network, ready to predict.

  Args:
    source: the workdir of a training, a published name, a path, an address;
      see `load_pretrained`.
    checkpoint: of a training: 'latest', 'best' (by mIoU) or a step.
    protocol: 'whole', 'slide', 'ms_flip_0x' or 'ms_flip_1x'; see
      docs/evaluation.md, also for the five that follow.
    image_scale: (long edge, short edge) in pixels that pictures are resized to
      fit into; None: the training's.
    slide_crop: height and width of a window; None: the training's crop.
    slide_stride: pixels between windows; None: two thirds of a window.
    scales: of ms_flip; None: 0.5 to 1.75 in steps of 0.25.
    flip: of ms_flip: mirrored, too; None: yes.
    batch_size: see `Predictor`.
    bucket: pixels of which padded heights and widths are multiples: with more,
      less is compiled and more computed.

  Raises:
    UserError: no such source, damaged, of something else than a segmentor, or
      a parameter that cannot be meant.
  """
  with _quiet():
    model, variables, weights = load_segmentor(source, checkpoint)
  config = weights.description.config
  number = config['num_classes']
  chosen = choose_protocol(
    protocol,
    image_scale=weights.image_scale or IMAGE_SCALES.get(number, (2048, 512)),
    crop=weights.crop_size or CROP_SIZES.get(number, (512, 512)),
    given={
      'image_scale': image_scale,
      'slide_crop': slide_crop,
      'slide_stride': slide_stride,
      'scales': scales,
      'flip': flip,
    },
  )
  return Predictor(
    model,
    variables,
    label_set(number, weights.classes, weights.palette),
    dataclasses.replace(chosen, bucket=bucket),
    batch_size=batch_size,
    about={'weights': weights.provenance, 'model': config},
  )
