"""`python -m resnest_jax.data.prepare`, as users run it and when it fails."""

import hashlib
import http.server
import os
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path

import filelock
import pytest
from data.refusals import refused
from data.small_archives import write_zip
from hosts import start

from resnest_jax.data import prepare
from resnest_jax.data.ade20k import Ade20k
from resnest_jax.data.archives import ArchiveConfig
from resnest_jax.data.datasets import DATASETS, Dataset, PreparedSplit
from resnest_jax.data.mini import ade20k_mini
from resnest_jax.labels import ADE20K


def prepare_mini(data_dir, archive):
  return prepare.prepare(DATASETS['ade20k_mini'], data_dir, archive)


def train(data_dir):
  return PreparedSplit('ade20k_mini', data_dir, 'train')


def snapshot(folder):
  """Contents and times of all files below `folder`."""
  files = filter(Path.is_file, folder.rglob('*'))
  return {x: (x.read_bytes(), x.stat().st_mtime_ns) for x in files}


# ---- The command -----------------------------------------------------------


def test_generates_and_prepares(run_script, call, tmp_path, capsys):
  command = 'ade20k_mini', '--data_dir', tmp_path, '--images', '5'
  process = run_script('-m', prepare.__name__, *command, '3')
  assert '8/8 images' in process.stderr
  assert re.search(r'train +5 images\n +validation +3 images', process.stdout)
  assert 'train.py --config configs/ade20k_pspnet.py:mini' in process.stdout
  assert len(PreparedSplit('ade20k_mini', tmp_path, 'validation')) == 3

  before = snapshot(tmp_path / 'ade20k')
  call(prepare.main, *command, '3')
  assert 'Already prepared' in capsys.readouterr().out
  refused('Nothing was changed', call, prepare.main, *command, '4')
  assert snapshot(tmp_path / 'ade20k') == before


def test_generates_cityscapes(call, tmp_path, capsys):
  size = ('--images', '3', '2', '--size', '64', '32')
  call(prepare.main, 'cityscapes_mini', '--data_dir', tmp_path, *size)
  said = capsys.readouterr().out
  assert re.search(r'train +3 images\n +validation +2 images\n +test +1', said)
  assert '--config configs/cityscapes_pspnet.py:mini' in said
  sample = PreparedSplit('cityscapes_mini', tmp_path, 'validation')[1]
  assert sample['image'].shape == (32, 64, 3)


WRONG = [
  ('ade20k --archive MINI', 'as ade20k_mini; the release has 20210 and 2000'),
  ('ade20k --archive_dir a', 'no --archive_dir: it is for Cityscapes'),
  ('ade20k_mini --images 0 5', '--images 0 5'),
  ('ade20k_mini --raw', 'no --raw: it is for Cityscapes'),
  ('cityscapes --raw', 'cannot be downloaded automatically.*--archive_dir F'),
  ('cityscapes --archive a.zip', 'for ADE20K; --archive_dir takes'),
  ('imagenet', 'cannot be downloaded.* --archive_dir FOLDER --data_dir'),
  ('imagenet --archive x.tar', 'imagenet takes no --archive: it'),
  ('imagenet --archive_dir nowhere', 'there is no folder nowhere; --arch'),
  ('cityscapes_mini --size 64 8', '--size 64 8: both must be from'),
]


@pytest.mark.parametrize(('words', 'told'), WRONG)
def test_wrong_flags_and_archives(call, mini_archive, tmp_path, words, told):
  data_dir = tmp_path / 'data'
  words = words.replace('MINI', f'{mini_archive}').split()
  refused(f'(?s){told}', call, prepare.main, *words, '--data_dir', data_dir)
  assert not data_dir.exists()


def test_killed_in_the_middle(call, mini_archive, tmp_path):
  entries = {  # 40 times as many, under new names.
    f'{name[:-12]}{int(name[-12:-4]) + 100 * copy:08d}{name[-4:]}': content
    for name, content in contents(mini_archive).items()
    if 'ADE_' in name
    for copy in range(40)
  }
  comment = ade20k_mini.archive_comment({'train': 960, 'validation': 320}, 0)
  archive = write_zip(tmp_path / 'large.zip', entries, comment)
  data_dir = tmp_path / 'data'
  command = ['ade20k_mini', '--archive', archive, '--data_dir', data_dir]
  for _ in range(2):
    with start('-m', prepare.__name__, *command, devices=1) as process:
      while not unfinished(data_dir):
        assert process.poll() is None
        time.sleep(0.002)
      process.kill()
      assert process.wait() == -9
    # The second run has removed what the first one left.
    assert len(unfinished(data_dir)) == 1
  refused('is not prepared', train, data_dir)

  call(prepare.main, *command)
  assert unfinished(data_dir) == []
  assert train(data_dir)[959]['name'] == 'ADE_train_00003924'


def unfinished(data_dir):
  return list(data_dir.glob('ade20k/mini/incomplete.*'))


def contents(archive):
  with zipfile.ZipFile(archive) as opened:
    return {name: opened.read(name) for name in opened.namelist()}


# ---- Data that is there already --------------------------------------------


def test_prepared_data_is_never_replaced(data_dir, tmp_path):
  before = snapshot(data_dir / 'ade20k')
  ade20k_mini.write_archives(tmp_path / 'a', {'train': 2, 'validation': 1}, 0)
  told = 'another archive.*Nothing was'
  refused(told, prepare_mini, data_dir, tmp_path / 'a')
  assert snapshot(data_dir / 'ade20k') == before


def test_folder_whose_name_is_a_pattern(mini_archive, tmp_path, capsys):
  # Twice: tfds looked for the finished data by that pattern.
  data_dir = tmp_path / '[a] b*'
  prepare_mini(data_dir, mini_archive)
  before = snapshot(data_dir)
  prepare_mini(data_dir, mini_archive)
  assert 'Already prepared' in capsys.readouterr().out
  assert snapshot(data_dir) == before
  assert len(train(data_dir)) == 24


def test_folder_whose_name_is_not_utf8(mini_archive, tmp_path):
  odd = tmp_path / os.fsdecode(b'stra\xdfe')
  refused('is not UTF-8', prepare_mini, odd, mini_archive)
  assert not odd.exists()
  refused('is not UTF-8', train, odd)
  # The remedy.
  prepare_mini(tmp_path / 'named', mini_archive)
  (tmp_path / 'named').rename(odd)
  odd.rename(tmp_path / 'stra\u00dfe')
  assert len(train(tmp_path / 'stra\u00dfe')) == 24


def test_strange_folder_is_left_alone(mini_archive, tmp_path):
  folder = tmp_path / 'ade20k' / 'mini' / '1.0.0'
  folder.mkdir(parents=True)
  (folder / 'notes.txt').write_text('mine')
  refused('not a complete data set', prepare_mini, tmp_path, mini_archive)
  assert (folder / 'notes.txt').read_text() == 'mine'


def test_damage_found_late_leaves_nothing_behind(mini_archive, tmp_path):
  """An error after the first records were written."""
  entries, data_dir = contents(mini_archive), tmp_path / 'data'
  (name,) = (x for x in entries if x.endswith('ADE_val_00000008.png'))
  entries[name] = b'bad'
  comment = ade20k_mini.archive_comment({'train': 24, 'validation': 8}, 0)
  damaged = write_zip(tmp_path / 'damaged.zip', entries, comment)
  refused(f'{name} is not a PNG', prepare_mini, data_dir, damaged)
  assert unfinished(data_dir) == []
  refused('is not prepared', train, data_dir)


def test_two_at_once(mini_archive, tmp_path):
  with filelock.FileLock(tmp_path / '.lock'):
    refused('another process prepares', prepare_mini, tmp_path, mini_archive)


# ---- Downloads -------------------------------------------------------------


@pytest.fixture
def server(mini_archive, monkeypatch):
  """Serves `body`, or the first `send` bytes of it; counts `requests`."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      server.requests += 1
      self.send_response(200)
      self.send_header('Content-Length', str(len(server.body)))
      self.end_headers()
      self.wfile.write(server.body[: server.send])

    def log_message(self, *arguments): ...

  monkeypatch.setenv('NO_PROXY', '127.0.0.1')
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.body = mini_archive.read_bytes()
    server.send, server.requests = None, 0
    threading.Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()


def fetch(server, folder, **changes):
  """Prepares what it serves, or what an archive's changed description says."""
  url = f'http://127.0.0.1:{server.server_port}/ADEChallengeData2016.zip'
  config = ArchiveConfig(**({'name': 'loopback', 'url': url} | changes))
  return prepare.prepare(Dataset(Ade20k, config, ADE20K), folder)


def downloaded(data_dir):
  """The archives that tfds keeps, whole ones and parts."""
  return [*filter(Path.is_file, (data_dir / 'downloads').rglob('*.zip'))]


def test_download_is_kept_and_not_repeated(server, tmp_path):
  """After an interruption between download and records, say."""
  sha1 = hashlib.sha1(server.body).hexdigest()
  for _ in range(2):
    builder = fetch(server, tmp_path, sha1=sha1)
    counts = {k: v.num_examples for k, v in builder.info.splits.items()}
    assert counts == {'train': 24, 'validation': 8}
    shutil.rmtree(builder.data_path)
  assert server.requests == 1
  assert [x.read_bytes() for x in downloaded(tmp_path)] == [server.body]


FAILING = [
  ({'sha1': '0' * 40}, '0', 1, 'SHA-1 is .*, expected 000.*kept'),
  ({'url': 'http://127.0.0.1:9/x'}, '0', 0, r'refused.*\n.*it: --archive'),
  ({}, '1', 0, '(?s)switched off.*--archive ADE'),
  ({'download_bytes': 10**18}, '0', 0, r'GB free, about 3050000000\.00 GB'),
]


@pytest.mark.parametrize(('changes', 'offline', 'requests', 'told'), FAILING)
def test_downloads_that_fail(
  server, tmp_path, monkeypatch, changes, offline, requests, told
):
  monkeypatch.setenv('RESNEST_JAX_OFFLINE', offline)
  started = time.monotonic()
  refused(told, fetch, server, tmp_path, **changes)
  assert time.monotonic() - started < 10
  assert server.requests == requests
  assert downloaded(tmp_path) == []


def test_interrupted_download(server, tmp_path):
  server.send = 100_000
  refused('(?s)could not download .*--archive', fetch, server, tmp_path)
  # The part is of no use to the next attempt.
  assert downloaded(tmp_path) == []
  assert list((tmp_path / 'downloads').rglob('*.tmp.*')) == []
  server.send = None
  fetch(server, tmp_path)
  assert [x.read_bytes() for x in downloaded(tmp_path)] == [server.body]
