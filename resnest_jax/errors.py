"""The one kind of error that a user is meant to read, and how scripts end."""

import sys
from collections.abc import Callable


class UserError(Exception):
  """Something the user gave cannot be used.

  The message says what was given, what is accepted, and what to do next.
  Scripts print it without a traceback and exit with status 1.
  """


class UnreadableSample(UserError):
  """A sample's files or records are missing or damaged.

  With `data.skip_unreadable` training goes on without it.
  """


def run(main: Callable[[], None]) -> None:
  """Runs a script's `main` and ends the process as a user expects.

  A `UserError` and a device out of memory become one line and status 1,
  Ctrl-C one line and status 130.
  """
  try:
    main()
  except UserError as error:
    _exit(f'error: {error}', 1)
  except KeyboardInterrupt:
    _exit('stopped; the same command goes on from what is finished.', 130)
  except RuntimeError as error:  # jax.errors.JaxRuntimeError is one.
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    _exit(
      'error: the device has too little memory '
      f'({str(error).splitlines()[0][:160]}). Try a smaller batch or crop, '
      'model.dtype bfloat16, or more devices.',
      1,
    )


def _exit(message: str, status: int) -> None:
  print(message, file=sys.stderr, flush=True)
  sys.exit(status)
