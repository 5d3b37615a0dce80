"""Errors for users to read, and the ends of scripts."""

import contextlib
import errno
import functools
import importlib
import io
import os
import re
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from resnest_jax.text import for_terminals, shorten, without_secrets

# With it every command also prints the traceback of the error it ends with.
TRACEBACK = '--traceback'
# EX_TEMPFAIL of sysexits.h: schedulers are told to start such a job again.
TRY_AGAIN = 75
RESUMES = 'stopped; the same command resumes from what is finished.'
_PACKAGE = os.path.dirname(__file__)
# Exit status where nobody reads the output, as shells give it to SIGPIPE.
OUTPUT_GONE = 128 + signal.SIGPIPE


class UserError(Exception):
  """Something the user gave cannot be used.

  The message says what was given, what is accepted, and what to do next.
  Scripts print it without a traceback and exit with status 1.
  """

  def __str__(self) -> str:
    return for_terminals(without_secrets(super().__str__()))


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


class NotWrittenInTime(UnwritableError):
  """A write does not end; another start may succeed (status 75)."""


_REMEDIES = {
  errno.ENOSPC: 'Free space there',
  errno.EDQUOT: 'Free space there, or raise the quota',
  errno.EFBIG: 'Raise the limit of file sizes (ulimit -f)',
  errno.EROFS: 'Make it writable again',
  errno.EACCES: 'Give this process the right to write there',
  errno.EPERM: 'Give this process the right to write there',
}
# Of what a user gave, whether it was to be read or written.
_OF_NAMES = {
  errno.ENAMETOOLONG: 'Give a shorter name',
  errno.EACCES: 'Give this process the right to it',
  errno.EPERM: 'Give this process the right to it',
  errno.EMFILE: 'Raise the limit of open files (ulimit -n)',
  errno.ENFILE: 'Close files of other programs',
  errno.EIO: 'See whether the storage is in order',
  errno.ESTALE: 'See whether the storage is in order',
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
  """Turns a lack of memory into a `UserError` that ends in `remedy`."""
  try:
    yield
  # RuntimeError is the base of jax.errors.JaxRuntimeError.
  except (RuntimeError, MemoryError) as error:
    of = 'this machine' if isinstance(error, MemoryError) else 'the device'
    # Errors of dispatch have the second alone.
    of_memory = re.search('RESOURCE_EXHAUSTED|Out of memory', str(error))
    if of == 'the device' and not of_memory:
      raise
    raise UserError(
      f'{of} has too little memory ({_first_line(error)[:160]}). {remedy}'
    ) from error


@contextlib.contextmanager
def ending(remedy: str) -> Iterator[None]:
  """Ends the messages of errors with a remedy."""
  try:
    yield
  except UserError as error:
    raise UserError(f'{error} {remedy}') from error


def system_error(error: Exception) -> int | None:
  """The errno of an error of Python or TensorStore, or None."""
  if isinstance(error, OSError):
    return error.errno
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else None


def run(
  main: Callable[[], None],
  stopped: str = 'stopped; the same command begins again.',
) -> None:
  """Runs a script's `main` and ends the process as a user expects.

  Any error becomes one line and status 1, Ctrl-C the line `stopped` and status
  130, an output that nobody reads the same line and status 141.
  """
  _open_streams()
  interrupted = functools.partial(_interrupted, stopped)
  # Not in a job of the background, whose shell had SIGINT ignored.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with contextlib.suppress(ValueError):  # Not the main thread.
      signal.signal(signal.SIGINT, interrupted)
  try:
    with enough_memory(
      'Try a smaller batch, crop or image_scale, the protocol slide, '
      'model.dtype bfloat16, or more devices.'
    ):
      try:
        main()
      except SystemExit:
        sys.stdout.flush()
        raise
      # The interpreter's own flush would print a traceback where it fails.
      sys.stdout.flush()
  except KeyboardInterrupt:
    here = threading.current_thread()
    # A read that hangs would hold up an end that waits for its thread.
    wait = all(x is here or x.daemon for x in threading.enumerate())
    _exit(stopped, 130, wait=wait)
  except Exception as error:
    if TRACEBACK in sys.argv:
      with contextlib.suppress(OSError):
        traceback.print_exc()
    if isinstance(error, OSError) and _output_is_gone():
      leave(f'nobody reads the output: {stopped}', OUTPUT_GONE)
    # Orbax leaves threads that wait for data that will never be written, and
    # the interpreter would wait for them.
    wait = not isinstance(error, UnwritableError)
    status = TRY_AGAIN if isinstance(error, NotWrittenInTime) else 1
    _exit(f'error: {explain(error)}', status, wait=wait)
  # All is done: Ctrl-C while the interpreter ends is no error of ours.
  if signal.getsignal(signal.SIGINT) is interrupted:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_module(name: str, *stopped: str) -> None:
  """Runs the `main` of a module; Ctrl-C while it is imported is one line."""
  run(lambda: importlib.import_module(name).main(), *stopped)


def _interrupted(stopped: str, number: int, frame: FrameType | None) -> None:
  """Handles SIGINT as Python does, but for imports."""
  del number
  while frame:
    # Libraries in C that import Python code print KeyboardInterrupt, and end
    # in an ImportError.
    if frame.f_code.co_filename == '<frozen importlib._bootstrap>':
      leave(stopped, 130)
    frame = frame.f_back
  raise KeyboardInterrupt


def _open_streams() -> None:
  for number, name in enumerate(('stdout', 'stderr'), 1):
    # Started with `>&-`. The next file would get the number of the stream, and
    # what C code prints.
    if getattr(sys, name) is None:
      os.dup2(os.open(os.devnull, os.O_WRONLY), number)
      setattr(sys, name, os.fdopen(number, 'w', closefd=False))
    # What the terminal's encoding lacks, such as names not in UTF-8.
    if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def _output_is_gone() -> bool:
  """Whether the reader of standard output has ended, as `head` does."""
  poll = select.poll()
  poll.register(1, 0)  # Errors alone.
  return bool(poll.poll(0))


def explain(error: BaseException) -> str:
  """Says in a line what an error means for the user, whatever it is."""
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, OSError) and error.errno and error.strerror:
    name = os.fsencode(error.filename or 'a file').decode('utf-8', 'replace')
    name = shorten(name, 120)
    if error.errno in _REFUSED:
      remedy = _REMEDIES[error.errno]
      return f'{name} cannot be written: {error.strerror}. {remedy}.'
    if error.filename:
      remedy = _OF_NAMES.get(error.errno, 'See whether that is what you meant')
      return (
        f'{name} cannot be used: {error.strerror}. {remedy}; {TRACEBACK} '
        'shows what it was needed for.'
      )
  absent = getattr(error, 'name', None) or __package__
  is_missing = isinstance(error, ModuleNotFoundError)
  if is_missing and absent.partition('.')[0] != __package__:
    return (
      f'the package {absent} is missing. Activate the environment of this '
      'project (. .venv/bin/activate), or install what requirements.txt lists '
      '(docs/install.md).'
    )
  return _fault(error)


def _fault(error: BaseException) -> str:
  """An error that nobody foresaw: a fault of ours until it is looked at."""
  told = f'{TRACEBACK} prints the traceback'
  # The fault of a long run may never come again.
  with contextlib.suppress(OSError):
    number, path = tempfile.mkstemp('.txt', 'resnest_jax_error_')
    with open(number, 'w', encoding='utf-8', errors='replace') as file:
      traceback.print_exception(error, file=file)
    told = f'the traceback is in {path}'
  frames = traceback.extract_tb(error.__traceback__)
  frames = [x for x in frames if x.filename != __file__]
  ours = [x for x in frames if x.filename.startswith(_PACKAGE)] or frames
  where = f' ({ours[-1].filename}, line {ours[-1].lineno})' if ours else ''
  return (
    f'{_first_line(error)}{where}. This looks like a fault of resnest-jax: '
    f'please report it with the command; {told}.'
  )


def _first_line(error: BaseException) -> str:
  (line, *_) = str(error).strip().splitlines() or ['']
  return shorten(f'{type(error).__name__}: {line}' if line else repr(error))


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


def _exit(message: str, status: int, wait: bool) -> NoReturn:
  if not wait:
    leave(message, status)
  say(message)
  sys.exit(status)
