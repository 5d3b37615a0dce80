"""Threads share the cores, and results come in order and not too early."""

import os
import signal
import threading
import time

import pytest

from resnest_jax.threads import map_in_threads, thread_count


@pytest.mark.parametrize('cores', [1, 2, 64])
def test_threads_share_the_cores(monkeypatch, cores):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(cores), False)
  assert thread_count(3) == 3
  assert thread_count() == min(cores, 16)
  assert thread_count(num_processes=8) == max(cores // 8, 1)


def test_order_is_kept_and_few_results_wait():
  """What has been computed is never far ahead of what has been taken."""
  computed = []

  def square(number):
    computed.append(number)
    return number**2

  for i, value in enumerate(map_in_threads(square, range(100), 2, ahead=3)):
    assert value == i**2
    assert len(computed) <= i + 1 + 6
  assert sorted(computed) == list(range(100))


def test_an_error_ends_the_threads_without_the_rest():
  before, begun = threading.active_count(), []

  def fail(number):
    begun.append(number)
    raise ValueError(f'item {number}')

  with pytest.raises(ValueError, match='item 0'):
    list(map_in_threads(fail, iter(range(1000)), 2))
  assert len(begun) <= 9
  assert threading.active_count() == before


def test_an_interrupt_waits_for_what_runs():
  ended = []

  def work(number):
    time.sleep(0.2)  # Until the result is awaited.
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    ended.append(number)

  with pytest.raises(KeyboardInterrupt):
    list(map_in_threads(work, [1], num_threads=1))
  assert ended == [1]
