"""Runs the notebooks on this machine and keeps their outputs in the files.

    python notebooks/run.py
    python notebooks/run.py own_data

It takes the environment of `make test`, and the time of two small trainings.
What the runs write is in runs/ and mydata/, which have to be out of the way
first.
"""

import base64
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import nbformat
import numpy as np
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
# In this order: one predicts with what another has trained.
NAMES = ('ade20k_mini', 'own_data', 'predict')
WRITTEN = ('mydata', 'runs/notebook', 'runs/own')
PICTURES = 'runs/notebook/pictures'
# What differs from the parameters in the file, where there is no network.
PARAMETERS = {
  'predict': {
    'weights': 'runs/notebook/run',
    'pictures': [f'{PICTURES}/{i}.jpg' for i in range(3)],
  }
}
# Larger pictures become JPEGs, and narrower ones.
PNG_BYTES, WIDTH = 40_000, 900


def main() -> None:
  """Runs those that are named, or all."""
  names = sys.argv[1:] or NAMES
  if unknown := set(names) - set(NAMES):
    sys.exit(f'error: no notebook {unknown.pop()}; there are {NAMES}.')
  if set(names) >= set(NAMES):
    for written in WRITTEN:
      if (ROOT / written).exists():
        sys.exit(f'error: move {written} away; a notebook writes it.')
  for name in names:
    if name == 'predict':
      draw_pictures(ROOT / PICTURES)
    path = FOLDER / f'{name}.ipynb'
    notebook = execute(path, PARAMETERS.get(name, {}))
    tidy(notebook)
    nbformat.write(notebook, path)
    print(f'{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB')


def execute(
  path: Path, parameters: Mapping[str, Any], cell_timeout: int = 7200
) -> nbformat.NotebookNode:
  """Runs a notebook from top to bottom.

  Args:
    path: of the file, which stays as it is.
    parameters: values for names of the cell tagged `parameters`.
    cell_timeout: seconds that a cell may take.

  Returns:
    The notebook with its outputs.

  Raises:
    KeyError: a parameter that the notebook does not have.
    nbclient.exceptions.CellExecutionError: a cell has failed.
  """
  notebook = nbformat.read(path, as_version=4)
  (place,) = [
    i
    for i, cell in enumerate(notebook.cells)
    if 'parameters' in cell.metadata.get('tags', ())
  ]
  known = re.findall(r'^(\w+) =', notebook.cells[place].source, re.MULTILINE)
  if unknown := sorted(set(parameters) - set(known)):
    raise KeyError(f'{path.name} has no parameters {unknown}, but {known}')
  lines = [f'{name} = {value!r}' for name, value in parameters.items()]
  injected = nbformat.v4.new_code_cell('\n'.join(lines))
  notebook.cells.insert(place + 1, injected)
  with tempfile.TemporaryDirectory() as settings:
    programs = Path(sys.executable).parent  # For `!python`.
    environment = os.environ | {
      'PATH': f'{programs}{os.pathsep}{os.environ["PATH"]}',
      'IPYTHONDIR': settings,
      'TF_CPP_MIN_LOG_LEVEL': '3',  # XLA says how busy this machine is.
    }
    client = NotebookClient(
      notebook,
      timeout=cell_timeout,
      kernel_name='python3',
      resources={'metadata': {'path': ROOT}},
      record_timing=False,
    )
    client.execute(env=environment)
  notebook.cells.remove(injected)
  return notebook


def tidy(notebook: nbformat.NotebookNode) -> None:
  """Leaves in the outputs what a reader would see, and no more bytes."""
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  for number, cell in enumerate(code, 1):
    outputs = list(merged(cell.outputs))
    for output in outputs:
      if output.output_type == 'stream':
        output.text = screen(output.text).replace(f'{ROOT}/', '')
      elif 'data' in output:
        shrink_picture(output.data)
        for kind in output.data.keys() & {'text/plain', 'text/html'}:
          output.data[kind] = output.data[kind].replace(f'{ROOT}/', '')
      if 'execution_count' in output:
        output.execution_count = number
    cell.outputs = outputs
    cell.execution_count = number


def merged(
  outputs: list[nbformat.NotebookNode],
) -> Iterator[nbformat.NotebookNode]:
  """Text that was written in several pieces, as one."""
  last = None
  for output in outputs:
    if output.output_type == 'stream':
      if last is not None:
        last.text += output.text
        continue
      last, output.name = output, 'stdout'
    else:
      last = None
    yield output


def screen(text: str) -> str:
  """What a terminal would show in the end: progress bars move, colours go."""
  lines, row = [''], 0
  for part in re.split(r'(\x1b\[[\d;?]*[A-Za-z]|\r?\n|\r)', text):
    if part in ('\n', '\r\n'):
      row += 1
      lines += [''] * (row + 1 - len(lines))
    elif part == '\r' or part.endswith('\x1b[2K'):
      lines[row] = ''
    elif up := re.fullmatch(r'\x1b\[(\d*)A', part):
      row = max(row - int(up[1] or 1), 0)
    elif not part.startswith('\x1b'):
      lines[row] += part
  return '\n'.join(line.rstrip() for line in lines)


def shrink_picture(data: dict[str, Any]) -> None:
  """Keeps one picture of an output, as a JPEG where it is large."""
  if 'image/png' not in data:
    return
  data.pop('image/jpeg', None)  # Pillow gives both.
  png = base64.b64decode(data['image/png'])
  if len(png) <= PNG_BYTES:
    return
  picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
  if picture.shape[1] > WIDTH:
    height = round(picture.shape[0] * WIDTH / picture.shape[1])
    picture = cv2.resize(picture, (WIDTH, height), interpolation=cv2.INTER_AREA)
  jpeg = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
  del data['image/png']
  data['image/jpeg'] = base64.b64encode(jpeg.tobytes()).decode() + '\n'


def draw_pictures(folder: Path) -> None:
  """Scenes that no training has seen."""
  from resnest_jax.data.mini.scene import draw_scene

  folder.mkdir(parents=True, exist_ok=True)
  for i in range(3):
    image, _, _ = draw_scene((0, 3, i), 270, 400)
    cv2.imwrite(str(folder / f'{i}.jpg'), image[..., ::-1])


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  main()
