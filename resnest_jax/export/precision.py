"""Smaller ONNX files: float16, or int8 where that costs no agreement.

In an int8 file inputs and weights of convolutions and products have 8 bits, in
ranges that half of the pictures show. Layers that cost most agreement compute
in float, with weights in 16 bits while the file stays small, and else in 8; so
do those whose input is one vector a picture, which shows no range. The other
half of the pictures decides whether it is written.
"""

import bisect
import copy
import functools
import tempfile
import timeit
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization import shape_inference
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.transformers import float16

from resnest_jax.errors import UserError
from resnest_jax.export.card import Export
from resnest_jax.export.checks import Reference
from resnest_jax.export.onnx_file import read_onnx
from resnest_jax.files import plain_name
from resnest_jax.labels import IGNORE
from resnest_jax.progress import progress_bar
from resnest_jax.text import plural

MOST = 0.295  # Of float32's bytes: layers stay in float up to this size.
# Standard errors by which calibration pictures must agree better than asked.
MARGIN = 3.0
PIXELS = 2**14  # That are enough to compare layers.
LAYERS = ('Conv', 'MatMul')
ROUNDED = '_DequantizeLinear_Output'  # What onnxruntime appends to names.
# In float32 also in a float16 file: normalisation, means, attention, and the
# products and the argmax that turn scores into labels.
WHOLE = ('Sub', 'Div', 'Exp', 'ReduceSum', 'ReduceMax', 'Einsum', 'ArgMax')
ROUNDS = 7  # Of both files in turn; medians count.

Model = onnx.ModelProto


def write_reduced(
  kind: str, file: Path, reference: Reference, whole: Export, agreement: float
) -> Export:
  """Writes a smaller file next to `file`, the one in float32, of `whole`.

  Raises `UserError` unless at least `agreement`, 0 to 1, of the pixels of the
  held-out pictures have the checkpoint's class.
  """
  path, best = file.with_name(f'{file.stem}_{kind}{file.suffix}'), 0.0
  held = range(1, reference.number, 2)
  model, bytes_ = _prepared(file), file.stat().st_size
  candidates = _halves(model)
  if kind == 'int8':
    candidates = _quantised(model, reference, agreement, MOST * bytes_)
  for found in candidates:
    reduced, kept = found
    same, seen = (x.sum(0) for x in count_same(reduced, reference, held))
    share = float(same.sum() / seen.sum())
    best = max(best, share)
    if share >= agreement:
      break
  else:
    raise UserError(
      f'{path.name} gives at best {best:.3%} of the pixels of '
      f"{plural(len(held), 'held-out picture')} the checkpoint's class; "
      f'{agreement:.3%} must agree. Nothing was written. Give more pictures '
      'like those that it will see (--pictures), accept less (--agreement), or '
      f'leave {kind} out of --precision.'
    )
  del reduced.graph.value_info[:]  # Shapes, which only took room.
  onnx.save(reduced, path)
  facts = {
    'bytes': [path.stat().st_size, bytes_],
    'milliseconds': _milliseconds((path, file), reference),
    'layers': [kept, len(_layers(model))],
    'classes': [x / n if n else None for x, n in np.stack([same, seen], 1)],
  }
  return whole._replace(
    file=path.name, agreement=share, pictures=len(held), reduced=facts
  )


def count_same(
  model: Model, reference: Reference, pictures: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Pixels with the checkpoint's class, and all, (pictures, classes)."""
  run, counts = read_onnx(model.SerializeToString()), []
  number = len(reference.net.labels.classes)
  for part in (slice(i, i + 1) for i in pictures):
    expected = reference.expected(part)[0]
    seen = expected != IGNORE
    same = seen & (run(*reference.part(part))[0] == expected)
    some = (expected[x] for x in (same, seen))
    counts.append([np.bincount(x, minlength=number) for x in some])
  return tuple(np.swapaxes(counts, 0, 1))


def _milliseconds(files: Sequence[Path], reference: Reference) -> list[float]:
  part = reference.part(slice(0, 1))
  timers = [timeit.Timer(functools.partial(read_onnx(x), *part)) for x in files]
  times = [[timer.timeit(1) for timer in timers] for _ in range(ROUNDS + 1)]
  return (1000 * np.median(times[1:], 0)).tolist()


def _halves(model: Model) -> Iterator[tuple[Model, int]]:
  """Computes in 16 bits, or failing that keeps only the weights in them."""
  blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *WHOLE]
  flags = {'keep_io_types': True, 'op_block_list': blocked}
  with warnings.catch_warnings(action='ignore'):  # Of weights next to zero.
    half = float16.convert_float_to_float16(copy.deepcopy(model), **flags)
  yield half, 0
  layers = _layers(model)
  yield _stored(model, layers), len(layers)


def _quantised(
  model: Model, reference: Reference, agreement: float, most: float
) -> Iterator[tuple[Model, int]]:
  """Files with more and more layers in float, and how many.

  The first is that which agrees on the calibration pictures, with a margin.
  """
  calibration = range(0, reference.number, 2)
  ranges = _ranges(model, reference, calibration)
  weights, vectors = _layers(model), _of_vectors(model)
  rounded = _rounded(model, ranges, weights)
  del rounded.graph.value_info[:]
  room = most - rounded.ByteSize()
  few = calibration[: max(PIXELS // np.prod(reference.size), 1)]
  moved = _deviations(model, ranges, reference, few)
  order = sorted(weights, key=moved.get, reverse=True)

  def mixed(number: int) -> Model:
    left, halves = room, set()
    for name in sorted(order[:number], key=lambda x: -moved[x] / weights[x]):
      if weights[name] < left:  # A byte more for each.
        left -= weights[name]
        halves.add(name)
    rounded = [x for x in weights if x not in halves]
    return _rounded(_stored(model, halves), ranges, rounded, order[:number])

  def shares(number: int) -> np.ndarray:
    same, seen = count_same(mixed(number), reference, calibration)
    return same.sum(1) / seen.sum(1)

  best = shares(len(order))
  # Of the difference of two means of as many pictures.
  error = best.std(ddof=1) * np.sqrt(2 / len(best))
  enough = min(agreement + MARGIN * error, best.mean() - error)
  number = bisect.bisect_left(
    range(len(order)), enough, key=lambda x: shares(x).mean()
  )
  while number < len(order):
    yield mixed(number), len(vectors.union(order[:number]))
    number += number // 8 + 1
  yield mixed(len(order)), len(order)


def _deviations(
  model: Model, ranges: Any, reference: Reference, pictures: Sequence[int]
) -> dict[str, float]:
  """How far each layer alone in 8 bits moves the scores, in mean squares."""
  weights = _layers(model)
  rounded = _rounded(model, ranges, weights)
  graph = rounded.graph
  there = {x.name for x in graph.initializer}
  there |= {y for x in graph.node for y in x.output}  # Biases.
  floats = (x for x in model.graph.initializer if x.name not in there)
  graph.initializer.extend(floats)
  # A switch for each layer, because loading takes longer than running.
  kind = onnx.TensorProto.BOOL
  graph.input.extend(
    helper.make_tensor_value_info(x, kind, []) for x in weights
  )
  for layer, inputs, index, name in [*_rounded_inputs(rounded, weights)]:
    given, found = [layer, inputs[index], name], f'{layer}_{len(graph.node)}'
    graph.node.append(helper.make_node('Where', given, [found]))
    inputs[index] = found
  (scores,) = (x.input[0] for x in graph.node if x.op_type == 'ArgMax')
  graph.output.append(helper.make_empty_tensor_value_info(scores))
  run = read_onnx(rounded.SerializeToString())
  parts = [reference.part(slice(i, i + 1)) for i in pictures]

  def compute(layer: str) -> np.ndarray:
    switches = [np.array(x == layer) for x in weights]
    return np.stack([run(*x, *switches)[-1] for x in parts])

  whole, moved = compute(''), {}
  with progress_bar('comparing', 'layers') as report:
    for number, name in enumerate(weights, 1):
      moved[name] = np.square(compute(name) - whole).mean()
      report(number, len(weights))
  return moved


def _ranges(
  model: Model, reference: Reference, pictures: Sequence[int]
) -> quantization.calibrate.TensorsData:
  """The least and largest values of activations."""
  inputs = reference.inputs.items()
  feeds = ({name: x[i : i + 1] for name, x in inputs} for i in pictures)
  with tempfile.TemporaryDirectory() as folder:
    path, larger = (Path(folder) / x for x in ('model.onnx', 'larger.onnx'))
    onnx.save(model, path)
    calibrator = quantization.create_calibrator(path, LAYERS, str(larger))
    calibrator.collect_data(SimpleNamespace(get_next=lambda: next(feeds, None)))
    return calibrator.compute_data()


def _rounded(
  model: Model, ranges: Any, names: Iterable[str], kept: Sequence[str] = ()
) -> Model:
  """Layers of these names in 8 bits, and of those `kept` only the weights.

  So it is of layers of vectors. Products give floats as they are.
  """
  kept = _of_vectors(model).union(kept)
  copied, kinds = copy.deepcopy(model), onnx.TensorProto
  where = {'nodes_to_quantize': [*names], 'nodes_to_exclude': []}
  where |= {'op_types_to_quantize': LAYERS, 'tensors_range': ranges}
  types = {'weight_qType': kinds.INT8, 'activation_qType': kinds.UINT8}
  types |= {'per_channel': True, 'reduce_range': False}
  more = {'OpTypesToExcludeOutputQuantization': ['MatMul']}
  quantizer = QDQQuantizer(copied, **types, **where, extra_options=more)
  quantizer.quantize_model()
  rounded = quantizer.model.model
  for layer, inputs, index, name in _rounded_inputs(rounded, names):
    if layer is None or (layer in kept and name in ranges):
      inputs[index] = name
  return rounded


def _rounded_inputs(
  model: Model, names: Iterable[str]
) -> Iterator[tuple[str | None, Any, int, str]]:
  """Inputs in 8 bits: whose they are, their place, and their names in float.

  They are those of layers of these names, or outputs of convolutions that are.
  Others, such as sums behind a shortcut, are nobody's.
  """
  nodes, names = model.graph.node, {*names}
  convs = {x.output[0]: x.name for x in nodes if x.op_type == 'Conv'}
  for node in nodes:
    for index, rounded in enumerate(node.input):
      name = rounded.removesuffix(ROUNDED)
      if name != rounded:
        layer = node.name if node.name in names else convs.get(name)
        yield layer, node.input, index, name


def _layers(model: Model) -> dict[str, int]:
  """Names of the layers, with the number of their weights."""
  sizes = {x.name: int(np.prod(x.dims)) for x in model.graph.initializer}
  return {
    x.name: sizes[x.input[1]]
    for x in model.graph.node
    if x.op_type in LAYERS and x.input[1] in sizes
  }


def _of_vectors(model: Model) -> set[str]:
  """Layers whose input is one vector a picture, such as a mean's."""
  graph = model.graph
  shapes = {x.name: x.type.tensor_type.shape.dim for x in graph.value_info}
  inputs = {x.name: x.input[0] for x in graph.node if x.op_type in LAYERS}
  dims = {x: shapes.get(inputs[x], ())[1:] for x in _layers(model)}
  return {k for k, v in dims.items() if sum(x.dim_value != 1 for x in v) == 1}


def _stored(model: Model, names: Iterable[str]) -> Model:
  """The same with weights of some layers in 16 bits."""
  model, names = copy.deepcopy(model), {*names}
  nodes = model.graph.node
  weights = {node.input[1] for node in nodes if node.name in names}
  for weight in (x for x in model.graph.initializer if x.name in weights):
    name, half = weight.name, f'{weight.name}_float16'
    values = numpy_helper.to_array(weight).astype(np.float16)
    weight.CopyFrom(numpy_helper.from_array(values, half))
    nodes.insert(0, helper.make_node('Cast', [half], [name], to=1))
  return model


def _prepared(file: Path) -> Model:
  """The same network with its constants folded and all shapes named."""
  with tempfile.TemporaryDirectory() as folder, plain_name(file) as name:
    path = Path(folder) / 'model.onnx'
    shape_inference.quant_pre_process(name, path, skip_symbolic_shape=True)
    model = onnx.load(path)
  used = {x.domain for x in model.graph.node}
  for each in [x for x in model.opset_import if x.domain not in used]:
    model.opset_import.remove(each)
  return model
