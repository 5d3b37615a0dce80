"""Weight files: safetensors, and others' without running their code."""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from resnest_jax import files
from resnest_jax.errors import UserError, ending
from resnest_jax.text import listed
from resnest_jax.untrusted import brief, check_json, parse_json
from resnest_jax.weights import gluon, pickles
from resnest_jax.weights.networks import Network, find_network

SAFETENSORS = 'model.safetensors'
TORCH = 'model.pth'
ABOUT = 'about.json'
# Kinds of names whose libraries read nothing but PyTorch's files.
WITH_TORCH = ('mmseg', 'mmdet', 'encoding', 'detectron2')
TORCH_SUFFIXES = ('.pth', '.pt', '.bin')
LONGEST_NAME = 500
MAX_HEADER = 100_000_000  # Bytes, safetensors' own limit.
# Ends messages about a description.
CONVERT_AGAIN = 'Convert again from the original.'
HEADER_KEY = 'resnest_jax'  # Of our description, in both formats.
# Of safetensors; others, such as float8, are not read.
TYPES = re.compile('F64|F32|F16|BF16|[IU](64|32|16|8)|BOOL')


class WeightFile(NamedTuple):
  """The contents of a file."""

  state_dict: dict[str, np.ndarray]  # Half precision has become float32.
  about: dict[str, Any]  # Our description, {} in files of others.
  meta: dict[str, Any]  # The metadata of others.
  network: Network | None = None  # The state dict's; None: it is at the top.
  networks: Sequence[Network] = ()  # All that the file holds.


def read_weights(path: Path, part: str | None = None) -> WeightFile:
  """Reads a safetensors, PyTorch or GluonCV file, recognised by its content.

  `part` names one of several networks; see `Network`. Raises `UserError` for
  another format, a damaged file, a pickle that would run code, no state dict
  inside, or if PyTorch is not installed.
  """
  path = weight_file(path)
  with path.open('rb') as opened:
    start = opened.read(9)
  # First: the length of safetensors' header may look like a zip file or pickle.
  length = int.from_bytes(start[:8], 'little')
  if start[8:9] == b'{' and length <= MAX_HEADER:
    file = _read_safetensors(path, part)
  elif start[:8] == gluon.MAGIC:
    file = _found(gluon.read_gluon(path), part)
  # Zip files since PyTorch 1.6, bare pickles before.
  elif start[:4] == b'PK\x03\x04' or start[:1] == b'\x80':
    file = _read_torch(path, part)
  else:
    begins = f'begins with {start!r}' if start else 'is empty'
    raise UserError(
      f"{path} is neither a safetensors nor a PyTorch file, nor GluonCV's: it "
      f'{begins}. It may be a web page or cut off; get it again.'
    )
  for name in file.state_dict:  # Messages list names.
    if len(name) > LONGEST_NAME or not name.isprintable():
      raise UserError(
        f'{path} has a tensor named {brief(name)}, which is no name of a '
        'network; it was not read. Use another source.'
      )
  return file


def weight_file(path: Path) -> Path:
  """Returns `path`, or the weights in it if it is a folder."""
  path = Path(path)
  if path.is_file():
    return path
  if not path.is_dir():
    raise UserError(f'there is no weight file {path}.')
  for name in (SAFETENSORS, TORCH):
    if (path / name).is_file():
      return path / name
  inside = listed(sorted(x.name for x in path.iterdir()), 8)
  run = re.fullmatch(r'(.+)/checkpoints(/\d+)?', str(path.absolute()))
  remedy = 'Give the file itself'
  if run:
    remedy = f'Give the folder of the training, {run[1]}'
  elif (path / 'log.jsonl').is_file():
    remedy = 'A training there has no checkpoint yet: let train.py go on'
  raise UserError(
    f'the folder {path} holds neither {SAFETENSORS} nor {TORCH}, nor the '
    f'checkpoints of a training, but {inside or "nothing"}. {remedy}.'
  )


def _read_safetensors(path: Path, part: str | None) -> WeightFile:
  import safetensors

  try:
    with safetensors.safe_open(path, framework='np') as file:
      header = file.metadata() or {}
      names = list(file.keys())
      for name in names:
        kind = file.get_slice(name).get_dtype()
        if not TYPES.fullmatch(kind):
          raise pickles.unknown_type(path, name, kind)
      tensors = {name: _float32(file.get_tensor(name)) for name in names}
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise UserError(f'{path} is damaged ({error}); get it again.') from error
  about = {}
  if text := header.pop(HEADER_KEY, ''):
    with ending(CONVERT_AGAIN):
      about = parse_json(text, f'the description in the header of {path}')
  return _found(tensors, part)._replace(about=about, meta=header)


def _found(tensors: Mapping[str, Any], part: str | None) -> WeightFile:
  network, others = find_network(tensors, part)
  inside = network.tensors if network else tensors
  return WeightFile(inside, {}, {}, network, others)


def _float32(value: np.ndarray) -> np.ndarray:
  # Exact. NumPy sees bfloat16 as kind 'V', so the test excludes integers and
  # bools instead of naming floats.
  short = value.dtype.itemsize < 4 and value.dtype.kind not in 'iub'
  return value.astype(np.float32) if short else value


def _read_torch(path: Path, part: str | None) -> WeightFile:
  content = pickles.load_pickle(path)
  outer = content if isinstance(content, Mapping) else {}
  file = _found(outer, part)
  tensors = file.state_dict
  if not file.network:  # `recognise` says what is there.
    nested = (outer.get(key) for key in ('state_dict', 'model'))
    tensors = next((x for x in nested if isinstance(x, Mapping)), outer)
  if not tensors or not all(
    isinstance(name, str) and hasattr(value, 'layout')
    for name, value in tensors.items()
  ):
    found = f'the keys {listed(outer)}' if outer else type(content).__name__
    found = 'an empty one' if content == {} else found
    raise UserError(
      f'{path} holds no state dict: accepted are name -> tensor, alone or in '
      f'mappings; there is {found}. Save model.state_dict() with torch.save.'
    )
  extras = (outer.get(key) for key in (HEADER_KEY, 'meta'))
  about, meta = (x if isinstance(x, dict) else {} for x in extras)
  if about:
    with ending(CONVERT_AGAIN):
      check_json(about, f'the description in {path}')
  arrays = pickles.to_numpy(path, tensors)
  return file._replace(state_dict=arrays, about=about, meta=meta)


def write_weights(
  folder: Path,
  kind: str,
  state_dict: Mapping[str, np.ndarray],
  about: Mapping[str, Any],
  torch: bool | None = None,
) -> list[Path]:
  """Writes a state dict and its description into a new folder.

  The folder is new or empty, and appears complete or not at all. Kinds of
  `WITH_TORCH` write `model.pth`, others `model.safetensors`, unless `torch`
  says otherwise. `about` is JSON-able; it is written into the weight file and
  into `about.json`. Returns the paths of both.
  """
  folder, about = Path(folder), public(about)
  files.check_new(folder)
  # Written here: the packages' own errors do not say why a write is refused.
  if kind in WITH_TORCH if torch is None else torch:
    name, content = TORCH, _torch_file(state_dict, about, kind)
  else:
    name, content = SAFETENSORS, _safetensors_file(state_dict, about)
  with files.explain_refusal(folder), files.whole_folder(folder) as temporary:
    (temporary / name).write_bytes(content)
    files.write_json(temporary / ABOUT, about)
  return [folder / name, folder / ABOUT]


def public(about: Mapping[str, Any]) -> dict[str, Any]:
  """A description to be published: its provenance names no local folders."""
  return {
    key: with_texts(value, _without_folder) if key == 'provenance' else value
    for key, value in about.items()
  }


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
  """The value with each text in it changed."""
  if isinstance(value, Mapping):
    return {key: with_texts(each, change) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [with_texts(each, change) for each in value]
  return change(value) if isinstance(value, str) else value


# Of an absolute path in a text, but not of an address.
_FOLDERS = re.compile(
  r'(?<![\w/:.)])(?:/[^\s/]+)+/(?=\w)|\b[A-Z]:(?:\\[^\s\\]+)+\\'
)


def _without_folder(value: str) -> str:
  # Files of others may be from another system.
  if PureWindowsPath(value).is_absolute():
    return PureWindowsPath(value).name
  local = value in ('.', '..') or (os.sep in value and os.path.exists(value))
  if local or os.path.isabs(value) or value.startswith('~'):
    return os.path.basename(os.path.abspath(value))
  return _FOLDERS.sub('', value)  # In a sentence, say.


def _safetensors_file(state_dict, about) -> bytes:
  from safetensors.numpy import save

  # `save` ignores strides.
  tensors = {k: np.asarray(v, order='C') for k, v in state_dict.items()}
  # timm and others look for the format.
  content = save(tensors, {'format': 'pt', HEADER_KEY: json.dumps(about)})
  # `save` writes metadata in any order, and no two files would be the same.
  end = 8 + int.from_bytes(content[:8], 'little')
  header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
  header = header.ljust(-(-len(header) // 8) * 8)
  return len(header).to_bytes(8, 'little') + header + content[end:]


def _torch_file(state_dict, about, kind) -> bytes:
  pickles.check_torch()
  import torch

  data = {key: about.get(key) for key in ('classes', 'palette')}
  # mmsegmentation 1.x reads `dataset_meta`, 0.x the names in capitals.
  meta = {'dataset_meta': data} | {k.upper(): v for k, v in data.items()}
  # Copies, because PyTorch warns of arrays that cannot be written to.
  tensors = {k: torch.from_numpy(np.array(v)) for k, v in state_dict.items()}
  content = {'meta': meta if data['classes'] else {}, 'state_dict': tensors}
  if kind == 'detectron2':  # The latter makes it find names below others.
    content = {'model': tensors, 'matching_heuristics': True}
  file = io.BytesIO()
  torch.save(content | {HEADER_KEY: dict(about)}, file)
  return file.getvalue()


def checksum(path: Path, kind: str = 'sha256') -> str:
  """In hexadecimal digits."""
  with Path(path).open('rb') as file:
    return hashlib.file_digest(file, kind).hexdigest()
