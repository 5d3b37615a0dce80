"""Names of JAX that it may move or drop in any release, used from here alone.

A new JAX is tried by tests/test_jax_private.py first, which uses each of them
as the project does. Importing this imports JAX.
"""

# The client of the service that all hosts share, and who they are. Public JAX
# says neither before a backend is made nor after it has failed.
from jax._src.distributed import global_state as distributed_state

# A value that is being traced, in contrast to an array that is known.
from jax.core import Tracer

# Equations of a traced function: its constants, and functions inside of it.
from jax.extend.core import Literal, jaxprs_in_params

# The event of `jax.monitoring` that ends each compilation, cached or not; its
# keyword `fun_name` names the program.
COMPILED = '/jax/core/compile/backend_compile_duration'
# Begins the error of `jax.distributed.initialize` where it finds no cluster.
NO_CLUSTER = 'coordinator_address should be defined'

__all__ = [
  'COMPILED',
  'NO_CLUSTER',
  'Literal',
  'Tracer',
  'distributed_state',
  'jaxprs_in_params',
]
