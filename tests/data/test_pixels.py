"""Decoded pixels: the same samples and batches, restarts, damage."""

import inspect
import json
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data.refusals import refused
from hosts import start
from numpy.testing import assert_equal

from resnest_jax.config import load_config
from resnest_jax.data import pixels, prepare
from resnest_jax.data.datasets import PreparedSplit
from resnest_jax.data.pipeline import make_train_iterator

NAME = 'cityscapes_mini'
BYTES = 192 * 96 * 4 * 12


def train(data_dir):
  return PreparedSplit(NAME, data_dir, 'train')


@pytest.fixture(scope='module')
def encoded(mini_cityscapes_data_dir):
  """The training split as PNG files."""
  return train(mini_cityscapes_data_dir)


@pytest.fixture(scope='module')
def raw_data_dir(mini_cityscapes_data_dir, tmp_path_factory):
  """With decoded pixels. Not to be written to."""
  folder = tmp_path_factory.mktemp('raw') / 'data'
  shutil.copytree(mini_cityscapes_data_dir, folder)
  prepare.prepare_raw(NAME, folder)
  return folder


@pytest.fixture
def data_dir(raw_data_dir, tmp_path):
  """A copy, to be damaged."""
  return shutil.copytree(raw_data_dir, tmp_path / 'data')


def folder_of(data_dir):
  return data_dir / 'cityscapes' / 'mini_raw' / '1.0.0'


def test_samples_are_those_of_the_png_files(encoded, raw_data_dir):
  split = train(raw_data_dir)
  assert split.decoded
  assert not PreparedSplit(NAME, raw_data_dir, 'validation').decoded
  with ThreadPoolExecutor(3) as pool:
    samples = list(pool.map(split.__getitem__, range(12)))
    masks = list(pool.map(lambda i: split.raw(i)['mask'], range(12)))
  assert_equal(samples, list(encoded))
  assert_equal(masks, [encoded.raw(i)['mask'] for i in range(12)])
  assert samples[0]['image'].dtype == samples[0]['label'].dtype == np.uint8
  assert pickle.loads(pickle.dumps(split)).decoded


def test_batches_are_equal_bit_for_bit(encoded, raw_data_dir):
  config = load_config('configs/cityscapes_fcn.py:mini').data
  options = {'seed': 3, 'batch_size': 4, 'total_steps': 8}
  batches, expected = (
    list(make_train_iterator(config, split, **options))
    for split in (train(raw_data_dir), encoded)
  )
  assert len(batches) == 8
  assert_equal(batches, expected)


def test_archives_to_pixels(call, mini_cityscapes_archives, tmp_path, capsys):
  command = prepare.main, NAME, '--raw', '--data_dir', tmp_path
  call(*command, '--archive_dir', mini_cityscapes_archives)
  names = set(os.listdir(folder_of(tmp_path)))
  assert names == {'train.json', 'train.pixels'}
  said = capsys.readouterr()
  assert '12/12 images' in said.err
  assert f'train, in {folder_of(tmp_path)}' in said.out
  # What is prepared needs no archive.
  shutil.rmtree(folder_of(tmp_path))
  for message in ('cityscapes_mini is ready', 'Already decoded'):
    call(*command)
    assert message in capsys.readouterr().out
    assert train(tmp_path).decoded


def test_too_little_disk_space(monkeypatch, mini_cityscapes_data_dir, tmp_path):
  shutil.copytree(mini_cityscapes_data_dir, tmp_path, dirs_exist_ok=True)
  free = shutil.disk_usage(tmp_path)._replace(free=BYTES - 1)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: free)
  refused(r'0\.00 GB free, about 0\.00 GB', prepare.prepare_raw, NAME, tmp_path)
  assert not folder_of(tmp_path).exists()
  free = free._replace(free=BYTES)
  prepare.prepare_raw(NAME, tmp_path)


class Reader:
  """Small samples of odd size, one of another; counts, is slow, may fail."""

  def __init__(self, fails=None, seconds=0, larger=None):
    self.fails, self.seconds, self.larger = fails, seconds, larger
    self.calls = []

  def __call__(self, index):
    self.calls.append(index)
    time.sleep(self.seconds)
    if index == self.fails:
      raise KeyboardInterrupt
    rng = np.random.default_rng(index)
    drawn = rng.integers(0, 34, (3 + (index == self.larger), 5, 4), np.uint8)
    image, mask = 7 * drawn[..., :3], drawn[..., 3]
    return {'image': image, 'mask': mask, 'name': f'sample_{index}'}


def write(folder, read, source='a'):
  pixels.write_pixels(folder, 'train', read, 40, source, lambda *place: None)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """What an uninterrupted call writes."""
  folder = tmp_path_factory.mktemp('whole')
  write(folder, Reader())
  file = pixels.PixelFile(folder, 'train')
  assert_equal([file[i] for i in (0, 17, 39)], [*map(Reader(), (0, 17, 39))])
  return contents(folder)


def tear(folder):
  """In the middle of a line, after the middle of another sample."""
  for name, rest in (('progress', b'["sample_'), ('pixels', b'torn')):
    path = folder / f'train.{name}'
    path.write_bytes(path.read_bytes() + rest)


def lose_pixels(folder):
  """The log reached the disk and the end of the pixels did not."""
  os.truncate(folder / 'train.pixels', 3 * 64 + 10)


@pytest.mark.parametrize('damage', [lambda folder: None, tear, lose_pixels])
def test_resumes_where_it_was_interrupted(whole, tmp_path, damage):
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, Reader(fails=20))
  assert not pixels.is_written(tmp_path, 'train')
  lines = (tmp_path / 'train.progress').read_text().splitlines()
  kept = 3 if damage == lose_pixels else len(lines) - 1
  assert 0 < kept <= 20
  damage(tmp_path)
  read, done, missing = Reader(), [], []
  calls = lambda *place: done.append(place), missing.append
  pixels.write_pixels(tmp_path, 'train', read, 40, 'a', *calls)
  assert missing == [64 * (40 - kept)]
  # The first tells the size.
  assert sorted(read.calls) == [0, *range(kept, 40)]
  assert done == [(number, 40) for number in range(kept + 1, 41)]
  assert contents(tmp_path) == whole


def test_another_source_begins_anew(whole, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, Reader(fails=20), source='b')
  read = Reader()
  write(tmp_path, read)
  assert sorted(read.calls) == [0, 0, *range(1, 40)]
  assert contents(tmp_path) == whole


def test_a_link_is_replaced_and_not_emptied(whole, tmp_path):
  (tmp_path / 'mine').write_text('mine')
  (tmp_path / 'out').mkdir()
  for name in ('train.pixels', 'train.progress', 'train.json'):
    (tmp_path / 'out' / name).symlink_to(tmp_path / 'mine')
  write(tmp_path / 'out', Reader())
  assert (tmp_path / 'mine').read_text() == 'mine'
  assert contents(tmp_path / 'out') == whole


def test_killed_in_the_middle(whole, tmp_path):
  program = (
    'import pathlib, sys, time\nimport numpy as np\n'
    'from resnest_jax.data import pixels\n'
    f'{inspect.getsource(Reader)}\n{inspect.getsource(write)}\n'
    'write(pathlib.Path(sys.argv[1]), Reader(seconds=0.05))\n'
  )
  progress = tmp_path / 'train.progress'
  with start('-c', program, tmp_path, devices=1) as process:
    while not progress.exists() or progress.read_bytes().count(b'\n') < 4:
      assert process.poll() is None
      time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
  assert not pixels.is_written(tmp_path, 'train')
  read = Reader()
  write(tmp_path, read)
  assert len(read.calls) < 40
  assert contents(tmp_path) == whole


def test_samples_of_two_sizes_are_refused(tmp_path):
  refused(r'_7: the image .*\(4, 5, 3\)', write, tmp_path, Reader(larger=7))


def test_a_changed_pixel_is_noticed_by_its_sample(encoded, data_dir):
  path = folder_of(data_dir) / 'train.pixels'
  data = bytearray(path.read_bytes())
  data[4 * 192 * 96 * 5 + 1000] ^= 1
  path.write_bytes(data)
  split = train(data_dir)
  assert_equal(split[4]['image'], encoded[4]['image'])
  told = f'{encoded[5]["name"]} is not what was written(?s:.*)'
  refused(f'{told}{NAME} --raw --data_dir {data_dir}$', split.__getitem__, 5)


def test_files_that_do_not_fit_are_refused(data_dir):
  path = folder_of(data_dir) / 'train.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'source': 'b'}))
  refused('(?s)made from other data.*--raw', train, data_dir)
  os.truncate(path.with_suffix('.pixels'), BYTES - 1)
  refused('884735 bytes instead of 884736', train, data_dir)
