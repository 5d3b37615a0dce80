"""Finds weights by path, published name or address, and downloads them.

RESNEST_JAX_CACHE names the folder of downloads (default: `resnest_jax/weights`
in the user's cache folder), where what lies in a published zip archive is kept
without it. RESNEST_JAX_OFFLINE=1 or HF_HUB_OFFLINE=1 forbids
them. hf:// sources use the cache and the variables of huggingface_hub.
"""

import difflib
import hashlib
import os
import posixpath
import urllib.error
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path

from resnest_jax.downloads import TIMEOUT, check_size, download, offline
from resnest_jax.errors import UserError
from resnest_jax.files import clean, explain_refusal, whole_file, work_folder
from resnest_jax.runtime import cache_in
from resnest_jax.untrusted import DAMAGED, check_entry
from resnest_jax.weights.files import TORCH_SUFFIXES, checksum, read_weights
from resnest_jax.weights.pickles import check_torch
from resnest_jax.weights.published import PUBLISHED, Published, find, known_file

OTHER_CACHE = 'set RESNEST_JAX_CACHE to another folder'


def fetch(
  source: str | Path, published: Mapping[str, Published] = PUBLISHED
) -> Path:
  """Finds `source` on this machine, or downloads it; checks known checksums.

  It is a path, one of the `published` names ('resnest50', 'ade20k_pspnet'), an
  http(s) address, or 'hf://owner/repository/file' (owner/repository@revision/
  file for a branch, tag or commit). Raises `UserError` if it is not found or
  not whole, or would be a PyTorch file without PyTorch to read it.
  """
  path, text = Path(source), str(source)
  # A path wins over a published name: a file of that name is here on purpose.
  if path.exists():
    return _given(path)
  if known := find(text, published):
    return _cached(known)
  if text.startswith(('http://', 'https://')):
    # Other files have no unique names, such as model.safetensors.
    name = _file_name(text) or 'weights'
    if known := known_file(name):
      return _cached(known._replace(urls=(text,), others=()))
    # A file system takes 255 bytes.
    start = hashlib.sha256(text.encode()).hexdigest()[:12]
    return _cached(Published((text,), ''), f'{start}-{name[-100:]}')
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
  return cache_in('weights', 'RESNEST_JAX_CACHE')


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
  what = {'repo_id': f'{parts[0]}/{repository}', 'filename': parts[2]}
  what |= {'revision': revision or None}
  what |= {'endpoint': os.environ.get('HF_ENDPOINT', '').rstrip('/') or None}
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


def _given(path: Path) -> Path:
  """What is here or, of a file that is a published archive, what is inside."""
  # PyTorch's own files are zip archives as well. A pipe would be waited for.
  names = _entries(path) if path.is_file() else {}
  held = [x for x in map(known_file, names) if x and x.member in names]
  known = held[0] if held else known_file(path.name)
  if known and (held or known.name != path.name):
    kept = cache_folder() / known.name
    if not kept.is_file() or _digits(kept, known) != known.digits:
      _unpack(path, kept, known)
    return kept
  if known:
    _check(path, known)
  return path


def _entries(path: Path) -> dict[str, str]:
  """Of a zip archive, names of files and where they lie; else none."""
  try:
    with zipfile.ZipFile(path) as archive:
      return {posixpath.basename(x): x for x in archive.namelist()}
  except DAMAGED:
    return {}


def _cached(known: Published, name: str = '') -> Path:
  """The file of a name in the cache, or downloaded; '' is the published one."""
  folder, files = cache_folder(), (known, *known.others)
  clean(folder)  # A killed download may have left gigabytes.
  pairs = [(folder / (name or file.name), file) for file in files]
  for path, file in pairs:
    if path.is_file():
      if not name:
        _check(path, file, 'it should; remove it to download it again')
      return path
  place = f'put it at {pairs[0][0]}'
  if known.member:
    place = f'put {known.member}, which is in it, into {folder}'
  advice = f'Download it by other means and give its path, or {place}.'
  if offline():
    urls = ' or '.join(x.urls[0] for x in files)
    raise UserError(
      f'{urls} is not in the cache and downloads are switched off '
      f'(RESNEST_JAX_OFFLINE or HF_HUB_OFFLINE). {advice}'
    )
  if pairs[0][0].name.endswith(TORCH_SUFFIXES):
    check_torch()
  with explain_refusal(folder, OTHER_CACHE):
    folder.mkdir(parents=True, exist_ok=True)
  failures = []
  for path, file in pairs:
    for url in file.urls:
      try:
        _download(url, path, file, not name)
        return path
      # A truncated or wrong file (`UserError`) is no reason to give up either.
      except (OSError, HTTPException, ValueError, UserError) as error:
        failures.append(f'{url}: {str(error).rstrip(".")}')
  raise UserError(f'no download succeeded. {"; ".join(failures)}. {advice}')


def _download(url: str, path: Path, known: Published, published: bool) -> None:
  with work_folder(path) as folder:
    sent = folder / (
      f'{Path(known.member).stem}.zip' if known.member else path.name
    )
    try:
      download(url, sent, lambda file: None)
      if known.member:
        return _unpack(sent, path, known)
      if published:
        _check(sent, known)
      else:  # Nothing else tells a page to log in or a body that was cut off.
        read_weights(sent)
    except UserError as error:
      said = str(error).replace(str(sent), 'what it sends')
      raise UserError(said.replace(str(folder), str(path.parent))) from error
    sent.replace(path)


def _unpack(archive: Path, path: Path, known: Published) -> None:
  """Takes a published file out of its archive: whole and checked, or not."""
  with explain_refusal(path.parent, OTHER_CACHE), whole_file(path) as temporary:
    with temporary.open('wb') as file:
      for block in _blocks(archive, path.parent, known.member):
        file.write(block)
    _check(temporary, known, what=f'{known.member} in {archive}')


def _blocks(path: Path, folder: Path, member: str) -> Iterator[bytes]:
  """A file in an archive, which is to be written into a folder."""
  try:
    with zipfile.ZipFile(path) as archive:
      entry = archive.getinfo(_entries(path).get(member, member))
      check_entry(archive, entry)
      check_size(entry.file_size, folder)
      with archive.open(entry) as file:
        while block := file.read(2**20):
          yield block
  except (*DAMAGED, KeyError) as error:
    why = ' '.join(map(str, error.args))
    raise UserError(
      f'{path} is no zip archive from which {member} can be unpacked ({why}). '
      'It may be a web page or cut off; get it again.'
    ) from error


def _digits(path: Path, known: Published) -> str:
  # Published digits are the start of the checksum.
  kind = 'sha1' if known.sha1 else 'sha256'
  return checksum(path, kind)[: len(known.digits)]


def _check(
  path: Path, known: Published, expected: str = 'published', what: str = ''
) -> None:
  if (found := _digits(path, known)) != known.digits:
    kind = 'SHA-1 is' if known.sha1 else 'SHA-256 begins with'
    raise UserError(
      f'{what or path} has the wrong checksum: its {kind} {found}, not '
      f'{known.digits}, as {expected}. It is damaged or another file.'
    )
