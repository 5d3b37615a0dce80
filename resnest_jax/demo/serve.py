"""Serves a page to try a trained network on pictures.

    python -m resnest_jax.demo --weights ade20k_pspnet
    python -m resnest_jax.demo --weights runs/pspnet --examples holiday

--weights is a published name, a file, an address (see docs/weights.md) or the
workdir of a training. Drop a picture into the page to see its classes and their
shares. The page loads nothing from other hosts. Ctrl-C or `kill` ends it and
deletes the uploads. See docs/demo.md.
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnest_jax.errors import UserError
from resnest_jax.files import plain_name
from resnest_jax.flags import Parser, add_source_flags
from resnest_jax.text import without_secrets

STOPPED = 'stopped.'
# Of padded sizes; coarser than in predict.py, as visitors wait for compiling.
BUCKET = 256
FIRST_SIZE = (480, 640)  # 4:3, the shape of most photographs.


def main() -> None:
  flags = make_parser().parse_args()
  if importlib.util.find_spec('gradio') is None:
    raise UserError(
      "the page needs the package gradio: pip install 'gradio>=6'."
    )
  port = free_port(flags.host, flags.port)
  # Late: these take seconds, and wrong flags or a taken port fail at once.
  from resnest_jax import runtime
  from resnest_jax.inference.predictor import (
    ClassPredictor,
    from_checkpoint,
    print_notes,
  )
  from resnest_jax.prediction.sources import find_sources

  runtime.set_up()
  # By default these signals skip every `finally`, and uploads would stay. 128 +
  # number is the shell's status of a process that a signal ended.
  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: sys.exit(128 + number))
  sources = find_sources(flags.examples) if flags.examples else []
  predictor = from_checkpoint(
    flags.weights, checkpoint=flags.checkpoint, batch_size=1, bucket=BUCKET
  )
  if isinstance(predictor, ClassPredictor):
    raise UserError(
      f'{without_secrets(flags.weights)} is a classifier, and the page shows '
      'label maps. Give weights of a segmentor; predict.py classifies.'
    )
  print_notes(predictor)
  examples = [source.path for source in sources if not source.is_video]
  with tempfile.TemporaryDirectory(prefix='resnest_jax_demo_') as uploads:
    # Gradio reads these when it is imported, which `serve` does.
    os.environ['GRADIO_TEMP_DIR'] = uploads
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    serve(predictor, examples, port, flags)


def serve(
  predictor: Any, examples: Sequence[Path], port: int, flags: argparse.Namespace
) -> None:
  """Compiles the network for a first size and serves until it is stopped.

  `UserError` if the address cannot be opened or made public.
  """
  import numpy as np

  from resnest_jax.demo import page

  # Before the page opens, so that the first visitor does not wait.
  print('compiling the network (a minute or more at full size)', flush=True)
  predictor.predict(np.zeros((*FIRST_SIZE, 3), np.uint8))
  name = Path(without_secrets(flags.weights)).name
  with contextlib.ExitStack() as links:  # The page copies the files.
    plain = [links.enter_context(plain_name(path)) for path in examples]
    blocks = page.make_page(predictor, name, plain)
  try:
    _, local, public = blocks.queue().launch(
      server_name=flags.host,
      server_port=port,
      share=flags.share,
      inline=False,
      prevent_thread_lock=True,  # Returns after the start.
      quiet=True,
      ssr_mode=False,  # Server-side rendering needs Node.js.
      footer_links=[],
      max_file_size=page.MAX_FILE_SIZE,
      **page.look(),
    )
  # Another program may have taken the port while the network was compiled.
  except OSError as error:
    raise _cannot_listen(flags.host, port, error) from error
  try:
    if flags.share and not public:
      raise UserError(
        "Gradio's servers gave no public address; check the network. Without "
        '--share the page is for this machine.'
      )
    for address in filter(None, (local, public)):
      print(f'the page is at {address} (Ctrl-C ends it)', flush=True)
    while True:  # The server has its own thread.
      trim_uploads(Path(os.environ['GRADIO_TEMP_DIR']), page.MAX_UPLOADS)
      time.sleep(2)
  finally:
    # An error here would hide the one that ended the process.
    with contextlib.suppress(Exception):
      blocks.close(verbose=False)


def trim_uploads(folder: Path, most: int) -> None:
  """Deletes the oldest files of a folder until it has at most so many bytes."""
  files = []
  for path in folder.rglob('*'):
    with contextlib.suppress(OSError):  # Gradio deletes files as well.
      if path.is_file():
        about = path.stat()
        files.append((about.st_mtime, about.st_size, path))
  total = 0
  for _, size, path in sorted(files, reverse=True):
    total += size
    if total > most:
      path.unlink(missing_ok=True)


def free_port(host: str, port: int) -> int:
  """The port, or any free one for 0; `UserError` if it cannot be opened."""
  if not 0 <= port <= 65535:
    raise UserError(
      f'--port is {port}; give 1 to 65535, or 0 for any free one.'
    )
  try:
    *kind, _, address = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)[0]
    with socket.socket(*kind) as trial:
      # Connections of a page that has just ended do not block its port.
      trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      trial.bind(address)
      return trial.getsockname()[1]
  except OSError as error:
    raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
  why = error.strerror or os.strerror(errno.EADDRINUSE)  # Gradio's has none.
  return UserError(
    f'the page cannot be opened at --host {host} --port {port}: {why}. Give '
    'another port, or 0 for any free one; as host 127.0.0.1 for this machine '
    'alone, or 0.0.0.0 for its whole network.'
  )


def make_parser() -> argparse.ArgumentParser:
  parser = Parser(prog='python -m resnest_jax.demo', description=__doc__)
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
    help="also open a public address, through Gradio's servers",
  )
  return parser
