"""Stops a training on a signal, or at hung data, with its state saved.

A thread watches, because Python's own signal handlers wait until the main
thread is back from C code, and compiling takes minutes there. While the main
thread waits for something (data, the compiler, an evaluation) the state does
not change, so that the thread itself saves it and ends the process. Between
two steps the main thread does (`Stopper.requested`).
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from resnest_jax.errors import UserError, leave, say

# What a scheduler shall start again: EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75
# The status that a process ends with after a signal.
STATUS = {
  signal.SIGTERM: TRY_AGAIN,
  signal.SIGUSR1: TRY_AGAIN,  # sbatch --signal=USR1@60
  signal.SIGINT: 130,
}
# Schedulers send a signal to a process and to its group: that is one notice.
DUPLICATE_SECONDS = 2.0
POLL_SECONDS = 0.2

Save = Callable[[], str]


def save_nothing() -> str:
  """For the time in which there is nothing to save."""
  return ''


def never_stuck() -> str:
  """For the time in which no data are read."""
  return ''


class Task(NamedTuple):
  """What is done if the process has to end while the main thread waits."""

  save: Save = save_nothing
  stuck: Callable[[], str] = never_stuck


class Stopper:
  """Knows whether the training has to stop, and ends it.

  Without `listen` nothing ever stops it, as in a notebook.

  Attributes:
    signal: the first that came, or None.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._since = 0.0
    self._lock = threading.Lock()  # Held while the task changes or is done.
    self._task: Task | None = Task()  # None: the main thread is in a step.
    self._ending = False

  @contextlib.contextmanager
  def listen(self) -> Iterator[None]:
    """Watches for signals; to be entered in the main thread."""
    here, there = os.pipe()
    for end in (here, there):
      os.set_blocking(end, False)
    handlers = {}
    for number in STATUS:
      if signal.getsignal(number) != signal.SIG_IGN:  # As nohup and & want it.
        # Enough for Python to write the number into the pipe.
        handlers[number] = signal.signal(number, lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(there, warn_on_full_buffer=False)
    watching = threading.Event()
    thread = threading.Thread(
      target=self._watch, args=(here, watching), daemon=True
    )
    thread.start()
    try:
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
    """Whether to stop now, after `step` finished steps.

    All processes of a run need the same answer, as they save together. With
    several, JAX's preemption service makes them agree on a step.
    """
    if _is_distributed():
      from jax.experimental import multihost_utils

      return multihost_utils.reached_preemption_sync_point(step)
    return self.signal is not None

  def stop(self, save: Save) -> NoReturn:
    """Saves and ends the process from its main thread.

    Reads may hang, so that nothing is closed that would wait for them.
    """
    self._ending = True  # Leave it to this thread.
    said = save()
    if _is_distributed():
      from resnest_jax.distributed import failures

      failures.part()
    leave(self._farewell(said), self._status())

  @contextlib.contextmanager
  def waiting(
    self, save: Save = save_nothing, stuck: Callable[[], str] = never_stuck
  ) -> Iterator[None]:
    """While this lasts the process may be ended at any moment.

    Args:
      save: called before that, in another thread; says what it did.
      stuck: called now and then; why the process has to end, or ''.
    """
    with self._doing(Task(save, stuck)):
      yield

  @contextlib.contextmanager
  def busy(self) -> Iterator[None]:
    """While this lasts the main thread asks itself, with `requested`."""
    with self._doing(None):
      yield

  @contextlib.contextmanager
  def _doing(self, task: Task | None) -> Iterator[None]:
    # Waits here for ever if the process is just being ended.
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
      task = self._task
      if task is None or self._ending:
        continue
      problem = task.stuck()
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
    """Ends the process from another than its main thread, if that waits."""
    with self._lock:
      if self._task is None:
        self._ending = False
        return
      try:
        said = self._task.save()
      except UserError as error:
        leave(f'error: {problem} {error}' if problem else f'error: {error}', 1)
      except BaseException:
        leave(f'error: {problem}\n{traceback.format_exc()}', 1)
      if problem:
        leave(f'error: {problem} {said}', 1)
      leave(self._farewell(said), self._status())

  def _status(self) -> int:
    return STATUS[self.signal] if self.signal else TRY_AGAIN

  def _farewell(self, said: str) -> str:
    name = f'stopped by {self.signal.name}' if self.signal else 'stopped'
    said = f'{name}; {said}' if said else name
    return f'{said}; the same command goes on from what is finished.'


def _is_distributed() -> bool:
  """Whether there are other processes, without importing JAX for it."""
  jax = sys.modules.get('jax')
  return hasattr(jax, 'distributed') and jax.distributed.is_initialized()
