"""What tests of data share."""

import shutil
import sys

import pytest
from data.garden import Garden


@pytest.fixture
def call(monkeypatch):
  """`call(main, '--flag', value)`: a command, in this process."""

  def call(main, *words):
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, words)])
    main()

  return call


@pytest.fixture
def garden(tmp_path):
  return Garden(tmp_path)


@pytest.fixture
def data_dir(mini_data_dir, tmp_path):
  """A copy of prepared data, to be written to."""
  return shutil.copytree(mini_data_dir, tmp_path / 'data')


@pytest.fixture(scope='session')
def damaged_dir(mini_data_dir, tmp_path_factory):
  """Prepared data, some bytes of whose training records are others."""
  folder = tmp_path_factory.mktemp('damaged')
  shutil.copytree(mini_data_dir, folder, dirs_exist_ok=True)
  (records,) = folder.glob('ade20k/mini/1.0.0/*-train.*')
  content = records.read_bytes()
  half = len(content) // 2
  records.write_bytes(content[:half] + bytes(64) + content[half + 64 :])
  return folder
