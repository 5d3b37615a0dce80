"""The one kind of error that a user is meant to read, and how scripts end."""

import sys
from collections.abc import Callable


class UserError(Exception):
  """Something the user gave cannot be used.

  The message says what was given, what is accepted, and what to do next.
  Scripts print it without a traceback and exit with status 1.
  """


def run(main: Callable[[], None]) -> None:
  """Runs a script's `main`; a `UserError` becomes one line and status 1."""
  try:
    main()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    sys.exit(1)
