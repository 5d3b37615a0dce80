"""A page that labels pictures in a browser, by onnxruntime-web and a canvas.

It is a folder for any server of static files, which loads nothing else.
"""

import importlib.resources
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnest_jax import files
from resnest_jax.downloads import offline
from resnest_jax.errors import UserError, say
from resnest_jax.weights.fetch import OTHER_CACHE, cache_folder
from resnest_jax.weights.files import checksum
from resnest_jax.weights.infer import title_of

MODEL = 'model.onnx'
PACKAGE = 'onnxruntime-web@1.30.0'
ARCHIVE = f'{PACKAGE.replace("@", "-")}.tgz'  # As `npm pack` names it.
SHA256 = 'd2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71'
RUNTIME = 'onnxruntime'  # A folder in the page's.
# Files of the archive's `dist` and their names there. A page loads one pair.
# Some servers do not know that .mjs is JavaScript, which browsers insist on.
PARTS = {
  'ort.webgpu.bundle.min.mjs': 'ort-webgpu.js',
  'ort-wasm-simd-threaded.asyncify.wasm': '',
  'ort.wasm.bundle.min.mjs': 'ort-wasm.js',
  'ort-wasm-simd-threaded.wasm': '',
}
# The archive lacks these, which are in onnxruntime's package for Python.
LICENSES = ('LICENSE', 'ThirdPartyNotices.txt')


def fetch_runtime() -> Path:
  """The archive of onnxruntime-web in the cache; npm fetches it once.

  Raises `UserError` if it is missing and cannot be fetched, or is another.
  """
  path = cache_folder() / ARCHIVE
  by_hand = f'`npm pack {PACKAGE}` writes it elsewhere; put it at {path}.'
  if not path.is_file():
    missing = f'the format web needs {ARCHIVE}, which is not in the cache, and'
    if offline():
      off = 'switched off (RESNEST_JAX_OFFLINE or HF_HUB_OFFLINE)'
      raise UserError(f'{missing} downloads are {off}. {by_hand}')
    if not (npm := shutil.which('npm')):
      install = 'Install npm, of Node.js (Debian: apt install npm)'
      raise UserError(f'{missing} there is no npm. {install}. Or {by_hand}')
    say(f'npm fetches {PACKAGE} (33 MB)')
    with (
      files.explain_refusal(path.parent, OTHER_CACHE),
      files.work_folder(path) as folder,
    ):
      command = [npm, 'pack', PACKAGE, '--silent']
      done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
      if done.returncode or not (folder / ARCHIVE).is_file():
        told = ' '.join(done.stderr.split()) or f'exit status {done.returncode}'
        raise UserError(f'{missing} npm failed: {told}. Or {by_hand}')
      (folder / ARCHIVE).replace(path)
  if (found := checksum(path)) != SHA256:
    raise UserError(
      f'{path} has the SHA-256 {found}, not {SHA256}; it is damaged or '
      f'another. Remove it to fetch it again. {by_hand}'
    )
  return path


def write_page(
  folder: Path, about: Mapping[str, Any], canvas: tuple[int, int]
) -> None:
  """Completes the folder of a `MODEL` with everything that a page needs."""
  import onnxruntime  # Optional: what a format needs is checked by name.

  ours = importlib.resources.files(__package__) / 'page'
  # One look for all pages.
  report = importlib.resources.files('resnest_jax.evaluation.report')
  style = [(x / 'page.css').read_text('utf-8') for x in (report, ours)]
  files.write_text(folder / 'style.css', '\n'.join(style))
  for name in ('index.html', 'app.js', 'worker.js'):
    files.write_text(folder / name, (ours / name).read_text('utf-8'))
  described = {key: about[key] for key in ('classes', 'palette')}
  described['title'] = f'{title_of(about["model"])}, {about["model"]["head"]}'
  size = (folder / MODEL).stat().st_size
  described |= {'file': MODEL, 'bytes': size, 'canvas': canvas}
  files.write_json(folder / 'model.json', described)
  runtime = folder / RUNTIME
  runtime.mkdir()
  with tarfile.open(fetch_runtime()) as archive:
    for name, renamed in PARTS.items():
      part = archive.extractfile(f'package/dist/{name}').read()
      (runtime / (renamed or name)).write_bytes(part)
  for name in LICENSES:
    shutil.copy(Path(onnxruntime.__file__).with_name(name), runtime)
