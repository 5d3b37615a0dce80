"""Exports a checkpoint into a folder and compares each file with it."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from resnest_jax import files
from resnest_jax.data.own.classes import label_set
from resnest_jax.data.preprocess import Normalization
from resnest_jax.errors import UserError
from resnest_jax.export import checks, web
from resnest_jax.export.card import (
  CLASS_FORMATS,
  FORMATS,
  PRECISIONS,
  Export,
  model_card,
)
from resnest_jax.export.pictures import find_pictures, gather_pictures
from resnest_jax.export.program import FREE, make_program
from resnest_jax.export.promise import written_now
from resnest_jax.inference.predictor import (
  CROP_SIZES,
  IMAGE_SCALES,
  center_crop_of,
  class_labels,
)
from resnest_jax.inference.protocols import Protocol
from resnest_jax.labels import IGNORE, LabelSet
from resnest_jax.models import implementations
from resnest_jax.models.classifier import Classifier
from resnest_jax.models.features import Features
from resnest_jax.text import plural
from resnest_jax.weights.backbone import load_backbone
from resnest_jax.weights.files import ABOUT, public, write_weights
from resnest_jax.weights.pickles import check_torch
from resnest_jax.weights.pretrained import Weights, load_trained
from resnest_jax.weights.state_dict import export_state_dict

PROGRAMS = ('stablehlo', 'onnx')
NEEDS = {
  'stablehlo': (('flatbuffers',), 'pip install flatbuffers'),
  'onnx': (
    ('jax2onnx', 'onnx_ir', 'onnxruntime'),
    f'pip install onnx-ir onnxruntime && {checks.INSTALL_JAX2ONNX}',
  ),
}
NEEDS['web'] = NEEDS['onnx']
CARD = 'README.md'
AGREEMENT = 0.995  # Of smaller files, by default.
FEWEST = 10  # Pictures that are given for them.
SHORTEST, LONGEST = 32, 8192  # Pixels of an edge.

Say = Callable[[str], None]


class Order(NamedTuple):
  """What is to be written, as of `export_model`."""

  formats: Sequence[str]
  sizes: Sequence[tuple[int, int]]
  canvas: Sequence[tuple[int, int] | str]
  probabilities: bool
  features: int | None
  precision: Sequence[str]
  agreement: float


def export_model(
  source: str | Path,
  out: Path,
  *,
  formats: Sequence[str] = ('stablehlo', 'safetensors'),
  sizes: Sequence[tuple[int, int]] = (),
  canvas: Sequence[tuple[int, int] | str] = (),
  probabilities: bool = False,
  checkpoint: str | int = 'latest',
  pictures: Sequence[str | Path] = (),
  features: int | None = None,
  precision: Sequence[str] = (),
  agreement: float = AGREEMENT,
  say: Say = print,
) -> list[Export]:
  """Exports a network in several formats, with a model card.

  `source` and `checkpoint` are as of `load_weights`, `pictures` to compare on
  as of `find_pictures`. `out` is new or empty, and appears once all files have
  passed. Formats are of `FORMATS`, or of a classifier `CLASS_FORMATS`. Each of
  `sizes`, (height, width) in pixels, gets its StableHLO and ONNX, and so does
  each `canvas`, such a size or `FREE`, for pictures of any size up to it; by
  default that is the crop of the training alone, as a canvas if a page is
  written. They also output `probabilities` of all classes, which is all that a
  classifier's give, or with `features`, an output stride, C2 to C5 of the
  backbone. Each ONNX comes also in each `precision`, of `PRECISIONS`, in which
  at least `agreement`, 0 to 1, of the pixels of held-out pictures agree.

  Raises `UserError` if an argument cannot be used, a package is missing, or an
  export disagrees with the checkpoint. Nothing is left behind.
  """
  out = Path(out)
  # All that can fail without the weights comes before their download.
  files.check_new(out)
  formats = [x for x in (*FORMATS, *CLASS_FORMATS[-2:]) if x in formats]
  flags = probabilities, features, precision, agreement
  order = Order(formats, sizes, canvas, *flags)
  found = find_pictures(pictures)
  _check_arguments(order, len(found))
  if features:
    weights, (net, about) = None, _features(source, checkpoint, features)
  else:
    _, _, weights = load_trained(source, checkpoint)
    _check_task(weights, order)
    net = as_exported(source, weights)
    about = _about(weights, net.labels)
  seen = gather_pictures(found, net.normalization)
  provenance = about['provenance']
  if 'step' in provenance:
    say(f'checkpoint {provenance["step"]} of {source}')
  for note in provenance.get('notes', ()):
    say(f'note: {note}')
  references = _references(net, seen, order, default_size(about))
  exports = []
  with files.explain_refusal(out), files.whole_folder(out) as folder:
    for index, reference in enumerate(references):
      for name in formats:
        if name in PROGRAMS:
          written = _write_programs(name, folder, reference, order)
        elif name == 'web':
          written = _write_page(folder / name, about, reference)
        else:  # Weights have no size.
          given = name, folder, weights, about, reference
          written = [] if index else _write_weights(*given)
        for export in written:
          exports.append(export._replace(drawn=not pictures))
          say(passed(folder / export.file, export))
    write_description(folder, about, exports)
  say(f'written: {out}')
  return exports


def _references(
  net: checks.Model,
  seen: Sequence[np.ndarray],
  order: Order,
  default: tuple[int, int],
) -> Iterator[checks.Reference]:
  more, canvas = order.probabilities, dict.fromkeys(order.canvas)
  if 'web' in order.formats and {*canvas} <= {FREE}:
    canvas = [default, *canvas]
  for size in dict.fromkeys(order.sizes or ([] if canvas else [default])):
    yield checks.Reference(net, seen, size, more)
  for size in canvas:
    free = size == FREE
    size = default if free else size
    yield checks.Reference(net, seen, size, more, True, free)


def passed(file: Path, export: Export) -> str:
  """The line to print about a file."""
  until = export.written and export.written.read_until
  until = f'; JAX promises to read it until {until}' if until else ''
  seen = plural(export.pictures, 'picture')
  found = f'{export.agreement:.4%} of the pixels of {seen} agree with'
  if export.classes:
    found = f'the classes of {seen} agree with'
  if export.features:
    found = f'features of {seen} are within {1 - export.agreement:.1e} of'
  size = sum(x.stat().st_size for x in (file, *file.rglob('*')))
  return (
    f'{file.name} ({size / 1e6:.1f} MB): read back, {found} the '
    f'checkpoint{until}'
  )


def check_packages(formats: Sequence[str]) -> None:
  """Raises `UserError` if a format needs a package that is not installed."""
  for name in formats:
    needed, install = NEEDS.get(name, ((), ''))
    missing = [x for x in needed if importlib.util.find_spec(x) is None]
    if missing:
      raise UserError(
        f'the format {name} needs {" and ".join(missing)}: {install} '
        '(--formats leaves it out).'
      )
  if {*formats} - {*PROGRAMS, 'safetensors', 'web'}:
    check_torch()


def _check_task(weights: Weights, order: Order) -> None:
  task = weights.description.task
  known = CLASS_FORMATS if task == 'classifier' else FORMATS
  if wrong := [name for name in order.formats if name not in known]:
    raise UserError(
      f'{wrong[0]} is no format of a {task}; accepted are {", ".join(known)}. '
      'python -m resnest_jax.weights.convert knows more names of weights.'
    )
  if 'web' in order.formats and weights.normalized().bands:
    raise UserError(
      'a page takes pictures in colour, not bands; leave web out of --formats.'
    )
  if task == 'classifier' and order.probabilities:
    raise UserError(
      'probabilities are what exports of a classifier always give; leave '
      '--probabilities out.'
    )
  if task == 'classifier' and (order.canvas or order.precision):
    raise UserError(
      'a classifier sees pictures of one size, the middle of a picture, and '
      'gives no label maps: leave --canvas and --precision out.'
    )


def _check_arguments(order: Order, pictures: int) -> None:
  formats, sizes, canvas, probabilities, features, precision, share = order
  check_packages(formats)
  for height, width in [*sizes, *(x for x in canvas if x != FREE)]:
    if not all(SHORTEST <= x <= LONGEST for x in (height, width)):
      raise UserError(
        f'pictures of {height}x{width} pixels (height x width) cannot be '
        f'exported; each edge must have {SHORTEST} to {LONGEST}.'
      )
  if (probabilities or canvas) and not {*formats} & {*PROGRAMS, 'web'}:
    what, flag = 'probabilities are an output', 'probabilities'
    if canvas:
      what, flag = 'a canvas is an input', 'canvas'
    raise UserError(
      f'{what} of StableHLO and ONNX, and neither is among the formats: add '
      f'one, or leave --{flag} out.'
    )
  unused = sizes and not {*formats} & {*PROGRAMS}
  one = not canvas or len({*canvas} - {FREE}) == 1
  if 'web' in formats and (probabilities or unused or not one):
    raise UserError(
      'a page shows labels of one canvas: give --canvas one size and leave '
      '--probabilities and --sizes out, or web out of --formats.'
    )
  if features and (probabilities or canvas or {*formats} - {*PROGRAMS}):
    raise UserError(
      'features are written as StableHLO and ONNX alone, without '
      f'probabilities or a canvas; add --formats {" ".join(PROGRAMS)}, or one '
      'of them. python -m resnest_jax.weights.convert writes the weights.'
    )
  wrong = 'onnx' not in formats or features or {*precision} - {*PRECISIONS}
  if precision and wrong:
    raise UserError(
      'a precision is float16 or int8, of the ONNX files of a segmentor: add '
      '--formats onnx, or leave --precision out.'
    )
  if not 0 < share < 1:
    raise UserError(f'--agreement {share} is not above 0 and below 1.')
  if not precision and share != AGREEMENT:
    raise UserError('--agreement is of smaller files: add --precision as well.')
  if precision and 0 < pictures < FEWEST:
    raise UserError(
      f'{plural(pictures, "picture", "are")} too few for --precision: '
      f'half calibrate, half decide. Give {FEWEST} or more, or leave '
      '--pictures out for drawn scenes.'
    )
  if 'web' in formats:
    web.fetch_runtime()


def default_size(about: Mapping[str, Any]) -> tuple[int, int]:
  if about['task'] == 'classifier':
    return 2 * (about['protocol']['size'],)
  number = about['model'].get('num_classes')
  return tuple(about['crop_size'] or CROP_SIZES.get(number, (512, 512)))


def _features(
  source: str | Path, checkpoint: str | int, output_stride: int
) -> tuple[checks.Model, dict[str, Any]]:
  model, variables, about = load_backbone(
    source, checkpoint=checkpoint, output_stride=output_stride, dtype='float32'
  )
  normalization = Normalization.of(about['normalization'])
  about['features'] = {
    name: {'stride': stride, 'channels': model.channels[name]}
    for name, stride in model.strides.items()
  }
  return checks.Model(model, variables, None, normalization), about


def as_exported(source: str | Path, weights: Weights) -> checks.Model:
  """Builds the network in float32, unless it has too many classes."""
  task, config = weights.description
  if task == 'classifier':
    labels = class_labels(weights)
  elif (number := config['num_classes']) <= IGNORE:
    labels = label_set(number, weights.classes, weights.palette)
  else:
    raise UserError(
      f'{source} has {number} classes; label maps are of 8 bits with {IGNORE} '
      f'for none, so at most {IGNORE} can be exported.'
    )
  how = weights.normalized(), weights.temperature
  return checks.Model(*weights.create('float32'), labels, *how)


def _about(weights: Weights, labels: LabelSet) -> dict[str, Any]:
  about = weights.about() | {'classes': list(labels.classes)}
  if weights.description.task == 'classifier':
    crop = center_crop_of(weights)
    return about | {
      'palette': None,
      'image_scale': list(crop.image_scale),
      'center_crop': crop.rule,
      'protocol': crop.describe(),
    }
  scale = weights.image_scale or IMAGE_SCALES.get(
    len(labels.classes), (2048, 512)
  )
  protocol = Protocol(image_scale=tuple(scale)).describe()
  return about | {'palette': labels.palette.tolist(), 'protocol': protocol}


def write_program(name: str, file: Path, reference: checks.Reference) -> Export:
  """Writes one of `PROGRAMS`, reads it back and compares it."""
  model, variables, _, *how = reference.net
  size = None if reference.free else reference.size
  features, classify = (isinstance(model, x) for x in (Features, Classifier))
  probabilities, written = reference.probabilities or classify, None
  more = dict(zip(('normalization', 'temperature'), how, strict=True))
  more['probabilities'] = probabilities
  program = make_program(model, variables, size, **more)
  inputs = {
    key: jax.ShapeDtypeStruct(('b', *array.shape[1:]), array.dtype)
    for key, array in reference.inputs.items()
  }
  if reference.free:
    images = inputs['images']
    inputs['images'] = images.update(shape=(*'bhw', images.shape[-1]))
  # Not Winograd's, our choice on a CPU: what runs a file chooses its own.
  with implementations.use(wide='convolution'):
    # Each format needs packages that the other does not.
    if name == 'stablehlo':
      from resnest_jax.export import stablehlo

      stablehlo.write_stablehlo(file, program, inputs)
      run, written = stablehlo.read_stablehlo(file), written_now()
    else:
      from resnest_jax.export import onnx_file

      outputs = ['labels'] * (not classify) + ['probabilities'] * probabilities
      outputs = [*model.strides] if features else outputs
      onnx_file.write_onnx(file, program, inputs, outputs)
      run = onnx_file.read_onnx(file)
  share = reference.compare(file.name, run)
  return Export(
    *(file.name, name, size, share, reference.number),
    probabilities=probabilities,
    written=written,
    features=features,
    classes=classify,
    canvas=reference.canvas,
  )


def _write_programs(
  name: str, folder: Path, reference: checks.Reference, order: Order
) -> list[Export]:
  stem = 'features' if isinstance(reference.net.model, Features) else 'model'
  stem += '_canvas' * reference.canvas
  size = FREE if reference.free else '{}x{}'.format(*reference.size)
  file = folder / f'{stem}_{size}.{name}'
  written = [write_program(name, file, reference)]
  if name == 'onnx' and order.precision:
    # It needs packages that other formats do not.
    from resnest_jax.export.precision import write_reduced

    given = file, reference, written[0], order.agreement
    written += [write_reduced(kind, *given) for kind in order.precision]
  return written


def _write_page(
  folder: Path, about: Mapping[str, Any], reference: checks.Reference
) -> list[Export]:
  if reference.free or not reference.canvas:
    return []
  folder.mkdir()
  export = write_program('onnx', folder / web.MODEL, reference)
  web.write_page(folder, about, reference.size)
  return [export._replace(file=folder.name, format=folder.name)]


def _write_weights(
  name: str,
  folder: Path,
  weights: Weights,
  about: Mapping[str, Any],
  reference: checks.Reference,
) -> list[Export]:
  # The model as described rather than in float32: no bit may change.
  model, stored = weights.create()
  torch, classify = name != 'safetensors', isinstance(model, Classifier)
  kind = name if torch else 'ours'
  state_dict = export_state_dict(model, stored, kind)
  # It makes a folder, with a description that `write_description` replaces.
  file, _ = write_weights(folder / name, kind, state_dict, about, torch)
  # Two libraries may have the same names.
  called = f'model_{name}.pth' if classify and torch else file.name
  file = file.rename(folder / called)
  shutil.rmtree(folder / name)
  _, found, read = load_trained(file)
  checks.check_same_bits(file.name, found, stored)
  run = reference.run_of(as_exported(file, read))
  share, number = reference.compare(file.name, run), reference.number
  return [Export(file.name, name, None, share, number, classes=classify)]


def write_description(
  folder: Path, about: Mapping[str, Any], exports: Sequence[Export]
) -> None:
  """Writes the description and the model card."""
  about = public(about)
  described = about | {'exports': [each.entry() for each in exports]}
  files.write_json(folder / ABOUT, described)
  files.write_text(folder / CARD, model_card(about, exports))
