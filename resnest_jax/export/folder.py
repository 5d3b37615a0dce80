"""Exports a checkpoint into a folder and compares each file with it."""

import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resnest_jax import files
from resnest_jax.data.own.classes import label_set
from resnest_jax.errors import UserError
from resnest_jax.export import checks
from resnest_jax.export.card import Export, model_card
from resnest_jax.export.pictures import gather_pictures
from resnest_jax.export.program import make_program
from resnest_jax.export.promise import written_now
from resnest_jax.inference.predictor import CROP_SIZES, IMAGE_SCALES
from resnest_jax.inference.protocols import Protocol
from resnest_jax.labels import IGNORE, LabelSet
from resnest_jax.models import implementations
from resnest_jax.text import plural
from resnest_jax.weights.files import ABOUT, public, write_weights
from resnest_jax.weights.pickles import check_torch
from resnest_jax.weights.pretrained import Weights, load_segmentor
from resnest_jax.weights.state_dict import export_state_dict

FORMATS = ('stablehlo', 'onnx', 'safetensors', 'mmseg')
PROGRAMS = ('stablehlo', 'onnx')
NEEDS = {
  'stablehlo': (('flatbuffers',), 'pip install flatbuffers'),
  'onnx': (
    ('jax2onnx', 'onnx_ir', 'onnxruntime'),
    f'pip install onnx-ir onnxruntime && {checks.INSTALL_JAX2ONNX}',
  ),
}
# The formats of weights -> their kind in `export_state_dict`.
KINDS = {'safetensors': 'ours', 'mmseg': 'mmseg'}
CARD = 'README.md'
SHORTEST, LONGEST = 32, 8192  # Pixels of an edge.

Say = Callable[[str], None]


def export_model(
  source: str | Path,
  out: Path,
  *,
  formats: Sequence[str] = ('stablehlo', 'safetensors'),
  sizes: Sequence[tuple[int, int]] = (),
  probabilities: bool = False,
  checkpoint: str | int = 'latest',
  pictures: Sequence[str | Path] = (),
  say: Say = print,
) -> list[Export]:
  """Exports a network in several formats, with a model card.

  Args:
    source: of the weights; see `load_weights`.
    out: a new folder, or an empty one. It appears once all files have passed.
    formats: of `FORMATS`.
    sizes: (height, width) in pixels, each of which gets its StableHLO and ONNX;
      empty: the crop of the training.
    probabilities: whether StableHLO and ONNX output all classes' probabilities.
    checkpoint: of a training: 'latest', 'best' or a step.
    pictures: to compare on; see `gather_pictures`.

  Raises:
    UserError: an argument cannot be used, a package is missing, or an export
      disagrees with the checkpoint. Nothing is left behind.
  """
  out = Path(out)
  # All that can fail without the weights comes before their download.
  files.check_new(out)
  formats = [name for name in FORMATS if name in formats]
  programs = set(formats) & set(PROGRAMS)
  check_packages(formats)
  check_sizes(sizes)
  if probabilities and not programs:
    raise UserError(
      'probabilities are an output of StableHLO and ONNX, and neither is among '
      'the formats: add one, or leave --probabilities out.'
    )
  seen = gather_pictures(pictures)
  _, _, weights = load_segmentor(source, checkpoint)
  step = weights.provenance.get('step')
  taken = [] if step is None else [f'checkpoint {step} of {source}']
  for line in taken + weights.notes():
    say(line)
  net = as_exported(source, weights)
  about = _about(weights, net.labels)
  sizes = list(dict.fromkeys(sizes)) or [_default_size(weights)]
  # Weights have no size. They are compared on one.
  if not programs:
    sizes = sizes[:1]
  exports: list[Export] = []
  with files.explain_refusal(out), files.whole_folder(out) as folder:
    for size in sizes:
      reference = checks.Reference(net, seen, size, probabilities)
      for name in formats:
        if name in PROGRAMS:
          file = folder / f'model_{size[0]}x{size[1]}.{name}'
          export = write_program(
            name, file, net, size, probabilities, reference
          )
        elif size == sizes[0]:
          export = _write_weights(name, folder, weights, about, reference)
        else:
          continue
        exports.append(export._replace(drawn=not pictures))
        say(passed(folder / export.file, export))
    write_description(folder, about, exports)
  say(f'written: {out}')
  return exports


def passed(file: Path, export: Export) -> str:
  """The line to print about a file."""
  until = export.written and export.written.read_until
  until = f'; JAX promises to read it until {until}' if until else ''
  return (
    f'{file.name} ({file.stat().st_size / 1e6:.1f} MB): read back, '
    f'{export.agreement:.4%} of the pixels of '
    f'{plural(export.pictures, "picture")} agree with the checkpoint{until}'
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
  if 'mmseg' in formats:
    check_torch()


def check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
  """Raises `UserError` if pictures of a size cannot be exported."""
  for height, width in sizes:
    if not all(SHORTEST <= x <= LONGEST for x in (height, width)):
      raise UserError(
        f'pictures of {height}x{width} pixels (height x width) cannot be '
        f'exported; each edge must have {SHORTEST} to {LONGEST}.'
      )


def _default_size(weights: Weights) -> tuple[int, int]:
  number = weights.description.config['num_classes']
  return tuple(weights.crop_size or CROP_SIZES.get(number, (512, 512)))


def as_exported(source: str | Path, weights: Weights) -> checks.Model:
  """Builds the network in float32, unless it has too many classes."""
  number = weights.description.config['num_classes']
  if number > IGNORE:
    raise UserError(
      f'{source} has {number} classes; label maps are of 8 bits with {IGNORE} '
      f'for none, so at most {IGNORE} can be exported.'
    )
  labels = label_set(number, weights.classes, weights.palette)
  return checks.Model(*weights.create('float32'), labels, weights.normalized())


def _about(weights: Weights, labels: LabelSet) -> dict[str, Any]:
  number = len(labels.classes)
  scale = weights.image_scale or IMAGE_SCALES.get(number, (2048, 512))
  return weights.about() | {
    'classes': list(labels.classes),
    'palette': labels.palette.tolist(),
    'protocol': Protocol(image_scale=tuple(scale)).describe(),
  }


def write_program(
  name: str,
  file: Path,
  net: checks.Model,
  size: tuple[int, int],
  probabilities: bool,
  reference: checks.Reference,
) -> Export:
  """Writes one of `PROGRAMS`, reads it back and compares it.

  `net` is from `as_exported`, `size` is (height, width) in pixels.
  """
  program = make_program(
    *net[:2], size, probabilities=probabilities, normalization=net.normalization
  )
  written = None
  # Not Winograd's, our choice on a CPU: what runs a file chooses its own.
  with implementations.use(wide='convolution'):
    # Each format needs packages that the other does not.
    if name == 'stablehlo':
      from resnest_jax.export import stablehlo

      stablehlo.write_stablehlo(file, program, size)
      run, written = stablehlo.read_stablehlo(file), written_now()
    else:
      from resnest_jax.export import onnx_file

      onnx_file.write_onnx(file, program, size, probabilities)
      run = onnx_file.read_onnx(file)
  share = reference.compare(file.name, run)
  more = {'probabilities': probabilities, 'written': written}
  return Export(file.name, name, size, share, len(reference.images), **more)


def _write_weights(
  name: str,
  folder: Path,
  weights: Weights,
  about: Mapping[str, Any],
  reference: checks.Reference,
) -> Export:
  # The model as described rather than in float32: no bit may change.
  model, stored = weights.create()
  kind = KINDS[name]
  state_dict = export_state_dict(model, stored, kind)
  # It makes a folder, with a description that `write_description` replaces.
  file, _ = write_weights(folder / name, kind, state_dict, about)
  file = file.rename(folder / file.name)
  shutil.rmtree(folder / name)
  _, found, read = load_segmentor(file)
  checks.check_same_bits(file.name, found, stored)
  run = reference.run_of(as_exported(file, read))
  share = reference.compare(file.name, run)
  return Export(file.name, name, None, share, len(reference.images))


def write_description(
  folder: Path, about: Mapping[str, Any], exports: Sequence[Export]
) -> None:
  """Writes the description and the model card."""
  about = public(about)
  described = about | {'exports': [each.entry() for each in exports]}
  files.write_json(folder / ABOUT, described)
  files.write_text(folder / CARD, model_card(about, exports))
