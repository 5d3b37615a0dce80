"""A disk that gets full and a right that is lost, for real."""

import contextlib
import ctypes
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from hosts import start

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


def limit_files(process: int, size: int | None) -> None:
  """No file of the process (0: this one) may have more bytes; None: any."""
  _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
  limits = (hard if size is None else size, hard)
  resource.prlimit(process, resource.RLIMIT_FSIZE, limits)


class SmallDisk:
  """A folder on a disk of its own, or a limit where mounting is forbidden."""

  def __init__(self, folder: Path, mounted: bool):
    self.folder, self.mounted = folder, mounted
    self.refusal = 'No space left on device' if mounted else 'File too large'

  def fill(self, process: int) -> None:
    """Leaves no space, for that process at least."""
    if not self.mounted:
      return limit_files(process, 1024)
    path = self.folder / 'filler'
    with contextlib.suppress(OSError), path.open('ab', 0) as file:
      while True:
        file.write(bytes(4096))

  def free(self, process: int) -> None:
    """Undoes `fill`."""
    (self.folder / 'filler').unlink(missing_ok=True)
    limit_files(process, None)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[SmallDisk]:
  """Mounts a tmpfs of that size ('4m'), if it may."""
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
  silent = {'stderr': subprocess.DEVNULL}
  mounted = bool(shutil.which('mount') and not subprocess.call(mount, **silent))
  try:
    yield SmallDisk(folder, mounted)
  finally:
    if mounted:
      subprocess.run(['umount', '--lazy', str(folder)], check=True)


@contextlib.contextmanager
def small_files(size: int = 1024) -> Iterator[None]:
  """No file of this process may have more bytes: as on a disk that is full."""
  limit_files(0, size)
  try:
    yield
  finally:
    limit_files(0, None)


@contextlib.contextmanager
def obeying_permissions() -> Iterator[None]:
  """In this thread, permissions bind root as they do others."""
  libc = ctypes.CDLL(None)
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # Version 3, this thread.
  sets = (ctypes.c_uint32 * 6)()  # The first is effective.
  assert libc.capget(header, sets) == 0
  before = sets[0]
  sets[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
  try:
    assert libc.capset(header, sets) == 0
    yield
  finally:
    sets[0] = before
    assert libc.capset(header, sets) == 0


def kill_while_emptied(folder: Path, *command: object) -> None:
  """Fills the folder, runs `python COMMAND` and kills it while files go."""
  names = [folder / f'{i:05}' for i in range(20_000)]  # That takes a while.
  for name in names:
    name.touch()
  with start(*command, devices=1) as process:
    while names[0].exists() and names[-1].exists():
      assert process.poll() is None
      time.sleep(0.0005)
    process.kill()
  assert not folder.exists()
