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

# How long a host may be silent before the others give up.
HEARTBEAT_SECONDS = 20
_ALIVE = 'resnest_jax/alive/'
_ENDED = 'resnest_jax/ended/'
_AGAIN = (
  'Start the same command on all hosts again: it resumes from the newest '
  'checkpoint.'
)

# Set once this process is about to end: it must not end a second time, with
# another host's reason.
_leaving = threading.Event()
_began = 0.0  # `time.monotonic()` when this process began to listen.
# Host -> its last heartbeat, and when it arrived by this host's clock: the
# clocks of hosts differ, so times are never sent.
_heard: dict[int, tuple[str, float]] = {}


def start() -> None:
  """Watches the other hosts, in a thread."""
  global _began
  _began = time.monotonic()
  threading.Thread(target=_watch, daemon=True).start()


def stop() -> None:
  """Stops watching: from here on the others may end."""
  _leaving.set()


def part() -> None:
  """Waits until all hosts are here; then each has to end its process."""
  from resnest_jax.distributed import messages

  messages.wait_for_all('part')
  stop()
  # JAX's service lives in the first host. Were it gone before the others have
  # ended, they would report a failure.
  if messages.is_first():
    time.sleep(3)


def _watch() -> None:
  import jax

  from resnest_jax.distributed import messages

  name, count = socket.gethostname(), 0
  while not _leaving.wait(1):
    try:
      count += 1
      # A heartbeat every three seconds, so that `_silent` can name the host
      # that is gone: JAX's own message names a task number at most.
      if count % 3 == 0:
        key = f'{_ALIVE}{jax.process_index()}'
        messages.service().key_value_set(
          key, f'{name} {count}', allow_overwrite=True
        )
        for number, text in _said(_ALIVE).items():
          if _heard.get(number, ('', 0.0))[0] != text:
            _heard[number] = text, time.monotonic()
      reason = _reason_of_others()
    except Exception:
      # The service is gone. JAX notices as well and aborts the process, which
      # `_aborted` explains.
      return
    if reason and not _leaving.is_set():
      end(reason)


def _said(folder: str) -> dict[int, str]:
  """The entries of the other hosts in a folder of the service, by host."""
  import jax

  from resnest_jax.distributed import messages

  pairs = messages.service().key_value_dir_get(folder)
  said = {int(key.rpartition('/')[2]): text for key, text in pairs}
  said.pop(jax.process_index(), None)
  return said


def _reason_of_others() -> str:
  said = _said(_ENDED)
  return f'host {min(said)} has ended: {said[min(said)]}' if said else ''


def _silent() -> str:
  """The hosts whose heartbeats are overdue."""
  # Runs in a signal handler while JAX aborts, maybe with JAX's locks held: no
  # call into jax, and none to the service.
  from resnest_jax.jax_private import distributed_state as shared

  limit = time.monotonic() - HEARTBEAT_SECONDS / 2
  silent = []
  for number in range(shared.num_processes):
    # A host that exited early has never sent a heartbeat.
    text, heard = _heard.get(number, ('', _began))
    if number != shared.process_id and heard < limit:
      name = f' ({text.split()[0]})' if text else ''
      silent.append(f'host {number}{name}')
  if silent:
    return ', '.join(silent)
  # No heartbeat is overdue yet: the service itself has ended, with host 0.
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
  """Announces an error to the other hosts and ends this process.

  Returns if there are no other hosts.
  """
  # Raising it would run the exits of Orbax and JAX, which wait for all hosts.
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
    # The service ends with the first host: the others have to read this first.
    if messages.is_first():
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
  # JAX has no type of its own for it; the libraries below raise either.
  if not isinstance(error, RuntimeError | ValueError):
    return False
  names = ('gloo', 'nccl', 'collective', 'coordination', 'heartbeat')
  return any(name in str(error).lower() for name in names)


def _wait_for_reason(message: str) -> str:
  # The host that failed announces why, but maybe later than the collective
  # operation fails here. If it was killed it says nothing, and JAX's service
  # ends this process meanwhile, through `_aborted`.
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
  # Neither print nor sys.exit: buffers and locks may be in use, and this may
  # run in a signal handler.
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
  """Prints the remedy as the last line when JAX aborts the process."""
  # JAX aborts from a thread of its own when a host is gone. Python would run
  # its handlers in the main thread only, which waits in C code: hence a C
  # handler by ctypes.
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


def end_as_usual_on_abort() -> None:
  ctypes.CDLL(None).signal(int(signal.SIGABRT), None)
