"""Writes files and folders that appear complete or not at all.

They are written under a hidden name next to their own. What a killed process
leaves there is removed by the next one that writes into the same folder.
"""

import codecs
import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resnest_jax.errors import UserError

# Host, process and number. Not the name of the file, which may have the 255
# bytes that a file system allows.
_TEMPORARY = re.compile(
  r'\.resnest-jax-(\w{8})-(\d{1,9})-\d+(\..*)?', re.DOTALL
)
_LONG = 7 * 24 * 60 * 60  # Seconds; no file is written for so long.
_MOST_TEXT = 2**28  # Bytes of a list or a classes file.
_OTHER_OUT = 'give another --out'
_numbers = itertools.count()
_cleaned: set[str] = set()
_cleaning = threading.Lock()


def temporary_path(path: Path) -> Path:
  """Returns a hidden name next to `path`, different at each call."""
  clean(path.parent)
  # A rename is atomic only within a file system. The suffix stays: NumPy and
  # OpenCV choose the format by it.
  return path.with_name(
    f'.resnest-jax-{_host()}-{os.getpid()}-{next(_numbers)}{path.suffix[:16]}'
  )


def clean(folder: Path) -> None:
  """Removes from a folder, once, what killed processes left unfinished."""
  with _cleaning, contextlib.suppress(OSError):
    if (known := os.path.abspath(folder)) in _cleaned:
      return
    _cleaned.add(known)
    for entry in list(os.scandir(folder)):
      with contextlib.suppress(OSError):
        if _is_abandoned(entry):
          remove(Path(entry))


def _is_abandoned(entry: os.DirEntry) -> bool:
  found = _TEMPORARY.fullmatch(entry.name)
  if not found:
    return False
  if found[1] == _host():
    return not _runs(int(found[2]))
  # Which processes another host runs is not known here.
  return time.time() - entry.stat(follow_symlinks=False).st_mtime > _LONG


def _host() -> str:
  # Processes of two containers may share host name and numbers.
  try:
    numbering = os.stat('/proc/self/ns/pid').st_ino
  except OSError:  # Not Linux.
    numbering = 0
  return f'{zlib.crc32(f"{platform.node()} {numbering}".encode()):08x}'


def _runs(process: int) -> bool:
  """Whether another process of this number runs on this host."""
  # In a container each start has the number of the one before.
  if process == os.getpid():
    return False
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:  # It belongs to another user.
    pass
  return True


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
  """Yields a path to write to; it replaces `path` unless an error is raised.

  A link at `path` is replaced, and not followed.
  """
  temporary = temporary_path(path)
  try:
    with _named(temporary, path):
      path.parent.mkdir(parents=True, exist_ok=True)
      yield temporary
      temporary.replace(path)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
  """As `whole_file`, a folder to fill; `path` must be missing or empty."""
  # The user may give a link to a folder on a larger disk.
  path = path.resolve()
  with work_folder(path) as temporary:
    yield temporary
    if path.exists():
      path.rmdir()  # Fails if another process has filled it meanwhile.
    temporary.rename(path)


@contextlib.contextmanager
def work_folder(path: Path) -> Iterator[Path]:
  """Yields a hidden folder next to `path`, and removes it."""
  temporary = temporary_path(path)
  try:
    with _named(temporary, path):
      temporary.mkdir(parents=True)
      yield temporary
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def read_bounded(path: str | os.PathLike, most: int) -> bytes:
  """Reads a file of at most so many bytes; `UserError`: longer, or no file."""
  about = os.stat(path)
  # A link may lead to /dev/zero, which never ends, or to a pipe, which waits.
  if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
    raise UserError(f'{path} is a device, a pipe or a socket; remove it.')
  if (size := about.st_size) <= most:
    with open(path, 'rb') as file:
      size = len(content := file.read(size + 1))
  if size > most:
    raise UserError(
      f'{path} has {size} bytes or more, and at most {most} are read.\nIt is '
      'damaged, or another file than it should be.'
    )
  return content


@contextlib.contextmanager
def _named(temporary: Path, path: Path) -> Iterator[None]:
  """Errors about `temporary`, or no file, become errors about `path`."""
  try:
    yield
  except OSError as error:
    name = str(error.filename or temporary)
    if error.errno is None or not name.startswith(str(temporary)):
      raise
    name = f'{path}{name.removeprefix(str(temporary))}'
    raise OSError(error.errno, error.strerror, name) from error


def remove_folder(path: Path) -> None:
  """Removes a folder; a kill leaves no part of it under its name."""
  remove(path.rename(temporary_path(path)))


def remove(path: Path) -> None:
  """Removes a folder with its content, a file, or a link alone."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink()


# Libraries take these for a pattern, the end of an address or, in C++, for a
# separator and no text at all.
_SPECIAL = re.compile(r'[*?\[\\:\x00-\x1f\ud800-\udfff]')


@contextlib.contextmanager
def plain_name(path: Path) -> Iterator[Path]:
  """Yields a path that every library understands: `path`, or a link to it."""
  path = path.absolute()
  if not _SPECIAL.search(str(path)):
    yield path
    return
  if _SPECIAL.search(tempfile.gettempdir()):
    raise UserError(
      f'{path} has characters that the library for it does not understand, and '
      f'so has the folder of temporary files, {tempfile.gettempdir()}. Set '
      'TMPDIR to a folder of a plain name.'
    )
  with tempfile.TemporaryDirectory(prefix='resnest_jax_') as folder:
    link = Path(folder, f'link{_SPECIAL.sub("", path.suffix)}')
    link.symlink_to(path)
    yield link


def write_text(path: Path, text: str) -> None:
  with whole_file(path) as temporary:
    # A name that is not UTF-8 has characters that no file can have.
    temporary.write_text(text, 'utf-8', 'backslashreplace')


def write_json(path: Path, content: Mapping[str, Any]) -> None:
  write_text(path, json.dumps(content, indent=2) + '\n')


def read_text(path: Path) -> str:
  """A user's text in UTF-8, or in UTF-16 as Windows marks it; or ValueError."""
  if path.exists() and not path.is_file():
    raise OSError('it is no file')
  content = read_bounded(path, _MOST_TEXT)
  marked = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
  text = content.decode('utf-16' if marked else 'utf-8-sig')
  if '\0' in text:
    raise ValueError('it has bytes that are no text')
  return text


def inside(folder: Path, name: str | Path) -> Path:
  """The path of a file below a folder; `UserError` where it leads outside."""
  path = folder / name
  if not path.parent.resolve().is_relative_to(folder.resolve()):
    raise UserError(
      f'{path} would lie outside of {folder}, in {path.parent.resolve()}; '
      'remove the link or the ".." that leads there.'
    )
  return path


def check_new(folder: Path, remedy: str = _OTHER_OUT) -> None:
  """Raises `UserError` unless `folder` is empty, or can be made."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(
      f'{folder} is there already and nothing was written; give another '
      'folder, or remove it.'
    )
  # `whole_folder` works there.
  check_writable(folder.resolve().parent, remedy)


def check_writable(folder: Path, remedy: str = _OTHER_OUT) -> None:
  """Raises `UserError` unless `folder` can be written to, or made; tries it."""
  made = []
  try:
    with explain_refusal(folder, remedy):
      above = (folder, *folder.parents)
      made += itertools.takewhile(lambda x: not x.exists(), above)
      folder.mkdir(parents=True, exist_ok=True)
      probe = temporary_path(folder / 'probe')
      with _named(probe, folder):
        probe.touch()
        probe.unlink()
  finally:
    for path in made:
      with contextlib.suppress(OSError):
        path.rmdir()


@contextlib.contextmanager
def explain_refusal(
  what: str | Path, remedy: str = _OTHER_OUT
) -> Iterator[None]:
  """Turns a refusal to write into a `UserError` that ends with `remedy`.

  For commands that start over; `errors.writing` serves those that resume.
  """
  try:
    yield
  except OSError as error:
    why = error.strerror or str(error)
    if error.filename and str(error.filename) != str(what):
      why += f' ({error.filename})'
    raise UserError(
      f'cannot write {what}: {why}. Make sure that there is space and that '
      f'you may write there, or {remedy}.'
    ) from error
