"""Errors for users to read, and the ends of scripts."""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from resnest_jax.text import without_secrets


class UserError(Exception):
  """Something the user gave cannot be used.

  The message says what was given, what is accepted, and what to do next.
  Scripts print it without a traceback and exit with status 1. Passwords and
  tokens in addresses are left out.
  """

  def __str__(self) -> str:
    return without_secrets(super().__str__())


class UnreadableSample(UserError):
  """A sample's files are missing or damaged; see `data.skip_unreadable`."""


class DamagedCheckpoint(UserError):
  """A checkpoint is incomplete or has changed since it was written.

  `why` is the message without the remedy, for a resume that falls back to an
  older checkpoint.
  """

  def __init__(self, why: str, remedy: str):
    super().__init__(f'{why}. {remedy}')
    self.why = why


class UnwritableError(UserError):
  """The system refused to write a file."""


_REMEDIES = {
  errno.ENOSPC: 'Free space there',
  errno.EDQUOT: 'Free space there, or raise the quota',
  errno.EFBIG: 'Raise the limit of file sizes (ulimit -f)',
  errno.EROFS: 'Make it writable again',
  errno.EACCES: 'Give this process the right to write there',
  errno.EPERM: 'Give this process the right to write there',
}
# Only writing raises these. EACCES and EPERM may come from reading as well.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turns the system's refusal to write `path` into an `UnwritableError`."""
  try:
    yield
  # TensorStore raises ValueError, with the errno in its text.
  except (OSError, ValueError) as error:
    number = system_error(error)
    if number is None:
      raise
    remedy = _REMEDIES.get(number, 'See whether the storage is in order')
    raise UnwritableError(
      f'{path} cannot be written: {os.strerror(number)}. {remedy}; the same '
      'command then resumes from what is finished.'
    ) from error


@contextlib.contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
  """Turns a device's lack of memory into a `UserError` ending in `remedy`."""
  try:
    yield
  except RuntimeError as error:  # The base of jax.errors.JaxRuntimeError.
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UserError(
      'the device has too little memory '
      f'({str(error).splitlines()[0][:160]}). {remedy}'
    ) from error


def system_error(error: Exception) -> int | None:
  """The errno of an error of Python or TensorStore, or None."""
  if isinstance(error, OSError):
    return error.errno
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else None


def run(
  main: Callable[[], None],
  stopped: str = 'stopped; the same command resumes from what is finished.',
) -> None:
  """Runs a script's `main` and ends the process as a user expects.

  A `UserError` and a device out of memory become one line and status 1,
  Ctrl-C the line `stopped` and status 130.
  """
  _print_all_characters()
  try:
    with enough_memory(
      'Try a smaller batch or crop, model.dtype bfloat16, or more devices.'
    ):
      main()
  # Orbax leaves threads that wait for data that will never be written, and the
  # interpreter would wait for them.
  except UnwritableError as error:
    leave(f'error: {error}', 1)
  except UserError as error:
    _exit(f'error: {error}', 1)
  except KeyboardInterrupt:
    _exit(stopped, 130)
  # A write outside of `writing`. Any other OSError is a bug of ours.
  except OSError as error:
    if error.errno not in _REFUSED:
      raise
    _exit(
      f'error: {error.filename or "a file"} cannot be written: '
      f'{error.strerror}. {_REMEDIES[error.errno]}.',
      1,
    )


def _print_all_characters() -> None:
  """Escapes what the terminal's encoding lacks, such as names not in UTF-8."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def leave(message: str, status: int) -> NoReturn:
  """Ends the process now, from any thread, without waiting for others."""
  say(message)
  # os._exit does not flush, and sys.exit would end the calling thread only.
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  os._exit(status)


def say(message: str) -> None:
  # The terminal may be gone, which must not replace the end of the process.
  with contextlib.suppress(OSError):
    print(message, file=sys.stderr, flush=True)


def _exit(message: str, status: int) -> None:
  print(message, file=sys.stderr, flush=True)
  sys.exit(status)
