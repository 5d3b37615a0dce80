"""Opens a page in which a trained network can be tried on pictures.

    python -m resnest_jax.demo --weights ade20k_pspnet
    python -m resnest_jax.demo --weights runs/pspnet --examples holiday

--weights is a published name, a file, an address (see docs/weights.md) or the
workdir of a training. Drop a picture into the page to see its classes over it,
and how much of it they cover. The page asks nothing of other hosts. Ctrl-C
or `kill` ends it, and deletes what was uploaded. docs/demo.md says more.
"""

import argparse
import contextlib
import errno
import importlib.util
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnest_jax.errors import UserError
from resnest_jax.flags import Parser, add_source_flags

# Padded heights and widths are multiples of this, so that few are compiled.
BUCKET = 256
# Of the picture for which the network is compiled at the start: 4:3.
FIRST_SIZE = (480, 640)


def main() -> None:
  """Reads the command line, loads the network and serves the page."""
  flags = make_parser().parse_args()
  if importlib.util.find_spec('gradio') is None:
    raise UserError(
      "the page needs the package gradio: pip install 'gradio>=6'."
    )
  port = free_port(flags.host, flags.port)
  # It takes seconds, which a mistake in the command line need not.
  from resnest_jax import runtime
  from resnest_jax.inference.predictor import from_checkpoint
  from resnest_jax.prediction.sources import find_sources

  runtime.set_up()
  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, _end)
  sources = find_sources(flags.examples) if flags.examples else []
  predictor = from_checkpoint(
    flags.weights, checkpoint=flags.checkpoint, batch_size=1, bucket=BUCKET
  )
  examples = [source.path for source in sources if not source.is_video]
  with tempfile.TemporaryDirectory(prefix='resnest_jax_demo_') as uploads:
    # Gradio reads them when it is imported.
    os.environ['GRADIO_TEMP_DIR'] = uploads
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    serve(predictor, flags.weights, examples, flags.host, port, flags.share)


def serve(
  predictor: Any,
  name: str,
  examples: Sequence[Path],
  host: str,
  port: int,
  share: bool,
) -> None:
  """Compiles the network for a first size, and serves until it is stopped.

  Args:
    predictor: a `Predictor`.
    name: of its weights, as it was given.
    examples: paths of pictures to offer.
    host: address to listen on.
    port: the same, free a moment ago.
    share: whether to open a public address, too.

  Raises:
    UserError: the address cannot be listened on or made public.
  """
  import numpy as np

  from resnest_jax.demo import page

  print('compiling the network (a minute or more at full size)', flush=True)
  predictor.predict(np.zeros((*FIRST_SIZE, 3), np.uint8))
  blocks = page.make_page(predictor, Path(name).name, examples)
  try:
    _, local, public = blocks.queue().launch(
      server_name=host,
      server_port=port,
      share=share,
      inline=False,
      prevent_thread_lock=True,
      quiet=True,
      ssr_mode=False,
      footer_links=[],
      max_file_size=page.MAX_FILE_SIZE,
      **page.look(),
    )
  except OSError as error:
    raise _cannot_listen(host, port) from error
  try:
    if share and not public:
      raise UserError(
        "Gradio's servers gave no public address; is there a network? Without "
        '--share the page is for this machine.'
      )
    for address in filter(None, (local, public)):
      print(f'the page is at {address} (Ctrl-C ends it)', flush=True)
    threading.Event().wait()
  finally:
    with contextlib.suppress(Exception):
      blocks.close(verbose=False)


def _end(number: int, _: Any) -> None:
  """Ends as on Ctrl-C, so that what was uploaded is deleted."""
  sys.exit(128 + number)


def free_port(host: str, port: int) -> int:
  """The port, or any free one for 0.

  Raises:
    UserError: it is taken, not allowed, or the host is none of this machine's.
  """
  if not 0 <= port <= 65535:
    raise UserError(
      f'--port is {port}; give 1 to 65535, or 0 for any free one.'
    )
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
    with socket.socket(family, kind, protocol) as trial:
      trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      trial.bind(address)
      return trial.getsockname()[1]
  except OSError as error:
    raise _cannot_listen(host, port, error) from error


def _cannot_listen(
  host: str, port: int, error: OSError | None = None
) -> UserError:
  number = error.errno if error else errno.EADDRINUSE
  if isinstance(error, socket.gaierror) or number == errno.EADDRNOTAVAIL:
    return UserError(
      f'--host {host} is no address of this machine; give 127.0.0.1 for itself '
      'alone or 0.0.0.0 for all of its network.'
    )
  why = {
    errno.EADDRINUSE: 'is taken by another program',
    errno.EACCES: 'is reserved for the administrator',
  }.get(number, f'cannot be opened ({os.strerror(number)})')
  return UserError(
    f'the port {port} {why}; give another with --port, or --port 0 for any '
    'free one.'
  )


def make_parser() -> argparse.ArgumentParser:
  """All flags."""
  parser = Parser(
    prog='python -m resnest_jax.demo',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add_source_flags(parser)
  add = parser.add_argument
  add(
    '--examples',
    nargs='+',
    default=[],
    metavar='PICTURE',
    help='files, folders or patterns of pictures that the page offers',
  )
  add(
    '--host',
    default='127.0.0.1',
    help='address to listen on (default: 127.0.0.1, this machine alone; '
    '0.0.0.0: whoever can reach it)',
  )
  add('--port', type=int, default=7860, help='default: 7860; 0: any free one')
  add(
    '--share',
    action='store_true',
    help="open a public address, too, through Gradio's servers",
  )
  return parser
