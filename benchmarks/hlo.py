"""Reads what a compiled program does from XLA's text of it.

`jax.stages.Compiled.as_text()` lists computations, each with instructions. An
instruction of a loop's body counts as often as the loop runs, if XLA knows how
often that is.
"""

import re
from collections import Counter, defaultdict
from typing import NamedTuple

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'collective-permute',
  'all-to-all',
)
# Starts a computation: `%name (parameters) -> result {`, or `ENTRY %name ...`.
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
# `%name = shape opcode(operands), attributes`; shapes of tuples have blanks.
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][\w\-]*)\((.*)$'
)
_SHAPE = re.compile(r'\b(pred|bf16|[usf]\d+|f8\w+|c\d+)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(?:calls|body|to_apply)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r'\bcondition=%?([\w.\-]+)')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


class Collective(NamedTuple):
  """Messages of one kind in a step.

  Attributes:
    count: how many.
    bytes: of their results on one device, in all.
  """

  count: int = 0
  bytes: int = 0


class Contents(NamedTuple):
  """What one device does in a call of the program.

  Attributes:
    collectives: by kind, without those that are not there.
    dtypes: of all-reduces, bytes by the type of their numbers.
    gathered: bytes of the largest result of an all-gather, or 0.
    custom_calls: by target, such as '__cudnn$convForward'.
    fusions: how many run.
    endless: loops whose length XLA does not know; they count once.
  """

  collectives: dict[str, Collective]
  dtypes: dict[str, int]
  gathered: int
  custom_calls: dict[str, int]
  fusions: int
  endless: int


class _Instruction(NamedTuple):
  shape: str
  opcode: str
  rest: str


def shape_bytes(shape: str) -> Counter[str]:
  """Bytes by type of number: 'f32[2,3]{1,0}' -> {'f32': 24}; tuples as well."""
  found: Counter[str] = Counter()
  for dtype, dimensions in _SHAPE.findall(shape):
    size = _itemsize(dtype)
    for length in filter(None, dimensions.split(',')):
      size *= int(length)
    found[dtype] += size
  return found


def _itemsize(dtype: str) -> int:
  if dtype == 'pred' or dtype.startswith('f8'):
    return 1
  return -(-int(re.search(r'\d+$', dtype)[0]) // 8)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Instructions by computation, and the name of the first to run."""
  found: dict[str, list[_Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = found.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(_Instruction(*match.groups()))
  return found, entry


def _trips(loop: str, computations: dict[str, list[_Instruction]]) -> int:
  """How often a loop runs, from its attributes or condition; 0: not known."""
  if known := _TRIPS.search(loop):
    return int(known[1])
  condition = computations.get(_CONDITION.search(loop)[1], [])
  constants = [
    rest.partition(')')[0]
    for shape, opcode, rest in condition
    if opcode == 'constant' and re.match(r's\d+\[\]', shape)
  ]
  below = any('direction=LT' in rest for _, _, rest in condition)
  return int(constants[0]) if below and len(constants) == 1 else 0


def read(text: str) -> Contents:
  """What a program does, from its text after optimisation."""
  computations, entry = _computations(text)
  collectives: dict[str, Collective] = defaultdict(Collective)
  dtypes: Counter[str] = Counter()
  targets: Counter[str] = Counter()
  totals: Counter[str] = Counter()

  def visit(name: str, times: int) -> None:
    for shape, opcode, rest in computations[name]:
      # What starts and ends apart has its result where it ends.
      kind = opcode.removesuffix('-done')
      if kind in COLLECTIVES:
        sizes = shape_bytes(shape)
        before = collectives[kind]
        collectives[kind] = Collective(
          before.count + times, before.bytes + times * sizes.total()
        )
        if kind == 'all-reduce':
          dtypes.update({key: times * size for key, size in sizes.items()})
        if kind == 'all-gather':
          totals['gathered'] = max(totals['gathered'], sizes.total())
      elif opcode == 'custom-call':
        targets[_TARGET.search(rest)[1]] += times
      elif opcode == 'fusion':
        totals['fusions'] += times
      if opcode.endswith('-done') or opcode in ('reduce', 'all-reduce'):
        continue
      trips = 1
      if opcode == 'while':
        trips = _trips(rest, computations)
        totals['endless'] += not trips
        trips = trips or 1
      called = _CALLED.findall(rest)
      for names in _BRANCHES.findall(rest):
        called += re.findall(r'[\w.\-]+', names)
      for other in called:
        if other in computations:
          visit(other, times * trips)

  visit(entry, 1)
  return Contents(
    dict(collectives),
    dict(dtypes),
    totals['gathered'],
    dict(targets),
    totals['fusions'],
    totals['endless'],
  )
