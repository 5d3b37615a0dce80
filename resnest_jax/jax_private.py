"""What any release of JAX may move; tests/test_jax_private.py uses it all."""

from jax._src import distributed
from jax.core import Tracer as Tracer
from jax.extend.core import Literal as Literal
from jax.extend.core import jaxprs_in_params as jaxprs_in_params

# The service that all hosts share, and this host's place among them: public JAX
# needs a backend for that, which may not exist yet or may have failed.
distributed_state = distributed.global_state

# `jax.monitoring` sends it after each compilation, cached or not.
COMPILED = '/jax/core/compile/backend_compile_duration'
# `jax.distributed.initialize` begins its error so if it finds no cluster.
NO_CLUSTER = 'coordinator_address should be defined'
