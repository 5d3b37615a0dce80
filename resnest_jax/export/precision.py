"""Smaller ONNX files: float16, or int8 where that costs no agreement.

In an int8 file inputs and weights of convolutions and products have 8 bits, in
ranges that half of the pictures show. Layers that cost most agreement stay in
float, with weights in 16 bits. The other half decides whether it is written.
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
  weights, kept = _layers(model), []
  room = most - _rounded(model, ranges, weights).ByteSize()
  few = calibration[: max(PIXELS // np.prod(reference.size), 2)]

  same = {}  # With one layer alone in 8 bits.
  with progress_bar('comparing layers') as report:
    for number, name in enumerate(weights, 1):
      rounded = _rounded(model, ranges, [name])
      same[name] = count_same(rounded, reference, few)[0].sum()
      report(number, len(weights))
  for name in sorted(weights, key=same.get):
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
    yield mixed(number), number


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
