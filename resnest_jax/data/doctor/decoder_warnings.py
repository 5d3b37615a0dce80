"""libjpeg's complaints about damaged data while OpenCV decodes."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

# OpenCV decodes a JPEG that is damaged inside with wrong pixels and no error.
# The only sign is a line that libjpeg writes, without the file's name, to the C
# library's stderr, which Python's `sys.stderr` never sees.
_STDERR = 2
# Other messages, such as of an unknown JFIF version, concern intact pictures.
_DAMAGE = (
  'Corrupt JPEG data',
  'Premature end of JPEG file',
  'Inconsistent progression sequence',
)


@contextlib.contextmanager
def jpeg_warnings() -> Iterator[list[str]]:
  """Yields a list that holds libjpeg's messages once the context has ended.

  Redirects file descriptor 2 for the whole process, so it must not be nested
  or entered by two threads at once. Other output is passed on at the end.
  """
  found: list[str] = []
  original = os.dup(_STDERR)
  # A file rather than a pipe, which would block the decoder when it is full.
  with tempfile.TemporaryFile() as written:
    os.dup2(written.fileno(), _STDERR)
    try:
      yield found
    finally:
      # Restored first, so that the lines below reach the real stderr.
      os.dup2(original, _STDERR)
      os.close(original)
      # `dup2` shares the file's offset, which is at the end after writing.
      written.seek(0)
      for line in written:
        text = line.decode(errors='replace').rstrip()
        if text.startswith(_DAMAGE):
          found.append(text)
        else:
          os.write(_STDERR, line)
