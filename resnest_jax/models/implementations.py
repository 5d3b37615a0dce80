"""Which of its forms a layer is computed in, in one table.

Some layers can be written for XLA in several ways that give the same result,
up to rounding, and the same parameters. Which is fastest depends on the
hardware, not on the network, so this is no key of a configuration: `BEST` has
the choice for each platform, and it can be overridden

- for a process: RESNEST_JAX_FORMS='grouped=grouped pooling=reduce_window'
- in Python: `with forms.use(grouped='block_diagonal'): ...`

while a program is traced; that of 'blocks' while a training is set up, whose
state it shapes. docs/performance.md says what was measured.
"""

import functools
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager

import jax

from resnest_jax.errors import UserError

VARIABLE = 'RESNEST_JAX_FORMS'

# Kind of layer -> its forms.
FORMS = {
  # As one dense convolution a group; as XLA's grouped convolution; as one
  # dense convolution whose kernel is zero between groups.
  'grouped': ('split', 'grouped', 'block_diagonal'),
  # As XLA's convolution with spaced taps; as one without on every d-th row and
  # column, where d divides height and width.
  'dilated': ('spaced_taps', 'space_to_batch'),
  # A 3x3 convolution of many channels: as it is; with fewer multiplications.
  'wide': ('convolution', 'winograd'),
  # As k * k shifted products; as a convolution of as many groups as channels.
  'depthwise': ('shifts', 'convolution'),
  # A 1x1 convolution as a matrix product, or as it is.
  'pointwise': ('dot', 'convolution'),
  # The gradient of a kernel as XLA differentiates; as a matrix product for each
  # tap.
  'kernel_gradient': ('convolution', 'products'),
  # The convolution over an upsampled pyramid on the pyramid's own bins; or
  # over the concatenation.
  'pyramid': ('low_rank', 'concatenated'),
  # As a fold of strided slices; as XLA's window reduction.
  'pooling': ('slices', 'reduce_window'),
  # Blocks that are alike in training: each by itself; or as a loop, of which
  # there is less to compile.
  'blocks': ('unrolled', 'scanned'),
  # The backward pass of batch normalisation by hand, keeping its input alone;
  # or by differentiation of the forward pass.
  'norm': ('custom_vjp', 'autodiff'),
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
  _check(choice, 'forms.use')
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
  return tuple((best | of_process() | dict(override)).items())


def chosen(kind: str) -> str:
  """The form of a kind of layer, at this moment."""
  return dict(current())[kind]


def of_process() -> dict[str, str]:
  """What the environment of this process chooses, by kind."""
  return _parse(os.environ.get(VARIABLE, ''))


@functools.cache
def _parse(text: str) -> dict[str, str]:
  """'kind=form kind=form', with spaces or commas between."""
  words = text.replace(',', ' ').split()
  choice: dict[str, str] = {}
  for word in words:
    kind, equals, form = word.partition('=')
    if not equals or kind in choice:
      raise UserError(
        f'{VARIABLE}: {word!r} is '
        f'{"one more of its kind" if equals else "no KIND=FORM"}; write '
        "'KIND=FORM KIND=FORM', each kind once."
      )
    choice[kind] = form
  _check(choice, VARIABLE)
  return choice


def _check(choice: Mapping[str, str], where: str) -> None:
  for kind, form in choice.items():
    if kind not in FORMS:
      raise UserError(
        f'{where}: {kind!r} is no kind of layer; there are {", ".join(FORMS)}.'
      )
    if form not in FORMS[kind]:
      raise UserError(
        f'{where}: {kind} is {form!r}; accepted are {", ".join(FORMS[kind])}.'
      )
