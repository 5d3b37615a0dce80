"""Writes files and folders that appear complete or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resnest_jax.errors import UserError


def temporary_path(path: Path) -> Path:
  """Returns a hidden name next to `path`, different in each process."""
  # A rename is atomic only within a file system. The suffix stays: NumPy and
  # OpenCV choose the format by it.
  return path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
  """Yields a path to write to; it replaces `path` unless an error is raised."""
  temporary = temporary_path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
  """As `whole_file`, a folder to fill; `path` must be missing or empty."""
  temporary = temporary_path(path)
  # Without exist_ok: another host's process may have the same id and name.
  temporary.mkdir(parents=True)
  try:
    yield temporary
    if path.exists():
      path.rmdir()  # Fails if another process has filled it meanwhile.
    temporary.rename(path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


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


def check_new(folder: Path) -> None:
  """Raises `UserError` unless `folder` is missing or empty."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(
      f'{folder} is there already and nothing was written; give another '
      'folder, or remove it.'
    )


@contextlib.contextmanager
def explain_refusal(what: str | Path, remedy: str) -> Iterator[None]:
  """Turns a refusal to write into a `UserError` that ends with `remedy`.

  For commands that start over; `errors.writing` serves those that resume.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write {what}: {error}. Make sure that there is space and that '
      f'you may write there, or {remedy}.'
    ) from error
