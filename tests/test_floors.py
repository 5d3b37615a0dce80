"""Imports run down: none goes to a higher floor, none in a circle."""

import ast
import graphlib

PACKAGE = 'resnest_jax'
# docs/architecture.md draws them. Commands and public names see all floors.
FLOORS = (
  'errors labels bands findings files text lettering threads flags shipped '
  'overrides config_keys jax_private untrusted',
  'config runtime distributed drawing models',
  'sharding progress downloads losses',
  'data checkpoints',
  'weights data.doctor',
  'inference',
  'evaluation',
  'training prediction',
  'export demo __main__ __init__',
)


def floor_of(module):
  """Of the longest name in `FLOORS` that the module has or lies in."""
  rooms = [(x, i) for i, floor in enumerate(FLOORS) for x in floor.split()]
  return max(x for x in rooms if f'{module}.'.startswith(f'{x[0]}.'))[1]


def imports_of(path, modules):
  """The modules that a file imports, also inside of functions."""
  for node in ast.walk(ast.parse(path.read_text('utf-8'))):
    if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE):
      base = node.module.removeprefix(PACKAGE).lstrip('.')
      for name in (f'{base}.{x.name}'.lstrip('.') for x in node.names):
        yield name if name in modules else base or '__init__'


def test_imports_run_down_and_not_in_circles(root):
  paths = [x.relative_to(root) for x in (root / PACKAGE).rglob('*.py')]
  files = {'.'.join(x.with_suffix('').parts[1:]): root / x for x in paths}
  # But the version alone, which is a name of the package.
  graph = {x: {*imports_of(files[x], files)} - {'__init__'} for x in files}
  pairs = [(name, other) for name, used in graph.items() for other in used]
  up = [pair for pair in pairs if floor_of(pair[1]) > floor_of(pair[0])]
  assert len(graph) > 100
  assert up == []  # Each imports the second one.
  graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError.
