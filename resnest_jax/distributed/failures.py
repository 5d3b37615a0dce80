"""Ends all hosts of a run when one of them fails, and says which one failed.

The others wait for it inside a collective operation, which no exception
reaches. So each host checks every second whether another one has announced its
end, and JAX's service notices within `HEARTBEAT_SECONDS` that a host is gone.
Either way the process ends with a line that names the host and the remedy.
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

from resnest_jax import errors
from resnest_jax.distributed import messages
from resnest_jax.jax_private import distributed_state as shared

HEARTBEAT_SECONDS = 20  # of silence, after which the others give up.
_ALIVE = 'resnest_jax/alive/'
_ENDED = 'resnest_jax/ended/'
_AGAIN = (
  'Start the same command on all hosts again: it resumes from the newest '
  'checkpoint.'
)

JOINING = (
  'Start one process for each --process_id from 0 to N - 1, all with the same '
  '--coordinator and --num_processes N.'
)

# Set once this process is ending: it must not end again, for another reason.
_leaving = threading.Event()
_began = 0.0  # `time.monotonic()` when this process began to listen.
# Host -> its last heartbeat, and when it arrived by this host's own clock.
_heard: dict[int, tuple[str, float]] = {}


def start() -> None:
  """Watches the other hosts, in a thread, until `stop`."""
  global _began
  _began = time.monotonic()
  threading.Thread(target=_watch, daemon=True).start()


def catch_aborts() -> None:
  """Says what can be done where JAX aborts the process."""
  # Python would run its handlers in the main thread, which waits in C code.
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


def part() -> None:
  """Waits until all hosts are here; then each has to end its process."""
  messages.wait_for_all('part')
  stop()
  _stay_behind()


def stop() -> None:
  """Stops watching: from here on the others may end."""
  _leaving.set()


def _stay_behind() -> None:
  # JAX's service lives in the first host, which therefore ends last.
  if shared.process_id == 0:
    time.sleep(3)


def _say(folder: str, text: str) -> None:
  key = f'{folder}{shared.process_id}'
  messages.service().key_value_set(key, text, allow_overwrite=True)


def _watch() -> None:
  name, count = socket.gethostname(), 0
  while not _leaving.wait(1):
    try:
      count += 1
      # JAX's own message about a host that is gone names a task at most.
      if count % 3 == 0:
        _say(_ALIVE, f'{name} {count}')
        for number, text in _said(_ALIVE).items():
          if _heard.get(number, ('', 0.0))[0] != text:
            _heard[number] = text, time.monotonic()
      reason = _reason_of_others()
    except Exception:  # The service is gone: see `_aborted`.
      return
    if reason and not _leaving.is_set():
      end(reason)


def _said(folder: str) -> dict[int, str]:
  """The entries of the other hosts in a folder of the service, by host."""
  pairs = messages.service().key_value_dir_get(folder)
  said = {int(key.rpartition('/')[2]): text for key, text in pairs}
  said.pop(shared.process_id, None)
  return said


def _reason_of_others() -> str:
  said = _said(_ENDED)
  return f'host {min(said)} has ended: {said[min(said)]}' if said else ''


def _silent() -> str:
  """The hosts whose heartbeats are overdue."""
  # Runs in a signal handler, maybe with JAX's locks held: no call into JAX.
  limit = time.monotonic() - HEARTBEAT_SECONDS / 2
  others = {
    number: _heard.get(number, ('', _began))
    for number in range(shared.num_processes)
    if number != shared.process_id
  }
  silent = [number for number, (_, heard) in others.items() if heard < limit]
  # Where none is overdue yet the service has ended, with host 0. In host 0 it
  # is the service that knew first.
  if not silent and shared.process_id:
    return f'host 0 ({shared.coordinator_address})'
  silent = silent or [min(others, key=lambda number: others[number][1])]

  def named(number: int) -> str:
    text, _ = others[number]
    return f'host {number} ({text.split()[0]})' if text else f'host {number}'

  return ', '.join(map(named, silent))


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Hands an error that comes out of this to `leave`."""
  try:
    yield
  except BaseException as error:
    leave(error)
    raise


def leave(error: BaseException) -> None:
  """Announces an error and ends this process, unless there is no other host."""
  # Raising it would run the exits of Orbax and JAX, which wait for all hosts.
  if shared.num_processes == 1:
    return
  _leaving.set()
  if is_of_a_collective(error):
    end(_wait_for_reason(str(error)))
  lines = str(error).strip().splitlines() or [type(error).__name__]
  if isinstance(error, KeyboardInterrupt):
    lines = ['it was stopped']
  with contextlib.suppress(Exception):
    _say(_ENDED, lines[0][:500])
    _stay_behind()

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
  if not isinstance(error, RuntimeError | ValueError):
    return False
  names = ('gloo', 'nccl', 'collective', 'coordination', 'heartbeat')
  return any(name in str(error).lower() for name in names)


def _wait_for_reason(message: str) -> str:
  # The host that failed may say why after the collective has failed here. If it
  # was killed, JAX's service ends this process meanwhile.
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
  # May run in a signal handler: buffers and locks may be in use.
  os.write(2, f'error: {reason}\n'.encode(errors='backslashreplace'))
  os._exit(1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
  del number
  if not _began:
    end(
      'the hosts cannot join. If another process was started with --process_id '
      f'{shared.process_id}, that is why. {JOINING} The lines above are from '
      'JAX.'
    )
  end(
    f'{_silent()} has been killed, has failed or cannot be reached. '
    f'{_AGAIN} The lines above are from JAX.'
  )
