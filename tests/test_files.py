"""Files and folders appear whole or not at all."""

import os
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from trouble import obey_permissions

from resnest_jax import drawing, files
from resnest_jax.errors import UserError


def test_files_replace_what_was_there(tmp_path):
  path = tmp_path / 'new' / 'a.json'
  files.write_json(path, {'b': 1, 'a': [2]})
  assert path.read_text() == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n'
  files.write_text(path, 'ä')
  assert path.read_bytes() == 'ä'.encode()
  assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_everything_as_it_was(tmp_path):
  path = tmp_path / 'a.png'
  path.write_text('before')

  def write():
    with (
      files.whole_file(path) as temporary,
      files.whole_folder(tmp_path / 'b') as folder,
    ):
      temporary.write_text('half')
      (folder / 'c').touch()
      assert (temporary.parent, temporary.suffix) == (tmp_path, '.png')
      assert temporary.name.startswith('.')
      raise ValueError('broken')

  with pytest.raises(ValueError, match='broken'):
    write()
  assert path.read_text() == 'before'
  assert list(tmp_path.iterdir()) == [path]


def test_folders_take_the_place_of_empty_ones(tmp_path):
  path = tmp_path / 'deep' / 'a'
  path.mkdir(parents=True)
  with files.whole_folder(path) as folder:
    (folder / 'b').write_text('c')
    assert list(path.iterdir()) == []
  assert (path / 'b').read_text() == 'c'
  assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_was_filled_meanwhile_is_kept(tmp_path):
  path = tmp_path / 'a'

  def write():
    with files.whole_folder(path):
      path.mkdir()
      (path / 'theirs').touch()

  with pytest.raises(OSError, match='not empty'):
    write()
  assert [x.name for x in tmp_path.rglob('*')] == ['a', 'theirs']
  with pytest.raises(UserError, match='a is there already and nothing was'):
    files.check_new(path)


def test_refusals_name_the_file_and_the_remedy(tmp_path):
  (tmp_path / 'a').write_text('no folder')
  path = tmp_path / 'a' / 'b'
  with (
    pytest.raises(UserError) as raised,
    files.explain_refusal(path, 'give another --out'),
  ):
    files.write_json(path, {})
  assert raised.match(f'^cannot write {path}: .* or give another --out.$')


def test_a_link_is_replaced_and_not_followed(tmp_path):
  """Whether it leads to a file, to a folder or to nothing."""
  theirs, folder = tmp_path / 'theirs', tmp_path / 'folder'
  theirs.write_text('mine')
  folder.mkdir()
  picture = np.zeros((2, 3), np.uint8)
  for target in (theirs, folder, tmp_path / 'nowhere'):
    for name, write in (
      ('a.png', lambda path: drawing.write_image(path, picture)),
      ('a.json', lambda path: files.write_json(path, {})),
    ):
      path = tmp_path / name
      path.symlink_to(target)
      write(path)
      assert path.is_file()
      assert not path.is_symlink()
      path.unlink()
  assert theirs.read_text() == 'mine'
  assert sorted(x.name for x in tmp_path.iterdir()) == ['folder', 'theirs']
  assert list(folder.iterdir()) == []


def test_a_folder_may_be_given_by_a_link(tmp_path):
  (tmp_path / 'large disk').mkdir()
  link = tmp_path / 'out'
  link.symlink_to(tmp_path / 'large disk')
  files.check_new(link)
  with files.whole_folder(link) as folder:
    (folder / 'a').touch()
  assert link.is_symlink()
  assert os.listdir(tmp_path / 'large disk') == ['a']


def test_names_may_be_as_long_as_file_systems_allow(tmp_path):
  for path in (tmp_path / f'{"a" * 250}.json', tmp_path / f'a.{"b" * 253}'):
    files.write_json(path, {})
    assert os.listdir(tmp_path) == [path.name]
    path.unlink()
    with files.whole_folder(path):
      pass
    path.rmdir()
  with pytest.raises(OSError, match=r'File name too long: .*/aaa'):
    files.write_json(tmp_path / f'{"a" * 251}.json', {})


LEAVE = """
import os, signal, sys
from pathlib import Path
from resnest_jax import files
folder = Path(sys.argv[1])
with files.whole_file(folder / 'a.png') as file:
  file.write_text('half')
  with files.whole_folder(folder / 'b') as deep:
    (deep / 'c').mkdir()
    (deep / 'c' / 'd').write_text('half')
    print('there', flush=True)
    signal.pause()
"""


def hidden(folder):
  return {x for x in folder.iterdir() if x.name.startswith('.')}


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, root):
  """That of a running one stays, as does what only looks like it."""
  command = [sys.executable, '-c', LEAVE, str(tmp_path)]
  there = {}
  for name in ('killed', 'running'):
    before = hidden(tmp_path)
    there[name] = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)
    assert there[name].stdout.readline() == b'there\n'
    there[name].left = hidden(tmp_path) - before
    assert len(there[name].left) == 2
  there['killed'].kill()
  there['killed'].communicate()
  (folder,) = (x for x in there['killed'].left if x.is_dir())
  # Of another host: too young, and old enough to be of nobody.
  other = re.sub('jax-.{8}-', 'jax-00000000-', folder.name)
  (tmp_path / other).touch()
  (tmp_path / f'{other}.old').touch()
  month_ago = time.time() - 30 * 86400
  os.utime(tmp_path / f'{other}.old', (month_ago, month_ago))
  theirs = {tmp_path / '.a.123.png', tmp_path / '.resnest-jax-notes'}
  for path in theirs:
    path.touch()

  files.write_json(tmp_path / 'c.json', {})
  running = there['running'].left
  assert hidden(tmp_path) == {*running, *theirs, tmp_path / other}
  there['running'].send_signal(signal.SIGINT)
  there['running'].communicate()
  assert hidden(tmp_path) == {*theirs, tmp_path / other}


REMOVE = """
import sys
from pathlib import Path
from resnest_jax import files
files.remove_folder(Path(sys.argv[1]))
"""


def test_killed_while_a_folder_is_removed(tmp_path, root):
  folder = tmp_path / 'a'
  folder.mkdir()
  names = [folder / str(i) for i in range(20_000)]
  for name in names:
    name.touch()
  command = [sys.executable, '-c', REMOVE, str(folder)]
  with subprocess.Popen(command, cwd=root) as process:
    while names[0].exists() and names[-1].exists():
      assert process.poll() is None
    process.kill()
  assert not folder.exists()
  files.clean(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_a_process_of_the_same_number_as_before_clears_up(tmp_path):
  """In a container each start has it."""
  path = files.temporary_path(tmp_path / 'elsewhere' / 'a.json')
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / path.name).touch()
  files.write_json(tmp_path / 'b' / 'c.json', {})
  assert os.listdir(tmp_path / 'b') == ['c.json']


@pytest.mark.parametrize('name', ['../a', 'b/../../a', '/tmp/a', 'link/a'])
def test_names_that_lead_out_of_a_folder(name, tmp_path):
  folder = tmp_path / 'folder'
  (folder / 'b').mkdir(parents=True)
  (folder / 'link').symlink_to(tmp_path)
  assert files.inside(folder, 'b/c/d.png') == folder / 'b/c/d.png'
  with pytest.raises(UserError, match=f'outside of {folder}, in '):
    files.inside(folder, name)
  # The remedy.
  (folder / 'link').unlink()
  assert files.inside(folder, 'link/a') == folder / 'link/a'


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
  files.check_writable(tmp_path / 'new' / 'deep')
  files.check_new(tmp_path / 'new')
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'file').touch()
  for place, why in (
    (tmp_path / 'file', 'File exists'),
    (tmp_path / 'file' / 'a', 'Not a directory'),
    (tmp_path / ('a' * 256), 'File name too long'),
  ):
    with pytest.raises(UserError, match=f'{why}.* or give another --out'):
      files.check_writable(place)


CLOSED = """
import sys
from resnest_jax.data.doctor.report import claim
from resnest_jax.errors import UserError
from resnest_jax.files import check_new, check_writable
from resnest_jax.weights.files import write_weights
from pathlib import Path
folder = Path(sys.argv[1])
for check, path in (
  (check_writable, folder),
  (check_writable, folder / 'a' / 'b'),
  (check_new, folder / 'a'),
  (claim, folder),
  (lambda path: write_weights(path, 'ours', {}, {}), folder / 'a'),
):
  try:
    check(path)
  except UserError as error:
    print(error)
"""


def test_a_closed_folder_is_found_before_the_work(tmp_path, root):
  closed = tmp_path / 'closed'
  closed.mkdir(mode=0o555)
  process = subprocess.run(
    [sys.executable, '-c', CLOSED, str(closed)],
    cwd=root,
    preexec_fn=obey_permissions,
    capture_output=True,
    text=True,
    check=True,
  )
  lines = process.stdout.splitlines()
  assert len(lines) == 5
  for line in lines:
    assert re.match(f'cannot write {closed}.*Permission denied', line)


def test_pictures_are_what_opencv_would_write(tmp_path):
  rng = np.random.default_rng(0)
  for size in ((5, 7), (5, 7, 3)):
    picture = rng.integers(0, 256, size, np.uint8)
    drawing.write_image(tmp_path / 'a.png', picture)
    bgr = picture if picture.ndim == 2 else picture[..., ::-1]
    cv2.imwrite(str(tmp_path / 'b.png'), bgr)
    written = [(tmp_path / name).read_bytes() for name in ('a.png', 'b.png')]
    assert written[0] == written[1]
