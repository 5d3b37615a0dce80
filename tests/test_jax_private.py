"""Private parts of JAX exist, and are what the project takes them for."""

import ast
import re

import jax
import jax.numpy as jnp

from resnest_jax import jax_private
from resnest_jax.runtime import count_compilations

# Names that JAX may change: https://docs.jax.dev/en/latest/jep/25516.
PRIVATE = re.compile(
  r'(from |import )?jax(\.| import .*\b)(_src|core|extend|interpreters|lib)\b'
)


def test_tracers_literals_and_functions_inside_of_equations():
  seen, triple = [], jax.jit(lambda y: y * 3.0)
  closed = jax.make_jaxpr(lambda x: seen.append(x) or triple(x))(1.0)
  (inner,) = jax_private.jaxprs_in_params(closed.jaxpr.eqns[0].params)
  (product,) = inner.eqns
  assert product.primitive.name == 'mul'
  literal = [isinstance(x, jax_private.Literal) for x in product.invars]
  assert literal == [False, True]
  assert float(product.invars[1].val) == 3.0
  assert isinstance(seen[0], jax_private.Tracer)
  assert not isinstance(jnp.ones(2), jax_private.Tracer)


def test_compilations_are_counted_by_name():
  def a_new_program(x):
    return x * 7

  with count_compilations() as compiled:
    jax.jit(a_new_program)(5.0)
  (name,) = compiled
  assert 'a_new_program' in name


HOSTS = """import jax, socket
from resnest_jax.jax_private import NO_CLUSTER, distributed_state as state
try:
  jax.distributed.initialize()
except ValueError as error:
  assert str(error).startswith(NO_CLUSTER), error
assert state.client is None
with socket.create_server(('localhost', 0)) as free:
  address = 'localhost:%d' % free.getsockname()[1]
jax.distributed.initialize(address, 1, 0)
assert state.coordinator_address == address
assert (state.num_processes, state.process_id) == (1, 0)
state.client.key_value_set('resnest_jax/a/0', 'said')
print(state.client.key_value_dir_get('resnest_jax/a/'))"""


def test_hosts_are_known_before_and_after_they_are_joined(run_script):
  assert run_script('-c', HOSTS).stdout == "[('resnest_jax/a/0', 'said')]\n"


def uses_private_names(path):
  kinds = ast.Import, ast.ImportFrom, ast.Attribute
  nodes = ast.walk(ast.parse(path.read_text('utf-8')))
  names = (ast.unparse(node) for node in nodes if isinstance(node, kinds))
  return any(map(PRIVATE.match, names))


def test_private_names_are_used_from_one_module_alone(root):
  folders = ('resnest_jax', 'benchmarks', 'configs', 'notebooks', 'tests')
  files = [path for x in folders for path in (root / x).rglob('*.py')]
  users = set(filter(uses_private_names, [*files, *root.glob('*.py')]))
  # The second one asks JAX which numbers TPUs have, to compare them.
  allowed = 'resnest_jax/jax_private.py', 'tests/test_notebooks.py'
  assert users == {root / path for path in allowed}


IMPORT_ALL = """import importlib, pkgutil, sys
sys.modules['fcntl'] = None
import resnest_jax
modules = pkgutil.walk_packages(resnest_jax.__path__, 'resnest_jax.')
names = [x.name for x in modules if '.scripts' not in x.name]
print(len([importlib.import_module(name) for name in names]))"""


def test_every_module_imports_where_there_is_no_fcntl(run_script):
  """As on Windows, which is not promised but need not fail at once."""
  process = run_script('-c', IMPORT_ALL, environment={'MPLBACKEND': 'agg'})
  assert int(process.stdout) > 100
