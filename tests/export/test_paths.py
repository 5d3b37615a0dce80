"""Exports carry no path of the machine that made them."""

import os
import re
import sys
import tempfile

import pytest
from evaluation import class_runs

from resnest_jax.export import folder
from resnest_jax.export.web import RUNTIME

# Whatever lies in folders of this machine, or is named as on others. Addresses
# and names of operations have something before the first slash, and so may what
# is found here whatever comes before it: a text after its length.
TOPS = {*os.listdir('/'), 'home', 'Users'}
PLACES = sys.prefix, sys.base_prefix, os.getcwd(), tempfile.gettempdir()
TOPS, PLACES = ('|'.join(map(re.escape, x)) for x in (TOPS, PLACES))
PATH = rf'((?<![\w.)>\]/-])/(?:{TOPS})|(?:{PLACES}))/[ -~]*'


def paths_in(content):
  """As `strings` would show them."""
  return [x[0].decode() for x in re.finditer(PATH.encode(), content)]


def test_paths_are_found():
  content = b'\0"/usr/a b.py"\0file:///x http://h/usr/x jit(f)/home/y\n/usr/z'
  content += f'\nA{sys.prefix}/x'.encode()
  assert paths_in(content) == ['/usr/a b.py"', '/usr/z', f'{sys.prefix}/x']


@pytest.fixture(scope='module')
def weights(written_run, tmp_path_factory):
  """Paths of a run of a segmentor, and of a classifier's weights."""
  path = tmp_path_factory.mktemp('classes') / 'weights'
  class_runs.write_weights(path)
  return {'segmentor': written_run, 'classifier': path}


FORMATS = {'segmentor': folder.FORMATS, 'classifier': folder.CLASS_FORMATS}


@pytest.mark.parametrize('task', FORMATS)
def test_no_file_names_a_folder_of_this_machine(task, weights, tmp_path):
  assert weights[task].is_absolute()
  out, more = tmp_path / 'out', {}
  if task == 'segmentor':
    more = {'sizes': [(33, 32)], 'canvas': [(48, 64)]}
  exports = folder.export_model(
    weights[task], out, formats=FORMATS[task], **more
  )
  assert {x.format for x in exports} == {*FORMATS[task]}
  assert len(list(out.iterdir())) == len(exports) + 2
  ours = [x for x in out.rglob('*') if x.is_file() and x.parent.name != RUNTIME]
  found = {x.name: paths_in(x.read_bytes()) for x in ours}
  assert {key: value for key, value in found.items() if value} == {}
