"""Which of its forms a layer is computed in, in one table.

Some layers can be written for XLA in several ways that give the same result,
up to rounding, and the same parameters. Which is fastest depends on the
hardware, not on the network, so this is no key of a configuration: `BEST` has
the choice for each platform, and

    with forms.use(depthwise='convolution'):

overrides it while a program is traced; that of 'blocks' while a training is set
up, whose state it shapes. docs/performance.md says what was measured.
"""

from contextlib import AbstractContextManager

import jax

from resnest_jax.errors import UserError

# Kind of layer -> its forms.
FORMS = {
  # A 3x3 convolution of many channels: as it is; with fewer multiplications.
  'wide': ('convolution', 'winograd'),
  # As k * k shifted products; as a convolution of as many groups as channels.
  'depthwise': ('shifts', 'convolution'),
  # The gradient of a kernel as XLA differentiates; as a matrix product for each
  # tap.
  'kernel_gradient': ('convolution', 'products'),
  # As a fold of strided slices; as XLA's window reduction.
  'pooling': ('slices', 'reduce_window'),
  # Blocks that are alike in training: each by itself; or as a loop, of which
  # there is less to compile.
  'blocks': ('unrolled', 'scanned'),
}

LAYERS = tuple(kind for kind in FORMS if kind != 'blocks')

# Measured on the CPU; on TPU by what its compiler expects; on GPU by what is
# known of it.
_FIRST = {kind: accepted[0] for kind, accepted in FORMS.items()}
BEST = {
  'cpu': _FIRST
  | {'wide': 'winograd', 'kernel_gradient': 'products', 'blocks': 'scanned'},
  'gpu': _FIRST,
  'tpu': _FIRST | {'depthwise': 'convolution', 'pooling': 'reduce_window'},
}

# Platform and (kind, form) pairs. A program that was traced under another
# choice is traced again.
_override = jax.make_user_context((None, ()))


def use(
  platform: str | None = None, **choice: str
) -> AbstractContextManager[None]:
  """What is traced inside has these forms, and else those outside.

  Args:
    platform: take the table of 'cpu', 'gpu' or 'tpu' rather than that of the
      machine, to compile for another one.
    **choice: kind -> form.

  Raises:
    UserError: an unknown name; the message lists the known ones.
  """
  for kind, form in choice.items():
    if kind not in FORMS:
      raise UserError(
        f'forms.use: {kind!r} is no kind of layer; there are '
        f'{", ".join(FORMS)}.'
      )
    if form not in FORMS[kind]:
      raise UserError(
        f'forms.use: {kind} is {form!r}; accepted are {", ".join(FORMS[kind])}.'
      )
  if platform is not None and platform not in BEST:
    raise UserError(
      f'forms.use: platform is {platform!r}; accepted are {", ".join(BEST)}.'
    )
  outer_platform, outer = _override.value
  chosen = tuple(sorted((dict(outer) | choice).items()))
  return _override((platform or outer_platform, chosen))


def current() -> tuple[tuple[str, str], ...]:
  """All kinds with their forms, as pairs."""
  platform, override = _override.value
  platform = platform or jax.default_backend()
  best = BEST.get(platform, BEST['gpu'])
  return tuple((best | dict(override)).items())


def chosen(kind: str) -> str:
  """The form of a kind of layer, at this moment."""
  return dict(current())[kind]
