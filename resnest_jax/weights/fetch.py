"""Finds weights by path, published name or address, and downloads them.

RESNEST_JAX_CACHE names the folder of downloads (default: `resnest_jax/weights`
in the user's cache folder). RESNEST_JAX_OFFLINE=1 or HF_HUB_OFFLINE=1 forbids
them. hf:// sources use the cache and the variables of huggingface_hub.
"""

import difflib
import hashlib
import os
import urllib.error
import urllib.parse
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

from resnest_jax.downloads import TIMEOUT, check_size, download, offline
from resnest_jax.errors import UserError
from resnest_jax.files import clean, explain_refusal
from resnest_jax.weights.files import TORCH_SUFFIXES, read_weights, sha256
from resnest_jax.weights.pickles import check_torch
from resnest_jax.weights.published import PUBLISHED, Published, known_file


def fetch(
  source: str | Path, published: Mapping[str, Published] = PUBLISHED
) -> Path:
  """Finds `source` on this machine, or downloads it; checks known checksums.

  Args:
    source: a path, a published name ('resnest50', 'ade20k_pspnet'), an http(s)
      address, or 'hf://owner/repository/file' (owner/repository@revision/file
      for a branch, tag or commit).
    published: the accepted names.

  Raises:
    UserError: an unknown name, no reachable mirror, a truncated file, a wrong
      checksum, or a PyTorch download without PyTorch to read it.
  """
  path, text = Path(source), str(source)
  # A path wins over a published name: a file of that name is here on purpose.
  if path.exists():
    if known := known_file(path.name):
      _check(path, known.sha256, path, f'{path.name} as published')
    return path
  if text in published:
    known = published[text]
    return _cached(known.urls, known.sha256)
  if text.startswith(('http://', 'https://')):
    known = known_file(_file_name(text))
    return _cached((text,), known.sha256 if known else '')
  if text.startswith('hf://'):
    return _from_hub(text)
  near = difflib.get_close_matches(text, published, 3, 0.5)
  meant = f' Did you mean {" or ".join(near)}?' if near else ''
  raise UserError(
    f'there is no file, folder or published model {text!r}.{meant} Accepted '
    'are the workdir of a training, a file, an http(s) address, '
    f'hf://owner/repository/file, and {", ".join(published)}.'
  )


def cache_folder() -> Path:
  """The folder of downloads, which may not exist yet."""
  if folder := os.environ.get('RESNEST_JAX_CACHE'):
    return Path(folder)
  cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(cache) / 'resnest_jax' / 'weights'


def _from_hub(text: str) -> Path:
  # Imported late: this takes half a second, and few commands need it.
  import huggingface_hub
  from huggingface_hub.errors import LocalEntryNotFoundError

  parts = text.removeprefix('hf://').split('/', 2)
  if len(parts) < 3 or not all(parts):
    raise UserError(
      f'{text!r} names no file; write hf://owner/repository/file, such as '
      'hf://timm/resnest50d.in1k/model.safetensors.'
    )
  repository, _, revision = parts[1].partition('@')
  # The download would be useless without PyTorch.
  if text.endswith(TORCH_SUFFIXES):
    check_torch()
  what = {
    'repo_id': f'{parts[0]}/{repository}',
    'filename': parts[2],
    'revision': revision or None,
    'endpoint': os.environ.get('HF_ENDPOINT', '').rstrip('/') or None,
  }
  why = 'downloads are switched off (RESNEST_JAX_OFFLINE or HF_HUB_OFFLINE)'
  if not offline():
    # The headers alone: hf_hub_download repeats a failing request for long.
    try:
      url, why = huggingface_hub.hf_hub_url(**what), ''
      about = huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
      check_size(about.size or 0, Path(huggingface_hub.constants.HF_HUB_CACHE))
    except Exception as error:
      why = f'the hub does not give it ({_one_line(error)})'
  try:
    # The cache may hold a file that the hub does not serve at the moment.
    path = huggingface_hub.hf_hub_download(
      **what, library_name='resnest_jax', local_files_only=bool(why)
    )
  except LocalEntryNotFoundError as error:
    raise UserError(
      f"{text} is not in the hub's cache and {why or _one_line(error)}. "
      'Download it by other means and give its path.'
    ) from error
  except Exception as error:  # Errors of httpx and hf_xet share no base class.
    raise UserError(
      f'{text} could not be downloaded: {_one_line(error)}'
    ) from error
  return Path(path)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split()) or type(error).__name__


def _file_name(url: str) -> str:
  try:
    path = urllib.parse.urlsplit(url).path
  except ValueError as error:
    raise UserError(f'the address {url} is malformed ({error}).') from error
  return urllib.parse.unquote(path).split('/')[-1]


def _cached(urls: Sequence[str], digits: str) -> Path:
  name = _file_name(urls[0]) or 'weights'
  # Published names are unique; others, such as model.safetensors, are not.
  if not digits:
    # A file system takes 255 bytes, of which whole_file needs some.
    name = f'{hashlib.sha256(urls[0].encode()).hexdigest()[:12]}-{name[-100:]}'
  path = cache_folder() / name
  clean(path.parent)  # A killed download may have left gigabytes.
  if path.is_file():
    _check(path, digits, path, 'it should; remove it to download it again')
    return path
  advice = f'Download it by other means and give its path, or put it at {path}.'
  if offline():
    raise UserError(
      f'{urls[0]} is not in the cache and downloads are switched off '
      f'(RESNEST_JAX_OFFLINE or HF_HUB_OFFLINE). {advice}'
    )
  if name.endswith(TORCH_SUFFIXES):
    check_torch()

  def check(file: Path) -> None:
    if digits:
      _check(file, digits, 'what it sends', 'published')
      return
    # Nothing else tells a page to log in or a body that was cut off.
    try:
      read_weights(file)
    except UserError as error:
      raise UserError(str(error).replace(str(file), 'what it sends')) from error

  with explain_refusal(path.parent, 'set RESNEST_JAX_CACHE to another folder'):
    path.parent.mkdir(parents=True, exist_ok=True)
  failures = []
  for url in urls:
    try:
      download(url, path, check)
      return path
    # A truncated or wrong file (`UserError`) is no reason to give up either.
    except (OSError, HTTPException, ValueError, UserError) as error:
      failures.append(f'{url}: {str(error).rstrip(".")}')
  raise UserError(f'no download succeeded. {"; ".join(failures)}. {advice}')


def _check(path: Path, digits: str, what: str | Path, expected: str) -> None:
  # Published digits are the start of the SHA-256. '' matches every file.
  found = sha256(path)[: len(digits)]
  if found != digits:
    raise UserError(
      f'{what} has the wrong checksum: its SHA-256 begins with {found}, not '
      f'with {digits} as {expected}. It is damaged or another file.'
    )
