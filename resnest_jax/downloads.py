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
from rich.markup import escape

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
      _Transfer(url, path, file).run()
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


class _Transfer:
  """One request, made in a thread that may hang and is then left alone."""

  def __init__(self, url: str, path: Path, file: BinaryIO):
    self._url, self._path, self._file = url, path, file
    self._done, self._total = 0, 0  # Bytes; 0: the server does not say.
    self._error: Exception | None = None
    self._abandoned = False

  def run(self) -> None:
    # A daemon, so that Ctrl-C and errors end the process in spite of it.
    thread = threading.Thread(target=self._work, daemon=True)
    columns = (
      rich.progress.TextColumn('{task.description}'),
      rich.progress.BarColumn(),
      rich.progress.DownloadColumn(),
      rich.progress.TransferSpeedColumn(),
    )
    with rich.progress.Progress(
      *columns, console=console(stderr=True)
    ) as progress:
      task = progress.add_task(escape(self._path.name), total=None)
      thread.start()
      since, before = time.monotonic(), 0
      try:
        while thread.is_alive():
          thread.join(0.1)
          progress.update(task, completed=self._done, total=self._total or None)
          if time.monotonic() - since > PATIENCE:
            if self._done - before < LEAST_BYTES:
              raise UserError(
                f'only {self._done - before} bytes came in {PATIENCE:g} s'
              )
            since, before = time.monotonic(), self._done
      finally:
        self._abandoned = True
    if (error := self._error) is not None:
      try:
        raise error
      finally:  # Or a cycle of references would keep its connection open.
        self._error = error = None
    if self._total and self._done != self._total:
      raise UserError(
        f'it was cut off after {self._done} of {self._total} bytes'
      )

  def _work(self) -> None:
    try:
      with urllib.request.urlopen(
        _request(self._url), timeout=TIMEOUT
      ) as response:
        self._total = int(response.headers.get('Content-Length') or 0)
        check_size(self._total, self._path.parent)
        limit = max_bytes()
        # Not `read`, which would wait until a block is full.
        while not self._abandoned and (block := response.read1(_BLOCK)):
          self._done += len(block)
          if self._done > limit:
            check_size(self._done, self._path.parent)
          self._file.write(block)
    except Exception as error:  # Raised again by `run`.
      self._error = error
