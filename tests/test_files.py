"""Files and folders appear whole or not at all."""

import os
import re
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from data.refusals import refused
from hosts import start
from trouble import kill_while_emptied, obeying_permissions

from resnest_jax import drawing, files
from resnest_jax.data.doctor.report import claim
from resnest_jax.errors import UserError
from resnest_jax.weights.files import write_weights


def test_files_replace_what_was_there(tmp_path):
  path = tmp_path / 'new' / 'a.json'
  files.write_json(path, {'b': 1, 'a': [2]})
  assert path.read_text() == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n'
  files.write_text(path, 'ä')
  assert path.read_bytes() == 'ä'.encode()
  assert os.listdir(path.parent) == ['a.json']


def test_an_error_leaves_everything_as_it_was(tmp_path):
  path = tmp_path / 'a.png'
  path.write_text('before')
  folder, broken = tmp_path / 'b', pytest.raises(ValueError, match='broken')
  with broken, files.whole_file(path) as a, files.whole_folder(folder) as b:
    a.write_text('half')
    (b / 'c').touch()
    assert (a.parent, a.suffix, a.name[0]) == (tmp_path, '.png', '.')
    raise ValueError('broken')
  assert path.read_text() == 'before'
  assert os.listdir(tmp_path) == ['a.png']


@pytest.mark.parametrize('name', ['deep/a', 'link'])
def test_folders_take_the_place_of_empty_ones(tmp_path, name):
  """Which may be given by a link, to a larger disk."""
  path, link = tmp_path / 'deep' / 'a', tmp_path / 'link'
  path.mkdir(parents=True)
  link.symlink_to(path)
  files.check_new(tmp_path / name)
  with files.whole_folder(tmp_path / name) as folder:
    (folder / 'b').write_text('c')
    assert os.listdir(path) == []
  assert (path / 'b').read_text() == 'c'
  assert os.listdir(path.parent) == ['a']
  assert link.is_symlink()


def test_a_folder_that_was_filled_meanwhile_is_kept(tmp_path):
  path, filled = tmp_path / 'a', pytest.raises(OSError, match='not empty')
  with filled, files.whole_folder(path):
    path.mkdir()
    (path / 'theirs').touch()
  assert [x.name for x in tmp_path.rglob('*')] == ['a', 'theirs']
  refused('a is there already and nothing was', files.check_new, path)


@pytest.mark.parametrize('name', [b'[a]', b'a\\b', b'\xdf', b'a:'])
def test_libraries_get_plain_names(tmp_path, name, monkeypatch):
  path = tmp_path / os.fsdecode(name + b'.avi')
  path.write_text('here')
  with files.plain_name(path) as plain:
    assert (plain.read_text(), plain.suffix) == ('here', '.avi')
    assert not set(str(plain)) & {*'[]\\:', '\udcdf'}
  assert not plain.parent.exists()
  # Nor is the folder of temporary files of any use below such a name.
  monkeypatch.setattr(tempfile, 'tempdir', str(path))
  odd = pytest.raises(UserError, match='Set TMPDIR to a folder of a plain')
  with odd, files.plain_name(path):
    pass
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  with files.plain_name(path) as plain:
    assert plain.parent.parent == tmp_path


@pytest.mark.parametrize('name', ['a b.avi', '\u80cc#%{}~$.png', '-x'])
def test_plain_names_stay(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  with files.plain_name(Path(name)) as plain:
    assert plain == tmp_path / name


@pytest.mark.parametrize('target', ['theirs', 'folder', 'nowhere'])
def test_a_link_is_replaced_and_not_followed(tmp_path, target):
  theirs, folder = tmp_path / 'theirs', tmp_path / 'folder'
  theirs.write_text('mine')
  folder.mkdir()
  text, drawn = tmp_path / 'a.json', tmp_path / 'a.png'
  for path in (text, drawn):
    path.symlink_to(tmp_path / target)
  files.write_json(text, {})
  drawing.write_image(drawn, np.zeros((2, 3), np.uint8))
  assert all(x.is_file() and not x.is_symlink() for x in (text, drawn))
  assert theirs.read_text() == 'mine'
  assert {*os.listdir(tmp_path)} == {'a.json', 'a.png', 'folder', 'theirs'}
  assert os.listdir(folder) == []


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


LEAVE = """import signal, sys
from pathlib import Path
from resnest_jax import files
here = Path(sys.argv[1])
with files.whole_file(here / 'a.png') as a, files.whole_folder(here / 'b') as b:
  (b / 'c').mkdir()
  for path in (a, b / 'c' / 'd'):
    path.write_text('half')
  print('there', flush=True)
  signal.pause()"""


def hidden(folder):
  return {x for x in folder.iterdir() if x.name.startswith('.')}


def left_by_another(folder):
  """A process that has written half of its files, and those."""
  before = hidden(folder)
  process = start('-c', LEAVE, folder, devices=1)
  assert process.stdout.readline() == 'there\n'
  left = hidden(folder) - before
  assert len(left) == 2
  return process, left


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
  """That of a running one stays, as does what only looks like it."""
  killed, left = left_by_another(tmp_path)
  running, used = left_by_another(tmp_path)
  killed.kill()
  killed.communicate()
  (folder,) = (x for x in left if x.is_dir())
  # Of another host: too young, and old enough to be of nobody.
  other = tmp_path / re.sub('jax-.{8}-', 'jax-00000000-', folder.name)
  old = other.with_name(f'{other.name}.old')
  theirs = {other, tmp_path / '.a.123.png', tmp_path / '.resnest-jax-notes'}
  for path in (old, *theirs):
    path.touch()
  os.utime(old, (time.time() - 30 * 86400,) * 2)
  files.write_json(tmp_path / 'c.json', {})
  assert hidden(tmp_path) == used | theirs
  running.send_signal(signal.SIGINT)
  running.communicate()
  assert hidden(tmp_path) == theirs


REMOVE = """import pathlib, sys
from resnest_jax.files import remove_folder
remove_folder(pathlib.Path(sys.argv[1]))"""


def test_killed_while_a_folder_is_removed(tmp_path):
  (tmp_path / 'a').mkdir()
  kill_while_emptied(tmp_path / 'a', '-c', REMOVE, tmp_path / 'a')
  files.clean(tmp_path)
  assert os.listdir(tmp_path) == []


def test_a_process_of_the_same_number_as_before_clears_up(tmp_path):
  """In a container each start has it."""
  path = files.temporary_path(tmp_path / 'elsewhere' / 'a.json')
  (tmp_path / path.name).touch()
  files.write_json(tmp_path / 'c.json', {})
  assert os.listdir(tmp_path) == ['c.json']


@pytest.mark.parametrize('name', ['../a', 'b/../../a', '/tmp/a', 'link/a'])
def test_names_that_lead_out_of_a_folder(name, tmp_path):
  folder = tmp_path / 'folder'
  (folder / 'b').mkdir(parents=True)
  (folder / 'link').symlink_to(tmp_path)
  assert files.inside(folder, 'b/c/d.png') == folder / 'b/c/d.png'
  refused(f'outside of {folder}, in ', files.inside, folder, name)
  # The remedy.
  (folder / 'link').unlink()
  assert files.inside(folder, 'link/a') == folder / 'link/a'


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
  files.check_writable(tmp_path / 'new' / 'deep')
  files.check_new(tmp_path / 'new')
  assert os.listdir(tmp_path) == []
  (tmp_path / 'file').touch()
  for place, why in {
    'file': 'File exists',
    'file/a': 'Not a directory',
    'a' * 256: 'File name too long',
  }.items():
    told = f'^cannot write {tmp_path / place}: {why}.* or give another --out.$'
    refused(told, files.check_writable, tmp_path / place)


CHECKS = [
  (files.check_writable, '.'),
  (files.check_writable, 'a/b'),
  (files.check_new, 'a'),
  (claim, '.'),
  (lambda path: write_weights(path, 'ours', {}, {}), 'a'),
]


@pytest.mark.parametrize(('check', 'place'), CHECKS)
def test_a_closed_folder_is_found_before_the_work(tmp_path, check, place):
  tmp_path.chmod(0o555)
  told = f'cannot write {tmp_path}.*Permission denied'
  with obeying_permissions(), pytest.raises(UserError, match=told):
    check(tmp_path / place)
