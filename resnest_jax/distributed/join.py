"""Connects the hosts of a run, and disconnects them at its end.

Each host runs the same command. `jax.distributed` finds the others on TPU
pods, SLURM, Open MPI and Kubernetes; elsewhere flags name them. The first host
alone writes files and prints.
"""

import argparse
import contextlib
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from resnest_jax.errors import UserError

_LONGEST = 7 * 24 * 60 * 60
_MOST_PROCESSES = 2**20


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """Adds the flags of `joined`."""
  add = parser.add_argument_group('several hosts (docs/scale.md)').add_argument
  add(
    '--coordinator',
    metavar='HOST:PORT',
    help='address of host 0 and a free port there; not needed on TPU pods, '
    'SLURM, Open MPI and Kubernetes',
  )
  add(
    '--num_processes', type=int, metavar='N', help='1: do not look for others'
  )
  add('--process_id', type=int, metavar='I', help='of this one, 0 to N - 1')
  add(
    '--connect_timeout',
    type=int,
    default=300,
    metavar='SECONDS',
    help='how long to wait for the others (default: 300)',
  )
  return parser


@contextlib.contextmanager
def joined(
  flags: argparse.Namespace,
  facts: Mapping[str, Any],
  stop_together: bool = False,
) -> Iterator[None]:
  """Connects the hosts, if there are several, before JAX computes anything.

  With `stop_together` SIGTERM does not end a host; JAX's
  `reached_preemption_sync_point` tells all of them. Raises `UserError` if flags
  are wrong, or hosts differ in JSON-able `facts`.
  """
  if not _connect(flags, stop_together):
    yield
    return
  import jax

  from resnest_jax.distributed import failures, messages
  from resnest_jax.jax_private import distributed_state

  with contextlib.ExitStack() as stack, failures.leaving():
    failures.start()
    # Else they show much later: as a hang, or as results nobody can repeat.
    messages.check_same(
      {**facts, '--num_processes': distributed_state.num_processes},
      'started',
      'was started with other settings or versions than host 0 ({}). Use the '
      'same command and the same environment on all hosts.',
    )
    if not messages.is_first():
      nowhere = stack.enter_context(open(os.devnull, 'w'))
      stack.enter_context(contextlib.redirect_stdout(nowhere))
    yield
    # Nobody may leave while another host still needs the service.
    messages.wait_for_all('end')
    failures.stop()
  jax.distributed.shutdown()


def _connect(flags: argparse.Namespace, stop_together: bool) -> bool:
  """Returns whether this is now one of several hosts."""
  import jax

  if not 0 < flags.connect_timeout <= _LONGEST:
    raise UserError(
      f'--connect_timeout is {flags.connect_timeout}; it must be from 1 to '
      f'{_LONGEST} seconds.'
    )
  # The service's handler swallows SIGTERM: evaluation would ignore the signal.
  jax.config.update('jax_enable_preemption_service', stop_together)
  if flags.num_processes == 1:
    return False
  names = ('coordinator', 'num_processes', 'process_id')
  given = {name: getattr(flags, name) for name in names}
  absent = [f'--{name}' for name in names if given[name] is None]
  if 0 < len(absent) < 3:
    raise UserError(
      f'--coordinator, --num_processes and --process_id go together; '
      f'missing: {", ".join(absent)}.'
    )
  if absent:
    return _find_others(flags.connect_timeout)
  _check_flags(**given)
  if flags.process_id == 0:
    _check_port(flags.coordinator)
  from resnest_jax.distributed.failures import JOINING

  try:
    _initialize(flags.connect_timeout, *given.values())
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'the hosts cannot join at {flags.coordinator} '
      f'({str(error).splitlines()[0][:200]}). {JOINING}'
    ) from error
  return True


def _check_port(coordinator: str) -> None:
  # JAX would share the port with another program of its kind, or fail in C++.
  port = int(coordinator.rpartition(':')[2])
  try:
    with socket.create_server(('', port)):
      pass
  except OSError as error:
    raise UserError(
      f'the port {port} of --coordinator {coordinator} cannot be opened here '
      f'({os.strerror(error.errno)}). Give all hosts another one, and start '
      'this process, --process_id 0, once and on that machine.'
    ) from error


def _check_flags(coordinator: str, num_processes: int, process_id: int) -> None:
  host, colon, port = coordinator.rpartition(':')
  if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
    raise UserError(
      f'--coordinator is {coordinator!r}; it must be HOST:PORT, for instance '
      '10.0.0.1:8476.'
    )
  if not 0 < num_processes <= _MOST_PROCESSES:
    raise UserError(
      f'--num_processes is {num_processes}; it must be positive and at most '
      f'{_MOST_PROCESSES}.'
    )
  if not 0 <= process_id < num_processes:
    raise UserError(
      f'--process_id is {process_id}; with --num_processes={num_processes} it '
      f'must be from 0 to {num_processes - 1}, another one on each host.'
    )


def _find_others(timeout: int) -> bool:
  """Joins the cluster that JAX detects; False if it detects none."""
  import jax

  from resnest_jax.jax_private import NO_CLUSTER

  try:
    with warnings.catch_warnings():
      if 'JOB_COMPLETION_INDEX' not in os.environ:  # Of Kubernetes' jobs.
        warnings.simplefilter('ignore')
      _initialize(timeout)
  except ValueError as error:
    if NO_CLUSTER in str(error):
      return False
    raise UserError(
      f'cannot join other hosts ({error}). Give --coordinator, '
      '--num_processes and --process_id, or --num_processes=1 to train alone.'
    ) from error
  except Exception as error:
    # Clouds' metadata servers fail in their own ways; a machine trains alone.
    reason = str(error).strip().splitlines() or [type(error).__name__]
    print(f'no other hosts are known ({reason[0][:200]})', flush=True)
    return False
  # A cluster of one host, such as a SLURM job with one task: nothing to join.
  if jax.process_count() == 1:
    handler = signal.getsignal(signal.SIGTERM)
    jax.distributed.shutdown()
    signal.signal(signal.SIGTERM, handler)  # The service had put its own.
    return False
  return True


def _initialize(timeout: int, address: str = '', *numbers: int) -> None:
  import jax

  from resnest_jax.distributed.failures import HEARTBEAT_SECONDS, catch_aborts

  # JAX aborts a process that waited in vain, with a stack trace. The timer is
  # a minute faster and says what can be done.
  timer = threading.Timer(timeout, _give_up, (timeout, address))
  timer.daemon = True
  timer.start()
  catch_aborts()
  try:
    jax.distributed.initialize(
      address or None,
      *numbers,
      cluster_detection_method='deactivate' if address else None,
      initialization_timeout=timeout + 60,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  finally:
    timer.cancel()


def _give_up(timeout: int, address: str) -> None:
  """Ends the process with the likely reason and its remedy."""
  from resnest_jax.distributed.failures import end
  from resnest_jax.jax_private import distributed_state as state

  address = state.coordinator_address or address
  if not address:
    end(f'no coordinator was found within {timeout} s.')
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), 5).close()
  except OSError as error:
    end(
      f'the coordinator {address} cannot be reached within {timeout} s '
      f'({error.strerror or error}). It is the process with --process_id 0: '
      'start it, and look at the address and at firewalls.'
    )
  end(
    f'not all processes came to {address} within {timeout} s. Start as many '
    'as --num_processes says, each with its own --process_id from 0 on, or '
    'give a longer --connect_timeout.'
  )
