"""Files and folders that appear whole or not at all.

They are written under a temporary name in the folder where they are to be, as
renaming is atomic within a file system alone.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resnest_jax.errors import UserError


def temporary_path(path: Path) -> Path:
  """A hidden name next to `path`, another one in each process.

  It has the ending of `path`, by which NumPy and OpenCV choose the format.
  """
  return path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
  """Yields where to write; after an error `path` is what it was before.

  Args:
    path: of the file, which is replaced; its folder is made.
  """
  temporary = temporary_path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
  """Yields a folder to write into, which is removed after an error.

  Args:
    path: a new folder, or an empty one; see `check_new`.
  """
  temporary = temporary_path(path)
  temporary.mkdir(parents=True)  # Fails if it is another process's.
  try:
    yield temporary
    if path.exists():
      path.rmdir()  # Fails if another process has filled it meanwhile.
    temporary.rename(path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
  """Writes or replaces a whole text file, in UTF-8."""
  with whole_file(path) as temporary:
    temporary.write_text(text, 'utf-8')


def write_json(path: Path, content: Mapping[str, Any]) -> None:
  """Writes or replaces a whole file of indented JSON."""
  write_text(path, json.dumps(content, indent=2) + '\n')


def check_new(folder: Path) -> None:
  """Raises `UserError` if something is there already."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(
      f'{folder} is there already and nothing was written; give another '
      'folder, or remove it.'
    )


@contextlib.contextmanager
def explain_refusal(what: str | Path, remedy: str) -> Iterator[None]:
  """Turns the system's refusal to write into a `UserError`.

  For commands that begin anew; `errors.writing` is for those that resume.

  Args:
    what: is written, as the message calls it.
    remedy: besides free space and permission: 'give another --out'.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write {what}: {error}. Make sure that there is space and that '
      f'you may write there, or {remedy}.'
    ) from error
