"""What the other hosts do when one of several fails: end, and say which.

They wait for it inside a collective operation, which no exception reaches. So
each looks every second whether another has said that it ends, JAX's service
notices within `HEARTBEAT_SECONDS` that one is gone, and in either case the
process ends with a line that names it and says what to do.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

# How long a host may be silent before the others give up.
HEARTBEAT_SECONDS = 20
_ALIVE = 'resnest_jax/alive/'
_ENDED = 'resnest_jax/ended/'
_AGAIN = (
  'Start the same command on all hosts again: it goes on from the newest '
  'checkpoint.'
)

_leaving = threading.Event()  # Set once this process is about to end.
_began = 0.0  # When this process began to listen.
_heard: dict[int, tuple[str, float]] = {}  # Host -> what it said last, when.


def start() -> None:
  """Begins to look after the other hosts, in a thread."""
  global _began
  _began = time.monotonic()
  threading.Thread(target=_watch, daemon=True).start()


def stop() -> None:
  """Ends looking after them, as they may end now."""
  _leaving.set()


def part() -> None:
  """Returns once all hosts are here, each of which has to end now."""
  from resnest_jax.distributed import messages

  messages.wait_for_all('part')
  stop()
  if messages.is_first():  # The service ends with it, which the others notice.
    time.sleep(3)


def _watch() -> None:
  """Ends this process once another host has said that it ends."""
  import jax

  from resnest_jax.distributed import messages

  name, count = socket.gethostname(), 0
  while not _leaving.wait(1):
    try:
      count += 1
      if count % 3 == 0:
        key = f'{_ALIVE}{jax.process_index()}'
        messages.service().key_value_set(
          key, f'{name} {count}', allow_overwrite=True
        )
        for number, text in _said(_ALIVE).items():
          if _heard.get(number, ('', 0.0))[0] != text:
            _heard[number] = text, time.monotonic()
      reason = _reason_of_others()
    except Exception:  # The service is gone, of which JAX tells.
      return
    if reason and not _leaving.is_set():
      end(reason)


def _said(folder: str) -> dict[int, str]:
  """What the other hosts have left in a folder of the service."""
  import jax

  from resnest_jax.distributed import messages

  pairs = messages.service().key_value_dir_get(folder)
  said = {int(key.rpartition('/')[2]): text for key, text in pairs}
  said.pop(jax.process_index(), None)
  return said


def _reason_of_others() -> str:
  """Why another host has ended, if one has said so."""
  said = _said(_ENDED)
  return f'host {min(said)} has ended: {said[min(said)]}' if said else ''


def _silent() -> str:
  """Which hosts have not been heard of for a while."""
  # Not of jax, whose locks may be held where JAX aborts.
  from resnest_jax.jax_private import distributed_state as shared

  limit = time.monotonic() - HEARTBEAT_SECONDS / 2
  silent = []
  for number in range(shared.num_processes):
    # Of one that ended early nothing was heard.
    text, heard = _heard.get(number, ('', _began))
    if number != shared.process_id and heard < limit:
      name = f' ({text.split()[0]})' if text else ''
      silent.append(f'host {number}{name}')
  if silent:
    return ', '.join(silent)
  # What aborts at once is the end of the service, which is on host 0.
  return f'host 0 ({shared.coordinator_address})'


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Ends the process as `leave` does where an error comes out of this."""
  try:
    yield
  except BaseException as error:
    leave(error)
    raise


def leave(error: BaseException) -> None:
  """Ends this process after an error and tells the other hosts; none: returns.

  Not by raising it: JAX, and Orbax before it, would wait for all hosts.
  """
  import jax

  from resnest_jax import errors
  from resnest_jax.distributed import messages

  if jax.process_count() == 1:
    return
  _leaving.set()
  if is_of_a_collective(error):
    end(_wait_for_reason(str(error)))
  lines = str(error).strip().splitlines() or [type(error).__name__]
  if isinstance(error, KeyboardInterrupt):
    lines = ['it was stopped']
  with contextlib.suppress(Exception):
    key = f'{_ENDED}{jax.process_index()}'
    messages.service().key_value_set(key, lines[0][:500], allow_overwrite=True)
    if (
      jax.process_index() == 0
    ):  # The service ends with it: let the others read.
      time.sleep(3)

  def fail():
    raise error

  status = 1
  try:
    errors.run(fail)
  except SystemExit as ended:
    status = ended.code
  except BaseException:
    sys.excepthook(*sys.exc_info())
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def is_of_a_collective(error: BaseException) -> bool:
  """Whether an error only says that another host does not answer."""
  # JAX raises one or the other, depending on what fails.
  if not isinstance(error, RuntimeError | ValueError):
    return False
  names = ('gloo', 'nccl', 'collective', 'coordination', 'heartbeat')
  return any(name in str(error).lower() for name in names)


def _wait_for_reason(message: str) -> str:
  """What the others say of why a collective operation failed here.

  JAX's service ends this process meanwhile if it misses a host, and names it.
  """
  deadline = time.monotonic() + 2 * HEARTBEAT_SECONDS
  while time.monotonic() < deadline:
    with contextlib.suppress(Exception):
      if reason := _reason_of_others():
        return reason
    time.sleep(1)
  reason = message.splitlines()[0][:200]
  return f'another host cannot be reached ({reason}). {_AGAIN}'


def end(reason: str) -> None:
  """Ends the process from any thread, without waiting for anything."""
  os.write(2, f'error: {reason}\n'.encode())
  os._exit(1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
  del number
  end(
    f'{_silent()} has been killed, has failed or cannot be reached. '
    f'{_AGAIN} The lines above are from JAX.'
  )


def end_quietly_on_abort() -> None:
  """Has the last line say what to do where JAX aborts the process.

  It does when a host is gone, with a stack trace, and from a thread of its
  own that no Python handler could interrupt.
  """
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


def end_as_usual_on_abort() -> None:
  """Takes that back."""
  ctypes.CDLL(None).signal(int(signal.SIGABRT), None)
