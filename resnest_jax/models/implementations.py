"""How each platform computes a layer, in one table.

Implementations of a layer share its parameters and give the same result, up to
rounding. While a program is traced,

    with implementations.use(depthwise='convolution'):

overrides the platform's choice.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager

import jax

from resnest_jax.errors import UserError

# Kind of layer -> its implementations, the default first.
IMPLEMENTATIONS = {
  # A 3x3 convolution of many channels: XLA's; one with fewer multiplications.
  'wide': ('convolution', 'winograd'),
  # k * k shifted products; a convolution with as many groups as channels.
  'depthwise': ('shifts', 'convolution'),
  # The gradient of a kernel: XLA's convolution; a matrix product for each tap.
  'kernel_gradient': ('convolution', 'products'),
  # A fold of strided slices; XLA's window reduction.
  'pooling': ('slices', 'reduce_window'),
  # Equal blocks in training: each by itself; a loop, which compiles faster. It
  # shapes the state, so `create_training` reads it, not the tracing of a step.
  'blocks': ('unrolled', 'scanned'),
  # From scores to classes: XLA's reduction; a loop over the classes.
  'argmax': ('reduction', 'loop'),
  # The loss's rows of pixels, each of two rows of logits: a product; sums.
  'rows': ('product', 'sums'),
}

LAYERS = ('wide', 'depthwise', 'kernel_gradient', 'pooling')

# CPU: measured. TPU: by the cycles that its compiler estimates. GPU: not
# measured, by what is known to be fast. benchmarks/results has the figures.
_FIRST = {kind: accepted[0] for kind, accepted in IMPLEMENTATIONS.items()}
BEST = {
  'cpu': _FIRST
  | {'wide': 'winograd', 'kernel_gradient': 'products', 'blocks': 'scanned'}
  | {'argmax': 'loop'},
  'gpu': _FIRST,
  'tpu': _FIRST
  | {'depthwise': 'convolution', 'pooling': 'reduce_window', 'rows': 'sums'},
}

# Platform and (kind, name) pairs. JAX has the context in its cache keys, so a
# function traced under another choice is traced again.
_override = jax.make_user_context((None, ()))


def use(
  platform: str | None = None, **choice: str
) -> AbstractContextManager[None]:
  """Chooses implementations for everything that is traced inside.

  `choice` is kind -> implementation; other kinds keep the outer choice.
  `platform` is 'cpu', 'gpu' or 'tpu', to compile for another machine. Unknown
  names raise `UserError`.
  """

  def check(name: str, accepted: Collection[str], said: str) -> None:
    if name not in accepted:
      names = ', '.join(accepted)
      raise UserError(f'implementations.use: {said}; accepted are {names}.')

  for kind, name in choice.items():
    check(kind, IMPLEMENTATIONS, f'{kind!r} is no kind of layer')
    check(name, IMPLEMENTATIONS[kind], f'{kind} is {name!r}')
  if platform is not None:
    check(platform, BEST, f'platform is {platform!r}')
  outer_platform, outer = _override.value
  chosen = tuple(sorted((dict(outer) | choice).items()))
  return _override((platform or outer_platform, chosen))


def current() -> tuple[tuple[str, str], ...]:
  """(kind, implementation) pairs of all kinds."""
  platform, override = _override.value
  platform = platform or jax.default_backend()
  best = BEST.get(platform, BEST['gpu'])
  return tuple((best | dict(override)).items())


def chosen(kind: str) -> str:
  return dict(current())[kind]
