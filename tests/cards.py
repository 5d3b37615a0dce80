"""Runs the code of a model card, in a process without this project."""

import re
import subprocess
import sys

from PIL import Image


def run_card(file, picture, last, folder, absent=()):
  """Runs the code for an exported file on a picture; returns what it prints.

  `last` is a line after the code; `absent` are packages that are not there.
  Everything lies in `folder`, where the picture is `street.jpg`.
  """
  card = (file.parent / 'README.md').read_text()
  section = card.partition(f'## Run {file.name}\n')[2]
  code = re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]
  Image.fromarray(picture).save(folder / 'street.jpg', quality=95)
  (folder / file.name).symlink_to(file)
  absent = ['resnest_jax', *absent]
  block = f'import sys; sys.modules.update(dict.fromkeys({absent}))\n'
  command = [sys.executable, '-c', f'{block}{code}{last}']
  return subprocess.check_output(command, cwd=folder, text=True)
