"""The protocols of evaluation, by name: docs/evaluation.md describes them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from resnest_jax.config_keys import MOST_PIXELS, PROTOCOLS, SCALES, classifies
from resnest_jax.data.preprocess import IMAGENET, Normalization
from resnest_jax.errors import UserError
from resnest_jax.inference.encoding import make_encoding
from resnest_jax.inference.label_maps import resized_view
from resnest_jax.inference.multiscale import make_multiscale, scaled_sizes
from resnest_jax.inference.slide import make_slide

# Where those of a training are not square.
ENCODING = {'image_scale': (520, 520), 'crop': (480, 480)}
_PAIRS = ('image_scale', 'slide_crop', 'slide_stride')


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A protocol with all parameters that its results depend on.

  Attributes:
    name: one of `PROTOCOLS`.
    image_scale: long and short edge in pixels that images are fitted into; 0, 0
      in `whole` and `slide`: they keep their size.
    crop: `slide`, `encoding`: height and width of a window in pixels.
    stride: likewise: pixels between windows, down and to the right.
    scales: `ms_flip_*`, `encoding`: relative to `image_scale`, 1x: to the
      original.
    flip: likewise: whether each scale is also shown mirrored.
    bucket: padded heights and widths are multiples of this many pixels (at
      scale 1). Results depend on it only by rounding.
    normalization: of the weights.
  """

  name: str = 'whole'
  image_scale: tuple[int, int] = (2048, 512)
  crop: tuple[int, int] = (512, 512)
  stride: tuple[int, int] = (341, 341)
  scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
  flip: bool = True
  bucket: int = 64
  normalization: Normalization = IMAGENET
  rule: ClassVar[str] = ''  # Nothing is cut off, but by classifiers.

  def __post_init__(self):
    edges = len({*self.image_scale}), len({*self.crop})
    if self.name == 'encoding' and edges != (1, 1):
      raise UserError(
        'the protocol encoding has square windows of images whose long edge is '
        f'given: image_scale is {self.image_scale} and slide_crop '
        f'{self.crop} (without it the crop of the training). Give each two '
        'equal numbers, as 520 520 and 480 480.'
      )

  @property
  def has_logits(self) -> bool:
    """Whether logits decide, which a temperature divides, or their softmax."""
    return 'scales' not in PROTOCOLS[self.name]

  @property
  def keep_size(self) -> bool:
    """Whether images must not be resized before they are batched."""
    return 'scales' in PROTOCOLS[self.name] or not any(self.image_scale)

  def largest(self, size: tuple[int, int]) -> list[int]:
    """The height and width of a picture at the largest scale."""
    takes = PROTOCOLS[self.name]
    ratio = max(self.scales) if 'scales' in takes else 1.0
    fitted = 'image_scale' in takes and any(self.image_scale)
    scale = self.image_scale if fitted else None
    return scaled_sizes(np.array([size]), ratio, scale)[0].tolist()

  def describe(self) -> dict[str, Any]:
    """Name and parameters for metrics.json."""
    # eval.py compares these dicts to recognise the same evaluation in a folder.
    return _described(self, *PROTOCOLS[self.name])


@dataclasses.dataclass(frozen=True)
class CenterCrop:
  """The protocol of classifiers: the middle of the picture, resized.

  Attributes:
    size: edge of the crop in pixels, after the resize.
    rule: how much of the picture it is, `data.center_crop`.
    normalization: of the weights.
  """

  size: int = 224
  rule: str = 'encoding'
  normalization: Normalization = IMAGENET
  name: ClassVar[str] = 'center_crop'
  has_logits: ClassVar[bool] = True
  keep_size: ClassVar[bool] = False
  bucket: ClassVar[int] = 1

  @property
  def image_scale(self) -> tuple[int, int]:
    return self.size, self.size

  def largest(self, size: tuple[int, int]) -> tuple[int, int]:
    """As of `Protocol`."""
    del size
    return self.image_scale

  def describe(self) -> dict[str, Any]:
    """As of `Protocol`."""
    return _described(self, 'size', 'rule')


def _described(protocol: Protocol | CenterCrop, *keys: str) -> dict[str, Any]:
  values = {key: getattr(protocol, key) for key in ('name', *keys)}
  if protocol.normalization != IMAGENET:
    values |= protocol.normalization.described()
  return {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in values.items()
  }


def make_protocol(config: Any) -> Protocol | CenterCrop:
  """The protocol of a configuration, `eval.protocol`."""
  if classifies(config):
    if config.eval.protocol != Protocol.name:
      raise UserError(
        f'eval.protocol is {config.eval.protocol!r}, which is for segmentors. '
        'A classifier sees the middle of a picture (data.center_crop and '
        'data.image_scale): leave eval.protocol out.'
      )
    return CenterCrop(config.data.image_scale[0], config.data.center_crop)
  crop = config.eval.slide_crop or config.data.crop_size
  return Protocol(
    name=config.eval.protocol,
    image_scale=tuple(config.data.image_scale),
    crop=tuple(crop),
    stride=tuple(config.eval.slide_stride or default_stride(crop)),
    scales=tuple(map(float, config.eval.scales)),
    flip=config.eval.flip,
    bucket=config.eval.bucket,
  )


def default_stride(crop: Sequence[int]) -> tuple[int, ...]:
  """Two thirds of a window, in pixels."""
  return tuple(max(2 * length // 3, 1) for length in crop)


def choose_protocol(
  name: str,
  *,
  image_scale: Sequence[int],
  crop: Sequence[int],
  given: Mapping[str, Any],
) -> Protocol:
  """A protocol from explicit parameters and defaults, in pixels.

  `given` are `image_scale`, `slide_crop`, `slide_stride`, `scales` and `flip`;
  None stands for the default. Raises `UserError` for invalid ones.
  """
  if name not in PROTOCOLS:
    raise UserError(
      f'there is no protocol {name!r}; accepted are {", ".join(PROTOCOLS)} '
      '(docs/evaluation.md).'
    )
  given = {key: value for key, value in given.items() if value is not None}
  for key in given:
    takers = [
      x for x in PROTOCOLS if key.removeprefix('slide_') in PROTOCOLS[x]
    ]
    if name not in takers:
      raise UserError(
        f'{key} means nothing in the protocol {name!r}; leave it out, or '
        f'choose a protocol that has it: {", ".join(takers)} (--protocol '
        f'{takers[0]}).'
      )
  given = {
    key.removeprefix('slide_'): tuple(value) if key in _PAIRS else value
    for key, value in given.items()
  }
  values = {'image_scale': tuple(image_scale), 'crop': tuple(crop)}
  if name == 'encoding':
    values = {
      key: value if value[0] == value[1] else ENCODING[key]
      for key, value in values.items()
    }
  values |= given
  values.setdefault('stride', default_stride(values['crop']))
  if 'scales' in given:
    values['scales'] = tuple(map(float, given['scales']))
  for key in ('image_scale', 'crop', 'stride'):
    good = (1 <= x <= MOST_PIXELS for x in values[key])
    own = 'scales' not in PROTOCOLS[name] and values[key] == (0, 0)
    if key == 'image_scale' and own:
      continue
    if len(values[key]) != 2 or not all(good):
      raise UserError(
        f'{key} is {values[key]}; it must be two numbers of pixels from 1 to '
        f'{MOST_PIXELS}.'
      )
  if any(x > y for x, y in zip(values['stride'], values['crop'], strict=True)):
    raise UserError(
      f'the stride {values["stride"]} is longer than the window '
      f'{values["crop"]} (height, width): pixels between windows would be '
      'left out.'
    )
  scales = values.get('scales', Protocol.scales)
  if not SCALES.holds(scales):
    raise UserError(f'scales are {scales}; give {SCALES.words}.')
  return Protocol(name, **values)


def make_views(
  protocol: Protocol,
  network: Callable,
  place: Callable,
  mesh: Mesh | None,
  align_corners: bool = False,
  dtype: Any = np.float32,
) -> tuple[Callable, Callable]:
  """The two parts of a protocol, `look` and `build`.

  `network` is (variables, images, sizes) -> logits, compiled; `place` puts
  arrays whose first axis is the batch on the devices. `align_corners` is how
  logits become those of the network's input. Images are uint8, in `encoding`
  of `dtype`.
  look(variables, batch) -> (layout, arrays) runs the network, outside jit;
  `layout` is static. build(layout, arrays, label_size, label_canvas) -> list of
  `View` or `Exponentials` is traced on each device's share of the batch.
  """
  # Only the network takes long to compile, and serves labels of any shape.
  if protocol.name == 'whole':
    return make_whole(network, place, align_corners)
  if protocol.name == 'slide':
    windows = protocol.crop, protocol.stride
    return make_slide(network, place, mesh, *windows, align_corners)
  looks = {'scales': protocol.scales, 'flip': protocol.flip}
  looks['align_corners'] = align_corners
  if protocol.name == 'encoding':
    return make_encoding(
      network,
      place,
      mesh,
      base_size=protocol.image_scale[0],
      crop=protocol.crop,
      stride=protocol.stride,
      dtype=dtype,
      **looks,
    )
  relative = 'image_scale' in PROTOCOLS[protocol.name]
  scale = protocol.image_scale if relative else None
  options = {'image_scale': scale, 'bucket': protocol.bucket, **looks}
  return make_multiscale(network, place, mesh, **options)


def make_whole(
  network: Callable, place: Callable, align_corners: bool
) -> tuple[Callable, Callable]:
  def look(variables, batch):
    image, size = place((batch['image'], batch['size']))
    return image.shape[1:3], (network(variables, image, size), size)

  def build(canvas, arrays, label_size, label_canvas):
    logits, size = arrays
    sizes = size, canvas, label_size, label_canvas
    return [resized_view(logits, *sizes, align_corners)]

  return look, build
