"""Features of a backbone by name, for detectors and other heads of your own."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.models.convolution import Conv
from resnest_jax.models.layers import Array, Size, zero_outside
from resnest_jax.models.resnest import EXPANSION, ResNeSt

LEVELS = (2, 3, 4, 5)  # Of the four stages: strides 4 to 32.


class FPN(nn.Module):
  """Feature pyramid network (Lin et al., arXiv 1612.03144).

  As in detectron2 and mmdetection: convolutions have biases and neither norms
  nor activations, and coarser levels are enlarged by repeating pixels.
  """

  channels: int  # of each level
  top: bool = True  # One more level: every second pixel of the last.
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, features: Sequence[Array], sizes: Sequence[Size]
  ) -> list[Array]:
    """Levels of the features' sizes, finest first; arguments as of a head."""

    def conv(name: str, x: Array, kernel_size: int, size: Size) -> Array:
      layer = Conv(
        self.channels, kernel_size, use_bias=True, dtype=self.dtype, name=name
      )
      return zero_outside(layer(x), size)

    levels, coarser = [], None
    for level, x, size in list(zip(LEVELS, features, sizes, strict=True))[::-1]:
      x = conv(f'lateral_{level}', x, 1, size)
      if coarser is not None:
        x = zero_outside(x + enlarged(coarser, x.shape[1:3]), size)
      coarser = x
      levels.append(conv(f'output_{level}', x, 3, size))
    levels.reverse()
    return levels + [levels[-1][:, ::2, ::2]] * self.top


def enlarged(x: Array, shape: Sequence[int]) -> Array:
  """The nearest pixels of x (B, h, w, C) for (B, *shape, C).

  Each length is h or, with h = ceil(H / 2), H, where PyTorch's 'nearest' takes
  pixel i // 2, whatever the parity: true sizes need no heed.
  """
  for axis, length in enumerate(shape, 1):
    if x.shape[axis] != length:
      x = jnp.repeat(x, 2, axis)
  return x[:, : shape[0], : shape[1]]


class Features(nn.Module):
  """A `ResNeSt` and, if wanted, a pyramid on top of it."""

  backbone: ResNeSt
  fpn: FPN | None = None

  @property
  def strides(self) -> dict[str, int]:
    """Name -> pixels of the image for one of the feature, along each axis."""
    found = [min(2**level, self.backbone.output_stride) for level in LEVELS]
    return self._named([*found, 2 * found[-1]])

  @property
  def channels(self) -> dict[str, int]:
    """Name -> length of the last axis."""
    width = self.backbone.width * EXPANSION
    plain = [width * 2**stage for stage in range(len(LEVELS))]
    return self._named(plain if self.fpn is None else 5 * [self.fpn.channels])

  def __call__(
    self, images: Array, *, train: bool, size: Size = None
  ) -> dict[str, Array]:
    """'c2' to 'c5', or 'p2' to 'p6': (B, ceil(H / s), ceil(W / s), channels).

    Images (B, H, W, 3) are normalised RGB, zero outside `size`, and features
    are zero outside ceil(size / s). `train` updates the running statistics.
    """
    images = images.astype(self.backbone.dtype)
    features, sizes = self.backbone(images, train=train, size=size)
    return self._named(
      features if self.fpn is None else self.fpn(features, sizes)
    )

  def _named(self, values: Sequence[Any]) -> dict[str, Any]:
    letter, levels = 'c', LEVELS
    if self.fpn is not None:
      letter, levels = 'p', (*LEVELS, 6)[: len(LEVELS) + self.fpn.top]
    return {f'{letter}{n}': x for n, x in zip(levels, values, strict=False)}
