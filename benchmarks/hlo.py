"""Reads what a compiled program does from XLA's text of it.

`jax.stages.Compiled.as_text()` lists computations, each with instructions. An
instruction of a loop's body counts as often as the loop runs, if XLA knows how
often that is.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
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
# Written by the TPU's cost model, which has none for the CPU's programs.
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')

# Kinds of work, each with what it is known by; a fusion is of the first kind
# that any of its instructions has, and moves data if all of them do.
PRODUCTS = {'convolution', 'dot'}
REDUCTIONS = {'reduce', 'reduce-window', 'select-and-scatter'}
MOVES = {
  *('copy', 'slice', 'pad', 'broadcast', 'transpose', 'concatenate'),
  *('reshape', 'bitcast', 'dynamic-slice', 'dynamic-update-slice', 'reverse'),
  *('convert', 'iota', 'constant', 'parameter', 'tuple', 'get-tuple-element'),
}
KINDS = ('products', 'reductions', 'moving data', 'elementwise')


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


class Operation(NamedTuple):
  """One operation of a TPU's program, by the compiler's cost model.

  Attributes:
    name: JAX's, with the modules that it is in; '' if XLA added it.
    kind: of `KINDS`.
    cycles: in all its runs in a call of the program.
  """

  name: str
  kind: str
  cycles: int


class _Instruction(NamedTuple):
  shape: str
  opcode: str
  rest: str


_Computations = dict[str, list[_Instruction]]


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


def _computations(text: str) -> tuple[_Computations, str]:
  """Instructions by computation, and the name of the first to run."""
  found: _Computations = {}
  entry, current = '', None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = found.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(_Instruction(*match.groups()))
  return found, entry


def _trips(loop: str, computations: _Computations) -> int:
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


def _called(
  instruction: _Instruction, computations: _Computations
) -> list[str]:
  """Computations that an instruction runs."""
  names = _CALLED.findall(instruction.rest)
  for branches in _BRANCHES.findall(instruction.rest):
    names += re.findall(r'[\w.\-]+', branches)
  return [name for name in names if name in computations]


def _walk(
  computations: _Computations, name: str, times: int, apart: tuple[str, ...]
) -> Iterator[tuple[_Instruction, int]]:
  """Yields instructions and how often they run, but not those in `apart`."""
  for instruction in computations[name]:
    yield instruction, times
    opcode = instruction.opcode
    if opcode.endswith('-done') or opcode in apart:
      continue
    loop = opcode == 'while'
    trips = _trips(instruction.rest, computations) or 1 if loop else 1
    for other in _called(instruction, computations):
      yield from _walk(computations, other, times * trips, apart)


def read(text: str) -> Contents:
  """What a program does, from its text after optimisation."""
  computations, entry = _computations(text)
  collectives: dict[str, Collective] = defaultdict(Collective)
  dtypes: Counter[str] = Counter()
  targets: Counter[str] = Counter()
  totals: Counter[str] = Counter()
  sums = ('reduce', 'all-reduce')
  for (shape, opcode, rest), times in _walk(computations, entry, 1, sums):
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
    elif opcode == 'while':
      totals['endless'] += not _trips(rest, computations)
  return Contents(
    dict(collectives),
    dict(dtypes),
    totals['gathered'],
    dict(targets),
    totals['fusions'],
    totals['endless'],
  )


def operations(text: str) -> Iterator[Operation]:
  """Yields what the TPU's cost model has an estimate for.

  A fusion is one operation. Copies that run next to others, which start and end
  apart, have no estimate.
  """
  computations, entry = _computations(text)

  def opcodes(instruction: _Instruction) -> set[str]:
    if instruction.opcode != 'fusion':
      return {instruction.opcode}
    inside = _called(instruction, computations)
    return set().union(*(opcodes(x) for y in inside for x in computations[y]))

  for instruction, times in _walk(computations, entry, 1, ('fusion',)):
    cycles = _CYCLES.search(instruction.rest)
    if not cycles or instruction.opcode.endswith('-done'):
      continue
    found = opcodes(instruction)
    if found & PRODUCTS:
      kind = 'products'
    elif found & REDUCTIONS:
      kind = 'reductions'
    else:
      kind = 'moving data' if found <= MOVES else 'elementwise'
    name = _OP_NAME.search(instruction.rest)
    yield Operation(name[1] if name else '', kind, times * int(cycles[1]))
