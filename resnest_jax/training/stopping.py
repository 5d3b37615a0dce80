"""Stops a training on a signal or at hung data, with its state saved.

A thread watches: Python runs signal handlers only when the main thread is back
from C code, and compiling keeps it there for minutes. While the main thread
waits the state does not change, so the watching thread saves it and ends the
process. Between two steps the main thread does that itself.
"""

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from resnest_jax.errors import TRY_AGAIN, explain, leave, say

STATUS = {
  signal.SIGTERM: TRY_AGAIN,
  signal.SIGUSR1: TRY_AGAIN,  # sbatch --signal=USR1@60
  signal.SIGHUP: TRY_AGAIN,  # The terminal or the connection has ended.
  signal.SIGINT: 130,
}
# Schedulers signal a process and its group: within this time that is one
# notice, not a second one that ends the process at once.
DUPLICATE_SECONDS = 2.0
POLL_SECONDS = 0.2

Words = Callable[[], str]  # `str` itself says nothing.


class _Output:
  """Standard output. Once its reader is gone it stops the run, and is silent.

  Not by SIGPIPE, which comes of any connection that ends.
  """

  def __init__(self, stream: TextIO, lost: Callable[[], None]):
    self._stream, self._lost = stream, lost

  def write(self, text: str) -> int:
    self._guard(self._stream.write, text)
    return len(text)

  def flush(self) -> None:
    self._guard(self._stream.flush)

  def _guard(self, write: Callable, *arguments: str) -> None:
    try:
      write(*arguments)
    except OSError as error:
      # EIO: of a terminal.
      if error.errno not in (errno.EPIPE, errno.EIO):
        raise
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
      self._lost()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


class Stopper:
  """Stops a training; without `listen`, as in a notebook, nothing does."""

  def __init__(self):
    self.rest = 'the same command resumes the run'  # What to do next.
    self.signal: signal.Signals | None = None  # The first that arrived.
    self._since = 0.0
    # Held while the task changes or runs: the state cannot change under a save.
    self._lock = threading.Lock()
    # `save` and `stuck` of `waiting`. None: the main thread is in a step.
    self._task: tuple[Words, Words] | None = str, str
    self._ending = False  # A thread has taken on the end of the process.

  @contextlib.contextmanager
  def listen(self) -> Iterator[None]:
    """Watches for signals; to be entered in the main thread."""
    here, there = os.pipe()
    for end in (here, there):
      os.set_blocking(end, False)
    handlers = {}
    for number in STATUS:
      # nohup and & have signals ignored, and they stay so.
      if signal.getsignal(number) != signal.SIG_IGN:
        # With any Python handler CPython writes the number into the wake-up
        # pipe at once, from C, whatever the main thread does.
        handlers[number] = signal.signal(number, lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(there, warn_on_full_buffer=False)
    watching = threading.Event()
    thread = threading.Thread(
      target=self._watch, args=(here, watching), daemon=True
    )
    thread.start()
    # Where a signal has arrived, this is no second one.
    output = _Output(
      sys.stdout, lambda: self.signal or self._note(signal.SIGPIPE)
    )
    try:
      with contextlib.redirect_stdout(output):
        yield
    finally:
      watching.set()
      signal.set_wakeup_fd(wakeup)
      for number, handler in handlers.items():
        signal.signal(number, handler)
      thread.join()
      os.close(here)
      os.close(there)

  def requested(self, step: int) -> bool:
    """Whether to stop now, after `step` finished steps."""
    # Hosts save together: JAX's preemption service makes them agree on a step.
    if _is_distributed():
      from jax.experimental import multihost_utils

      return multihost_utils.reached_preemption_sync_point(step)
    return self.signal is not None

  def stop(self, save: Words) -> NoReturn:
    """Saves and ends the process from its main thread."""
    self._ending = True  # The watching thread keeps out of it.
    said = save()
    if _is_distributed():
      from resnest_jax.distributed import failures

      failures.part()
    # Not by an exception: reads may hang, and closing would wait for them.
    self._leave(said)

  def waiting(
    self, save: Words = str, stuck: Words = str
  ) -> contextlib.AbstractContextManager[None]:
    """While this lasts the process may be ended at any moment.

    `save` is called before the end, in another thread, and says what it saved.
    `stuck` is polled and says why the process has to end, or ''.
    """
    return self._doing((save, stuck))

  def busy(self) -> contextlib.AbstractContextManager[None]:
    """While this lasts the main thread asks `requested` itself."""
    return self._doing(None)

  @contextlib.contextmanager
  def _doing(self, task: tuple[Words, Words] | None) -> Iterator[None]:
    # Not released while the process is being ended: the main thread stops here.
    with self._lock:
      before, self._task = self._task, task
    try:
      yield
    finally:
      with self._lock:
        self._task = before

  def _watch(self, pipe: int, stopped: threading.Event) -> None:
    while not stopped.is_set():
      ready, _, _ = select.select([pipe], [], [], POLL_SECONDS)
      for number in os.read(pipe, 64) if ready else b'':
        if number in STATUS:
          self._note(signal.Signals(number))
      # Read without the lock, as `_end` looks again with it.
      task = self._task
      if task is None or self._ending:
        continue
      problem = task[1]()
      # Hosts must agree on a step, so a signal alone ends none of several.
      if problem or (self.signal and not _is_distributed()):
        self._ending = True
        # In a thread of its own, so that a second signal is seen.
        threading.Thread(target=self._end, args=[problem], daemon=True).start()

  def _note(self, number: signal.Signals) -> None:
    if self.signal is None:
      self.signal, self._since = number, time.monotonic()
      say(f'{number.name}: stopping; a second signal ends the process at once')
      if _is_distributed() and number != signal.SIGTERM:
        os.kill(os.getpid(), signal.SIGTERM)  # JAX's service knows this one.
    elif time.monotonic() - self._since > DUPLICATE_SECONDS:
      leave(f'{number.name} again: ended at once.', self._status())

  def _end(self, problem: str) -> None:
    with self._lock:
      # The main thread has meanwhile gone on to a step: it stops by itself.
      if self._task is None:
        self._ending = False
        return
      try:
        said = self._task[0]()
      except BaseException as error:
        leave(f'error: {f"{problem} {explain(error)}".lstrip()}', 1)
      if problem:
        leave(f'error: {problem} {said}', 1)
      self._leave(said)

  def _leave(self, said: str) -> NoReturn:
    name = f'stopped by {self.signal.name}' if self.signal else 'stopped'
    said = f'{name}; {said}' if said else name
    leave(f'{said}; {self.rest}.', self._status())

  def _status(self) -> int:
    return STATUS.get(self.signal, TRY_AGAIN)


def _is_distributed() -> bool:
  """Whether other processes have joined, without importing JAX for it."""
  jax = sys.modules.get('jax')
  if not hasattr(jax, 'distributed') or not jax.distributed.is_initialized():
    return False
  from resnest_jax.jax_private import distributed_state

  # Made last: while this host waits for the others, it may end by itself.
  return distributed_state.preemption_sync_manager is not None
