"""Private parts of JAX exist, and are what the project takes them for."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from resnest_jax import jax_private
from resnest_jax.runtime import count_compilations

ROOT = Path(__file__).resolve().parent.parent
# Names that JAX may change: https://docs.jax.dev/en/latest/jep/25516.
PRIVATE = re.compile(
  r'(from |import )?jax(\.| import .*\b)(_src|core|extend|interpreters|lib)\b'
)


def test_tracers_are_what_is_being_traced():
  seen = []
  jax.make_jaxpr(lambda x: seen.append(x) or x)(1.0)
  assert isinstance(seen[0], jax_private.Tracer)
  assert not isinstance(jnp.ones(2), jax_private.Tracer)


def test_literals_and_functions_inside_of_equations():
  closed = jax.make_jaxpr(lambda x: jax.jit(lambda y: y * 3.0)(x))(1.0)
  (call,) = closed.jaxpr.eqns
  (inner,) = jax_private.jaxprs_in_params(call.params)
  (product,) = inner.eqns
  assert product.primitive.name == 'mul'
  argument, factor = product.invars
  assert not isinstance(argument, jax_private.Literal)
  assert isinstance(factor, jax_private.Literal)
  assert float(factor.val) == 3.0


def test_compilations_are_counted_by_name():
  def a_new_program(x):
    return x * 7 + np.arange(5)

  argument = jnp.zeros(5, jnp.int32)
  with count_compilations() as compiled:
    jax.jit(a_new_program)(argument)
  (name,) = compiled
  assert 'a_new_program' in name


def test_hosts_are_known_before_and_after_they_are_joined(run_script):
  code = """
import jax, socket
from resnest_jax.jax_private import NO_CLUSTER, distributed_state as state
try:
  jax.distributed.initialize()
except ValueError as error:
  assert str(error).startswith(NO_CLUSTER), error
assert state.client is None
with socket.socket() as free:
  free.bind(('localhost', 0))
  address = 'localhost:%d' % free.getsockname()[1]
jax.distributed.initialize(address, 1, 0)
assert state.coordinator_address == address
assert (state.num_processes, state.process_id) == (1, 0)
state.client.key_value_set('resnest_jax/a/0', 'said')
print(state.client.key_value_dir_get('resnest_jax/a/'))
"""
  assert run_script('-c', code).stdout == "[('resnest_jax/a/0', 'said')]\n"


def uses_private_names(path):
  kinds = (ast.Import, ast.ImportFrom, ast.Attribute)
  nodes = ast.walk(ast.parse(path.read_text('utf-8')))
  return any(
    isinstance(node, kinds) and PRIVATE.match(ast.unparse(node))
    for node in nodes
  )


def test_private_names_are_used_from_one_module_alone():
  folders = ('resnest_jax', 'benchmarks', 'configs', 'notebooks', 'tests')
  files = [path for x in folders for path in (ROOT / x).rglob('*.py')]
  users = filter(uses_private_names, [*files, *ROOT.glob('*.py')])
  assert {path.relative_to(ROOT).as_posix() for path in users} == {
    'resnest_jax/jax_private.py',
    # Asks JAX which numbers TPUs have, to compare them with a table.
    'tests/test_notebooks.py',
  }


def test_every_module_imports_where_there_is_no_fcntl(run_script):
  """As on Windows, which is not promised but need not fail at once."""
  code = """
import importlib, pkgutil, sys
sys.modules['fcntl'] = None
import resnest_jax
count = 0
for module in pkgutil.walk_packages(resnest_jax.__path__, 'resnest_jax.'):
  if not module.name.startswith('resnest_jax.scripts'):
    importlib.import_module(module.name)
    count += 1
print(count)
"""
  process = run_script('-c', code, environment={'MPLBACKEND': 'agg'})
  assert int(process.stdout) > 100
