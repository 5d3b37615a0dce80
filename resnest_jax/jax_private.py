"""The names of JAX that any release may move or drop, in one place.

tests/test_jax_private.py uses each of them as the project does.
"""

# The client of the service that all hosts share, and this host's place among
# them. Public JAX needs a backend for that, which may not exist yet or may have
# failed.
from jax._src.distributed import global_state as distributed_state

# The type of a value that is being traced; everything else is a known array.
from jax.core import Tracer

# Constants in the equations of a traced function, and its inner functions.
from jax.extend.core import Literal, jaxprs_in_params

# `jax.monitoring` sends this event after each compilation, cached or not, with
# the program's name as `fun_name`.
COMPILED = '/jax/core/compile/backend_compile_duration'
# `jax.distributed.initialize` begins its error so if it finds no cluster.
NO_CLUSTER = 'coordinator_address should be defined'

__all__ = [
  'COMPILED',
  'NO_CLUSTER',
  'Literal',
  'Tracer',
  'distributed_state',
  'jaxprs_in_params',
]
