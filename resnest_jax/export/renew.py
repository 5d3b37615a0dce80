"""Renews the StableHLO of a folder of exports with the installed JAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnest_jax.errors import UserError, writing
from resnest_jax.export.card import Export, model_card
from resnest_jax.export.checks import Reference
from resnest_jax.export.folder import (
  CARD,
  Say,
  as_exported,
  check_packages,
  default_size,
  passed,
  write_description,
  write_program,
)
from resnest_jax.export.pictures import find_pictures, gather_pictures
from resnest_jax.export.program import FREE
from resnest_jax.files import check_writable, work_folder
from resnest_jax.models.description import check_description
from resnest_jax.untrusted import parse_json
from resnest_jax.weights.files import ABOUT, SAFETENSORS, TORCH
from resnest_jax.weights.pretrained import load_trained


def renew_exports(
  folder: Path, *, pictures: Sequence[str | Path] = (), say: Say = print
) -> list[Export]:
  """Writes each StableHLO file again, from the weights next to it.

  Names, sizes and outputs stay, as do all other files but about.json and the
  model card. `pictures` are those of `find_pictures`. Raises `UserError` if
  there is nothing to renew, are no weights to renew it from, or a new file
  disagrees with the checkpoint. All files then stay as they were.
  """
  folder = Path(folder)
  about, exports = _read(folder)
  check_writable(folder, 'export into another folder')
  check_packages(['stablehlo'])
  found = find_pictures(pictures)
  _, _, weights = load_trained(_weights_of(folder, exports))
  # That of the other files, whatever was fitted since.
  temperature = about.get('temperature', 1.0)
  net = as_exported(folder, weights)._replace(temperature=temperature)
  seen = gather_pictures(found, net.normalization)
  # Inside the folder, so that `replace` below stays on one file system.
  with writing(folder), work_folder(folder / 'new') as new:
    for place, old in enumerate(exports):
      if old.format != 'stablehlo':
        continue
      size = old.size or default_size(about)
      how = _gives_probabilities(folder, old), old.canvas, old.size is None
      reference = Reference(net, seen, size, *how)
      file = new / Path(old.file).name
      export = write_program('stablehlo', file, reference)
      exports[place] = export._replace(drawn=not pictures)
      say(passed(file, export))
      if less := export.written.shorter_than(old.written, export.written.on):
        say(f'warning: {less}')
    write_description(new, about, exports)
    # The description comes last: if this is interrupted, it promises too little
    # for the new files, never too much.
    for path in sorted(new.iterdir(), key=lambda x: x.name in (ABOUT, CARD)):
      path.replace(folder / path.name)
  say(f'renewed: {folder}')
  return exports


def _read(folder: Path) -> tuple[dict[str, Any], list[Export]]:
  try:
    about = parse_json((folder / ABOUT).read_bytes(), str(folder / ABOUT))
    exports = [Export.of(entry) for entry in about.pop('exports')]
    check_description(about, str(folder / ABOUT))
    model_card(about, exports)  # Whatever it cannot show is damage.
  except (OSError, UserError, LookupError, TypeError, ValueError) as error:
    raise UserError(
      f'{folder} is no folder of exports: its {ABOUT} is missing or does not '
      f'list them ({type(error).__name__}: {error}). Give the folder that '
      'export.py --out wrote.'
    ) from error
  if any(each.features for each in exports):
    raise UserError(
      f'{folder} has features, whose weights lie elsewhere. Write them again: '
      'python export.py --weights SOURCE --features --out NEW.'
    )
  if not any(each.format == 'stablehlo' for each in exports):
    raise UserError(
      f'there is nothing to renew in {folder}: it has no StableHLO, the only '
      'format that expires.'
    )
  return about, exports


def _weights_of(folder: Path, exports: Sequence[Export]) -> Path:
  # safetensors first: reading it needs no PyTorch.
  for name in (SAFETENSORS, TORCH, 'model_timm.pth', 'model_official.pth'):
    if (folder / name).is_file():
      return folder / name
  programs = [each for each in exports if each.format == 'stablehlo']
  words = []
  for flag, canvas in ('--sizes', False), ('--canvas', True):
    found = [x.size for x in programs if x.canvas == canvas]
    sizes = ['{}x{}'.format(*x) if x else FREE for x in found]
    words += [flag, *sizes] if found else []
  labelled = programs[0].probabilities and not programs[0].classes
  more = ' --probabilities' * bool(labelled)
  raise UserError(
    f'{folder} has neither {SAFETENSORS} nor {TORCH} to renew its StableHLO '
    'from. Export again from the original weights: python export.py --weights '
    f'SOURCE --out NEW {" ".join(words)}{more}.'
  )


def _gives_probabilities(folder: Path, export: Export) -> bool:
  # Older entries do not say so; the card of their folder does.
  if export.probabilities is not None:
    return export.probabilities
  card = folder / CARD
  if not card.is_file():
    raise UserError(
      f'neither {ABOUT} nor {CARD} of {folder} says whether {export.file} '
      f'gives probabilities. Export again: python export.py --weights {folder} '
      '--out NEW, with the same --sizes, and with --probabilities if it does.'
    )
  return '`probabilities`' in card.read_text('utf-8')
