"""Files and folders appear whole or not at all."""

import os
import tempfile
from pathlib import Path

import pytest

from resnest_jax import files
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
      assert temporary == tmp_path / f'.a.{os.getpid()}.png'
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


@pytest.mark.parametrize(
  'name', [b'[a].avi', b'a\\b.avi', b'\xdf.avi', b'a:.avi']
)
def test_libraries_get_plain_names(tmp_path, name, monkeypatch):
  path = tmp_path / os.fsdecode(name)
  path.write_text('here')
  with files.plain_name(path) as plain:
    assert plain.read_text() == 'here'
    assert plain.suffix == '.avi'
    assert not set(str(plain)) & {*'[]\\:', '\udcdf'}
  assert not plain.parent.exists()
  # Nor is the folder of temporary files of any use below such a name.
  monkeypatch.setattr(tempfile, 'tempdir', str(path))
  with (
    pytest.raises(UserError, match='Set TMPDIR to a folder of a plain'),
    files.plain_name(path),
  ):
    pass
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  with files.plain_name(path) as plain:
    assert plain.parent.parent == tmp_path


def test_plain_names_stay(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('a b.avi', '\u80cc#%{}~$.png', '-x'):
    with files.plain_name(Path(name)) as plain:
      assert plain == tmp_path / name
