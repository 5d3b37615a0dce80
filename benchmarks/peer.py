"""Another library in a process of its own, with which ours takes turns."""

import contextlib
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from resnest_jax.errors import UserError


class Peer:
  """Answers one request at a time; every request and answer is a line.

  Attributes:
    version: its first line, which says what it is.
  """

  def __init__(self, command: str, script: str, *arguments: str | Path):
    """Starts it.

    Args:
      command: a Python that has mmsegmentation, with flags if it needs any.
      script: a file next to this one.
      *arguments: of the script.

    Raises:
      UserError: it does not start.
    """
    path = Path(__file__).with_name(script)
    try:
      self._process = subprocess.Popen(
        [*shlex.split(command), str(path), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
    except OSError as error:
      raise UserError(
        f'--peer {command} does not start ({error.strerror}); it needs a '
        'Python with mmsegmentation.'
      ) from error
    self.version = self._answer()

  def seconds(self, request: str = '') -> float:
    """What it answers: how long the request took."""
    self._process.stdin.write(f'{request}\n')
    self._process.stdin.flush()
    return float(self._answer())

  def _answer(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      raise UserError(
        f'the peer has ended with status {self._process.wait()}; what it wrote '
        'stands above. --peer needs a Python with mmsegmentation.'
      )
    return line.strip()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


@contextlib.contextmanager
def open_peer(
  command: str | None, script: str, *arguments: str | Path
) -> Iterator[Peer | None]:
  """A `Peer`, or None without a command."""
  if not command:
    yield None
    return
  peer = Peer(command, script, *arguments)
  try:
    yield peer
  finally:
    peer.close()
