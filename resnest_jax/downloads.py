"""Downloads that end, whatever the other side sends.

RESNEST_JAX_MAX_DOWNLOAD is the most gigabytes of one, 20 by default.
"""

import base64
import os
import shutil
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import rich.progress

from resnest_jax.errors import UserError
from resnest_jax.files import whole_file
from resnest_jax.progress import console

TIMEOUT = 30  # Seconds without a byte.
# In each such time (seconds) at least so many bytes: a connection that drips
# would take days and never time out.
PATIENCE, LEAST_BYTES = 60.0, 60_000
MAX_GIGABYTES = 20.0
_LIMIT = 'RESNEST_JAX_MAX_DOWNLOAD'
_BLOCK = 2**20  # Bytes read at a time.


def download(url: str, path: Path, check: Callable[[Path], None]) -> None:
  """Downloads to `path`, which appears whole and checked, or not at all.

  Raises:
    UserError: switched off, too many bytes, too few in a time, or cut off.
    OSError, HTTPException, ValueError: of the connection, or of the address.
    Exception: of `check`, which is given a temporary file.
  """
  if offline():
    raise UserError(
      'downloads are switched off (RESNEST_JAX_OFFLINE or HF_HUB_OFFLINE)'
    )
  with whole_file(path) as temporary:
    with temporary.open('wb') as file:
      _transfer(url, path, file)
    check(temporary)


def offline() -> bool:
  # The hub's own variable counts for all sources, so that one is enough.
  return any(
    os.environ.get(name, '0').lower() not in ('', '0', 'false')
    for name in ('RESNEST_JAX_OFFLINE', 'HF_HUB_OFFLINE')
  )


def max_bytes() -> int:
  given = os.environ.get(_LIMIT, '')
  try:
    if (gigabytes := float(given or MAX_GIGABYTES)) > 0:
      return int(gigabytes * 1e9)
  except (ValueError, OverflowError):
    pass
  raise UserError(f'{_LIMIT} is {given!r}; give a number of gigabytes above 0.')


def check_size(size: int, folder: Path) -> None:
  """Raises `UserError` if a download of so many bytes must not begin."""
  if size > (limit := max_bytes()):
    raise UserError(
      f'it has {size / 1e9:.3g} GB, and at most {limit / 1e9:.3g} GB are '
      f'downloaded ({_LIMIT})'
    )
  while not folder.exists():
    folder = folder.parent
  if size > (free := shutil.disk_usage(folder).free):
    raise UserError(
      f'it has {size / 1e9:.3g} GB, and {folder} has {free / 1e9:.3g} GB free'
    )


def _request(url: str) -> urllib.request.Request:
  # urllib takes no user and password in an address, and its error shows them.
  parts = urllib.parse.urlsplit(url)
  user, _, host = parts.netloc.rpartition('@')
  request = urllib.request.Request(
    parts._replace(netloc=host).geturl(), headers={'User-Agent': 'resnest-jax'}
  )
  if user:
    secret = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
    # Not for hosts that it redirects to.
    request.add_unredirected_header('Authorization', f'Basic {secret}')
  return request


def _transfer(url: str, path: Path, file: BinaryIO) -> None:
  """Makes a request in a thread that may hang and is then left alone."""
  received, total = 0, 0  # Bytes; 0: the server does not say.
  failure, abandoned = None, False

  def work() -> None:
    nonlocal received, total, failure
    try:
      with urllib.request.urlopen(_request(url), timeout=TIMEOUT) as response:
        total = int(response.headers.get('Content-Length') or 0)
        check_size(total, path.parent)
        limit = max_bytes()
        # Not `read`, which would wait until a block is full.
        while not abandoned and (block := response.read1(_BLOCK)):
          received += len(block)
          if received > limit:
            check_size(received, path.parent)
          file.write(block)
    except Exception as error:  # Raised again below.
      failure = error

  # A daemon, so that Ctrl-C and errors end the process in spite of it.
  thread = threading.Thread(target=work, daemon=True)
  columns = (
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(),
    rich.progress.DownloadColumn(),
    rich.progress.TransferSpeedColumn(),
  )
  shown = console(stderr=True)
  with rich.progress.Progress(*columns, console=shown) as progress:
    task = progress.add_task(path.name, total=None)
    thread.start()
    since, before = time.monotonic(), 0
    try:
      while thread.is_alive():
        thread.join(0.1)
        progress.update(task, completed=received, total=total or None)
        if time.monotonic() - since > PATIENCE:
          if received - before < LEAST_BYTES:
            raise UserError(
              f'only {received - before} bytes came in {PATIENCE:g} s'
            )
          since, before = time.monotonic(), received
    finally:
      abandoned = True
  if failure is not None:
    try:
      raise failure
    finally:  # Or a cycle of references would keep its connection open.
      failure = None
  if total and received != total:
    raise UserError(f'it was cut off after {received} of {total} bytes')
