"""Barriers and gathered results of the processes that `join` has connected.

With a single process nothing is exchanged and nobody waits.
"""

import contextlib
import itertools
import json
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.jax_private import distributed_state
from resnest_jax.text import differing, listed

T = TypeVar('T')

# Longer than any two hosts differ; `failures` notices a host that has ended.
PATIENCE_MS = 24 * 60 * 60 * 1000
# In the names of barriers, which serve once; all hosts count alike.
_meetings = itertools.count()


def service() -> Any:
  """JAX's client of the service that all hosts share; Orbax uses it, too."""
  return distributed_state.client


def is_first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def share(number: int) -> range:
  """Which of `number` things are this process': h, h + H, ..."""
  return range(jax.process_index(), number, jax.process_count())


def wait_for_all(name: str) -> None:
  """Waits for all processes. A name serves once."""
  if jax.process_count() > 1:
    service().wait_at_barrier(f'resnest_jax/{name}', PATIENCE_MS)


@contextlib.contextmanager
def first_goes_ahead(name: str) -> Iterator[None]:
  """Lets the first process through, then the others, which find its files."""
  if not is_first():
    wait_for_all(name)
  yield
  if is_first():
    wait_for_all(name)


def check_same(facts: Mapping[str, Any], name: str, what: str) -> None:
  """Compares JSON-able values with the first host's, before any backend exists.

  If they differ, `what` says in a `UserError` what this host has, and a remedy.
  """
  client, key = service(), f'resnest_jax/{name}/0'
  if distributed_state.process_id == 0:
    client.key_value_set(key, json.dumps(facts))
  first = json.loads(client.blocking_key_value_get(key, PATIENCE_MS))
  # JSON knows no tuples.
  lines = differing(first, json.loads(json.dumps(facts)), 'on host 0', 'here')
  if lines:
    said = what.format(listed(lines, 3, '; '))
    raise UserError(f'this host ({socket.gethostname()}) {said}')
  client.wait_at_barrier(f'resnest_jax/{name}/same', PATIENCE_MS)


def check_same_data(facts: Mapping[str, Any]) -> None:
  """Raises `UserError` on a host that reads other data than the first one."""
  if jax.process_count() > 1:
    check_same(
      facts,
      'data',
      'has other data than host 0 ({}). Each image and each draw belongs to '
      'one place of a batch: give all hosts the same files.',
    )


def gather(work: Callable[[], T]) -> list[T]:
  """Lets every process do its work; returns all results, in their order.

  Every process has to call it, as often as the others and in the same order.
  Each waits for the last. Results are anything that pickles. Where the work
  fails its own error is raised, elsewhere a `UserError`.
  """
  if jax.process_count() == 1:
    return [work()]
  # An error is raised after the exchange, in which the others wait.
  mine = failure = message = None
  try:
    mine = work()
  except UserError as error:
    failure, message = error, str(error)
  except Exception as error:
    failure, message = error, f'{type(error).__name__}: {error}'
  parts = [pickle.loads(x) for x in _exchange(pickle.dumps((mine, message)))]
  if failure:
    raise failure
  for index, (_, message) in enumerate(parts):
    if message:
      raise UserError(f'process {index} has failed: {message}')
  return [part for part, _ in parts]


def _exchange(mine: bytes) -> list[bytes]:
  from jax.experimental.multihost_utils import process_allgather

  # Collectives on devices give up after a minute or so, so all meet here first.
  wait_for_all(f'gather/{next(_meetings)}')
  # Arrays of all hosts need one shape.
  lengths = process_allgather(np.array([len(mine)], np.int32)).ravel()
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: len(mine)] = np.frombuffer(mine, np.uint8)
  rows = np.asarray(process_allgather(padded))
  return [
    row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)
  ]
