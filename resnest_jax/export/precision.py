"""Smaller ONNX files: float16, or int8 where that costs no agreement.

In an int8 file inputs and weights of convolutions and products have 8 bits, in
ranges that half of the pictures show. Layers that cost most agreement stay in
float, with weights in 16 bits. The other half decides whether it is written.
"""

import bisect
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import (
  Callable,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.transformers import float16

from resnest_jax.errors import UserError
from resnest_jax.export.card import Export
from resnest_jax.export.checks import Reference
from resnest_jax.labels import IGNORE
from resnest_jax.text import plural

MOST = 0.295  # Of float32's bytes: layers stay in float up to this size.
# Standard errors by which calibration pictures must agree better than asked.
MARGIN = 2.0
PIXELS = 2**16  # That are enough to compare layers.
LAYERS = ('Conv', 'MatMul')
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
  held = range(1, reference.number, 2)
  path = file.with_name(f'{file.stem}_{kind}{file.suffix}')
  model, best = _prepared(file), 0.0
  room = MOST * file.stat().st_size
  if kind == 'float16':
    candidates = _halves(model)
  else:
    candidates = _quantised(model, reference, agreement, room)
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
    'bytes': [x.stat().st_size for x in (path, file)],
    'milliseconds': _milliseconds((path, file), reference),
    'classes': [x / n if n else None for x, n in np.stack([same, seen], 1)],
    'kept': kept,
    'layers': len(_layers(model)),
  }
  return whole._replace(
    file=path.name, agreement=share, pictures=len(held), reduced=facts
  )


def count_same(
  model: Model, reference: Reference, pictures: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Pixels with the checkpoint's class, and all, (pictures, classes)."""
  run, counts = _runner(model.SerializeToString()), []
  number = len(reference.net.labels.classes)
  for i in pictures:
    expected = reference.expected(slice(i, i + 1))[0]
    seen = expected != IGNORE
    same = seen & (run(_feed(reference, i))[0] == expected)
    counts.append(
      [np.bincount(expected[x], minlength=number) for x in (same, seen)]
    )
  return tuple(np.swapaxes(counts, 0, 1))


def _feed(reference: Reference, i: int) -> dict[str, np.ndarray]:
  return {name: x[i : i + 1] for name, x in reference.inputs.items()}


def _runner(model: bytes, saved: Path | None = None) -> Callable:
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  if saved:  # By what standard ONNX can say, for any machine.
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(saved)
  providers = ['CPUExecutionProvider']
  session = onnxruntime.InferenceSession(model, options, providers=providers)
  return lambda feed: session.run(None, feed)


def _milliseconds(files: Sequence[Path], reference: Reference) -> list[float]:
  # As bytes: onnxruntime does not read all names.
  runs = [_runner(x.read_bytes()) for x in files]
  times = [[] for _ in files]
  for i in range(ROUNDS + 1):
    for run, found in zip(runs, times, strict=True):
      start = time.perf_counter()
      run(_feed(reference, i % reference.number))
      found.append(1000 * (time.perf_counter() - start))
  return [statistics.median(found[1:]) for found in times]


def _halves(model: Model) -> Iterator[tuple[Model, list[str]]]:
  """Computes in 16 bits, or failing that keeps only the weights in them."""
  blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *WHOLE]
  flags = {'keep_io_types': True, 'op_block_list': blocked}
  with warnings.catch_warnings(action='ignore'):  # Of weights next to zero.
    half = float16.convert_float_to_float16(copy.deepcopy(model), **flags)
  yield half, []
  layers = [*_layers(model)]
  yield _stored(model, layers), layers


def _quantised(
  model: Model, reference: Reference, agreement: float, most: float
) -> Iterator[tuple[Model, list[str]]]:
  """Files with more and more layers in float, and these layers' names.

  The first is that which agrees on the calibration pictures, with a margin.
  """
  calibration = range(0, reference.number, 2)
  ranges = _ranges(model, reference, calibration)
  weights, kept = _layers(model), []
  room = most - _rounded(model, ranges, weights).ByteSize()
  few = calibration[: max(PIXELS // np.prod(reference.size), 2)]

  def harm(name: str) -> int:  # Of this layer alone.
    rounded = _rounded(model, ranges, [name])
    return -count_same(rounded, reference, few)[0].sum()

  for name in sorted(weights, key=harm, reverse=True):
    if weights[name] < room:  # A byte more for each.
      room -= weights[name]
      kept.append(name)

  def mixed(number: int) -> Model:
    others = [x for x in weights if x not in kept[:number]]
    return _rounded(_stored(model, kept[:number]), ranges, others)

  def holds(number: int) -> bool:
    same, seen = count_same(mixed(number), reference, calibration)
    shares = same.sum(1) / seen.sum(1)
    # Of the difference of two means of as many pictures.
    error = shares.std(ddof=1) * np.sqrt(2 / len(shares))
    return shares.mean() - MARGIN * error >= agreement

  first = bisect.bisect_left(range(len(kept)), True, key=holds)
  for number in range(first, len(kept) + 1):
    yield mixed(number), kept[:number]


def _ranges(
  model: Model, reference: Reference, pictures: Sequence[int]
) -> quantization.calibrate.TensorsData:
  """The least and largest values of activations."""
  feeds = (_feed(reference, i) for i in pictures)
  reader = SimpleNamespace(get_next=lambda: next(feeds, None))
  with tempfile.TemporaryDirectory() as folder:
    path, larger = (Path(folder) / x for x in ('model.onnx', 'larger.onnx'))
    onnx.save(model, path)
    calibrator = quantization.create_calibrator(path, LAYERS, str(larger))
    calibrator.collect_data(reader)
    return calibrator.compute_data()


def _rounded(model: Model, ranges: Any, names: Iterable[str]) -> Model:
  """Layers of these names in 8 bits. Products give floats as they are."""
  copied, kinds = copy.deepcopy(model), onnx.TensorProto
  where = {'nodes_to_quantize': [*names], 'nodes_to_exclude': []}
  where |= {'op_types_to_quantize': LAYERS, 'tensors_range': ranges}
  types = {'weight_qType': kinds.INT8, 'activation_qType': kinds.UINT8}
  types |= {'per_channel': True, 'reduce_range': False}
  more = {'OpTypesToExcludeOutputQuantization': ['MatMul']}
  quantizer = QDQQuantizer(copied, **types, **where, extra_options=more)
  quantizer.quantize_model()
  return quantizer.model.model


def _layers(model: Model) -> dict[str, int]:
  """Names of the layers, with the number of their weights."""
  sizes = {x.name: int(np.prod(x.dims)) for x in model.graph.initializer}
  return {
    x.name: sizes[x.input[1]]
    for x in model.graph.node
    if x.op_type in LAYERS and x.input[1] in sizes
  }


def _stored(model: Model, kept: Sequence[str]) -> Model:
  """The same with weights of some layers in 16 bits."""
  model = copy.deepcopy(model)
  graph = model.graph
  weights = {x.name: x for x in graph.initializer}
  for node in [x for x in graph.node if x.name in {*kept}]:
    name = node.input[1]
    half, node.input[1] = f'{node.name}_float16', f'{node.name}_float'
    values = numpy_helper.to_array(weights[name]).astype(np.float16)
    graph.initializer.append(numpy_helper.from_array(values, half))
    cast = helper.make_node('Cast', [half], [node.input[1]], to=1)
    graph.node.insert(0, cast)
  used = {name for node in graph.node for name in node.input}
  _replace(graph.initializer, [x for x in graph.initializer if x.name in used])
  return model


def _prepared(file: Path) -> Model:
  """The same network of Conv, MatMul and Relu, constants folded."""
  model = onnx.load(file)
  graph = model.graph
  constants = {x.name: x for x in graph.initializer}
  _replace(
    graph.node, [y for x in graph.node for y in _as_layer(x, constants, graph)]
  )
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / file.name
    _runner(model.SerializeToString(), path)
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
  used = {x.domain for x in model.graph.node}
  imports = [x for x in model.opset_import if x.domain in used]
  _replace(model.opset_import, imports)
  return model


def _as_layer(
  node: onnx.NodeProto,
  constants: Mapping[str, onnx.TensorProto],
  graph: onnx.GraphProto,
) -> list[onnx.NodeProto]:
  """A node as onnxruntime quantises it; a product's weight has 2 axes."""
  constant = constants.get(node.input[1]) if len(node.input) == 2 else None
  if constant is None:
    return [node]
  value, named = numpy_helper.to_array(constant), (node.output, node.name)
  if node.op_type == 'Max' and value.shape == () and value == 0:
    return [helper.make_node('Relu', node.input[:1], *named)]
  equation = node.attribute[0].s if node.op_type == 'Einsum' else None
  if equation == b'abcd,de->abce':
    return [helper.make_node('MatMul', node.input, *named)]
  if equation != b'abcd,efdg->abcefg':
    return [node]
  matrix = value.transpose(2, 0, 1, 3).reshape(value.shape[2], -1)
  shape = np.int64([0, 0, 0, *np.delete(value.shape, 2)])  # 0: as it is.
  names = [f'{node.name}_{x}' for x in ('matrix', 'shape', 'flat')]
  for array, name in zip((matrix, shape), names, strict=False):
    array = np.ascontiguousarray(array)
    graph.initializer.append(numpy_helper.from_array(array, name))
  inputs = [node.input[0], names[0]]
  return [
    helper.make_node('MatMul', inputs, names[2:], node.name),
    helper.make_node('Reshape', [names[2], names[1]], node.output),
  ]


def _replace(field: Any, values: Sequence) -> None:
  del field[:]
  field.extend(values)
