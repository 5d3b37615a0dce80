"""What libjpeg complains about while OpenCV decodes.

A JPEG that is damaged in its middle is decoded all the same: the rest of the
picture is wrong, and a line on the process's error output says so, without the
file's name.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator

_STDERR = 2
# How libjpeg's messages about damaged data begin. Others, such as that of an
# unknown JFIF version, are about pictures that are whole.
_DAMAGE = (
  'Corrupt JPEG data',
  'Premature end of JPEG file',
  'Inconsistent progression sequence',
)


@contextlib.contextmanager
def jpeg_warnings() -> Iterator[list[str]]:
  """Collects libjpeg's messages about damaged data.

  File descriptor 2 is redirected, for all threads of the process, until the
  end; what else was written to it is written then. Not to be nested, nor used
  by two threads at once.

  Yields:
    A list that holds the messages, without their ends of line, after the end.
  """
  found: list[str] = []
  try:
    original = os.dup(_STDERR)
  except OSError:  # It is closed: nobody can write to it.
    yield found
    return
  with tempfile.TemporaryFile() as written:
    os.dup2(written.fileno(), _STDERR)
    try:
      yield found
    finally:
      os.dup2(original, _STDERR)
      os.close(original)
      written.seek(0)
      for line in written:
        text = line.decode(errors='replace').rstrip()
        if text.startswith(_DAMAGE):
          found.append(text)
        else:
          os.write(_STDERR, line)
