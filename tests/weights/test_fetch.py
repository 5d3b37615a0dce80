"""Downloads, from a server on this machine."""

import contextlib
import functools
import hashlib
import http.server
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from resnest_jax import downloads
from resnest_jax.errors import UserError
from resnest_jax.weights.fetch import cache_folder, fetch
from resnest_jax.weights.published import PUBLISHED, Published, known_file

CONTENT = bytes(range(256)) * 1000
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]
NAME = f'net-{DIGITS}.pth'
# Folders of downloads that never end, and seconds between what they send.
ENDLESS = {'endless': 0, 'dripping': 0.05}


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves a folder; some paths are served badly, by their first folder."""

  def do_GET(self):
    self.server.requests.append(self.path)
    kind, _, name = self.path[1:].partition('/')
    if kind in ENDLESS:
      self.send_start()
      with contextlib.suppress(OSError):
        while not self.server.ended.wait(ENDLESS[kind]):
          self.wfile.write(b'x' * (1 if kind == 'dripping' else 2**20))
    elif kind == 'dripping_head':
      with contextlib.suppress(OSError):
        self.wfile.write(b'HTTP/1.0 200 OK\r\nX-Long: ')
        while not self.server.ended.wait(0.05):
          self.wfile.write(b'x')
    elif kind == 'vast':
      self.send_start(10**13)
    elif kind == 'cut':  # Without a length, as by a proxy.
      self.send_start()
      self.wfile.write(self.server.body(name)[:-1000])
    elif kind == 'login':
      self.send_start()
      self.wfile.write(b'<!DOCTYPE html><title>Sign in</title>')
    elif kind == 'short':
      self.send_start(len(CONTENT))
      self.wfile.write(CONTENT[:1000])
    elif self.path.startswith('/moved/'):
      self.send_response(302)
      self.send_header('Location', self.path.removeprefix('/moved'))
      self.end_headers()
    else:
      super().do_GET()

  def send_start(self, length=None):
    self.send_response(200)
    if length is not None:
      self.send_header('Content-Length', str(length))
    self.end_headers()

  def end_headers(self):
    if '/resolve/' in self.path:  # What a hub says of its files.
      self.send_header('X-Repo-Commit', COMMIT)
      self.send_header('ETag', f'"{DIGITS}"')
      if not Path(self.translate_path(self.path)).is_file():
        self.send_header('X-Error-Code', 'EntryNotFound')
    super().end_headers()

  def log_message(self, *args):
    del args


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A server of the folder `served`, and an empty cache."""
  folder = tmp_path / 'served'
  folder.mkdir()
  (folder / NAME).write_bytes(CONTENT)
  handler = functools.partial(Handler, directory=folder)
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  server.requests, server.ended = [], threading.Event()
  server.body = lambda name: (folder / name).read_bytes()
  server.url = f'http://127.0.0.1:{server.server_port}'
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  monkeypatch.setenv('RESNEST_JAX_CACHE', str(tmp_path / 'cache'))
  for name in ('RESNEST_JAX_OFFLINE', 'HF_HUB_OFFLINE'):
    monkeypatch.delenv(name, raising=False)
  yield server
  server.ended.set()
  server.shutdown()
  server.server_close()
  thread.join()


def published(*urls):
  return {'net': Published(urls, 'resnest50')}


def refusal(*arguments):
  """How `fetch` refuses them."""
  with pytest.raises(UserError) as error:
    fetch(*arguments)
  return str(error.value)


def cached():
  return [x for x in cache_folder().rglob('*') if x.is_file()]


def test_name_is_downloaded_once_and_damage_noticed(server):
  table = published(f'{server.url}/{NAME}')
  path = fetch('net', table)
  assert path.read_bytes() == CONTENT
  assert fetch('net', table) == path
  assert server.requests == [f'/{NAME}']
  assert cached() == [path] == [cache_folder() / NAME]
  path.write_bytes(b'damaged')
  assert 'remove it to download it again' in refusal('net', table)


def test_next_mirror_is_tried(server):
  table = published(
    'http://127.0.0.1:9/' + NAME,  # Nobody listens there.
    f'{server.url}/gone/{NAME}',
    f'{server.url}/moved/{NAME}',
  )
  assert fetch('net', table).read_bytes() == CONTENT
  assert server.requests == [f'/{x}{NAME}' for x in ('gone/', 'moved/', '')]


def test_failure_names_every_mirror_and_what_to_do(server, tmp_path):
  (tmp_path / 'served' / NAME).write_bytes(CONTENT[:-1] + b'x')
  urls = [f'{server.url}/{x}{NAME}' for x in ('gone/', 'short/', '')]
  message = refusal('net', published(*urls))
  for said in (
    f'{urls[0]}: HTTP Error 404',
    f'{urls[1]}: it was cut off after 1000 of 256000 bytes',
    f'{urls[2]}: what it sends has the wrong checksum',
    f'put it at {cache_folder() / NAME}',
  ):
    assert said in message
  assert cached() == []


def test_nothing_is_downloaded_that_cannot_be_read(server, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  for source in (f'{server.url}/{NAME}', 'hf://timm/resnest50d.in1k/x.bin'):
    assert 'need the package torch' in refusal(source)
  assert server.requests == []


def test_address_is_cached_by_the_whole_address(server, tmp_path):
  for folder in ('a', 'b'):
    (tmp_path / 'served' / folder).mkdir()
    write_weights(tmp_path / 'served' / folder / 'x.safetensors', folder)
  for folder in ('a', 'b', 'a'):
    path = fetch(f'{server.url}/{folder}/x.safetensors')
    assert list(load_file(path)) == [folder]
  assert len(server.requests) == 2


def write_weights(path, name='weight'):
  save_file({name: np.ones(1000, np.float32)}, path)


@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth'])
def test_what_is_no_weights_is_not_kept(server, tmp_path, name):
  """Or every later start would take it for the file."""
  path = tmp_path / 'served' / name
  if name == 'x.pth':
    torch.save({'weight': torch.ones(1000)}, path)
  else:
    write_weights(path)
  for kind, why in (
    ('login', r'what it sends is neither.*web page'),
    ('cut', r'what it sends (is damaged|cannot be read)'),
  ):
    address = f'{server.url}/{kind}/{name}'
    message = refusal(address)
    assert re.search(f'no download succeeded. {address}: {why}', message)
    # As the message says: downloaded by other means.
    assert cached() == []
    there = re.search(r'or put it at (.*)\.$', message)[1]
    Path(there).write_bytes(path.read_bytes())
    assert fetch(address) == Path(there)
    Path(there).unlink()
  assert fetch(f'{server.url}/{name}').read_bytes() == path.read_bytes()


def test_downloads_end(server, monkeypatch):
  """Vast and endless ones, and those of which hardly anything comes."""
  monkeypatch.setattr(downloads, 'PATIENCE', 0.5)
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '0.02')
  for kind, why in (
    (
      'vast',
      r'it has 1e\+04 GB, and at most 0.02 GB are downloaded .*MAX_DOWN',
    ),
    ('endless', r'it has 0.02\d* GB, and at most 0.02 GB'),
    ('dripping', r'only \d\d? bytes came in 0.5 s'),
    ('dripping_head', r'only 0 bytes came in 0.5 s'),
  ):
    started = time.monotonic()
    assert re.search(why, refusal(f'{server.url}/{kind}/x.safetensors')), kind
    assert time.monotonic() - started < 10
    assert cached() == []
  # More is allowed than there is space.
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '1e9')
  message = refusal(f'{server.url}/vast/x.safetensors')
  assert re.search(rf'1e\+04 GB, and {cache_folder()} has .* GB free', message)


def test_the_limit_of_downloads_can_be_raised(server, tmp_path, monkeypatch):
  write_weights(tmp_path / 'served' / 'x.safetensors')
  address = f'{server.url}/x.safetensors'
  for given, why in (
    ('0.000001', r'it has [\de.-]+ GB, and at most 1e-06 GB are downloaded'),
    ('much', r"RESNEST_JAX_MAX_DOWNLOAD is 'much'; give a number"),
    ('nan', r"is 'nan'; give a number"),
    ('-1', r"is '-1'; give a number"),
  ):
    monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', given)
    assert re.search(why, refusal(address)), given
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '0.00001')
  assert fetch(address).is_file()


def test_a_hub_file_of_too_many_bytes(hub, monkeypatch):
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '0.0001')
  message = refusal('hf://timm/resnest50d.in1k/sub/model.safetensors')
  assert '0.000256 GB, and at most 0.0001 GB are downloaded' in message
  assert hub.requests == []  # Its head alone.


def test_addresses_and_caches_that_cannot_be(server, tmp_path, monkeypatch):
  assert 'the address is malformed' in refusal('http://[::1/x.safetensors')
  write_weights(tmp_path / 'served' / 'x.safetensors')
  long = f'{server.url}/x.safetensors?{"x" * 3000}'
  assert len(fetch(long).name) < 200
  (tmp_path / 'file').touch()
  monkeypatch.setenv('RESNEST_JAX_CACHE', str(tmp_path / 'file' / 'cache'))
  message = refusal(f'{server.url}/x.safetensors')
  assert 'set RESNEST_JAX_CACHE to another folder' in message


COMMIT = '0123456789abcdef0123456789abcdef01234567'
HUB_FILE = '/timm/resnest50d.in1k/resolve/main/sub/model.safetensors'


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
  """A hub with one file, and an empty cache of it."""
  monkeypatch.setenv('HF_ENDPOINT', f'{server.url}/')
  cache = tmp_path / 'hub_cache'
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  path = tmp_path / 'served' / HUB_FILE[1:]
  path.parent.mkdir(parents=True)
  path.write_bytes(CONTENT)
  return server


def test_hub_file_is_downloaded_once_and_served_offline(hub, monkeypatch):
  text = 'hf://timm/resnest50d.in1k/sub/model.safetensors'
  path = fetch(text)
  assert path.read_bytes() == CONTENT
  assert path.parts[-3:] == (COMMIT, 'sub', 'model.safetensors')
  assert fetch(text) == path
  assert hub.requests == [HUB_FILE]  # Asked again for its head only.
  monkeypatch.setenv('RESNEST_JAX_OFFLINE', '1')
  assert fetch(text) == path
  other = text.replace('sub/', '')
  assert 'downloads are switched off' in refusal(other)
  assert hub.requests == [HUB_FILE]


def test_hub_revision_and_what_it_does_not_have(hub, tmp_path, monkeypatch):
  served = tmp_path / 'served/timm/resnest50d.in1k/resolve/v2'
  served.mkdir()
  (served / 'a').write_text('second')
  assert fetch('hf://timm/resnest50d.in1k@v2/a').read_text() == 'second'
  other = 'hf://timm/resnest50d.in1k/other.safetensors'
  assert re.search(r'does not give it \(404.*Not Found', refusal(other))
  assert 'hf://owner/repository/file' in refusal('hf://timm/resnest50d.in1k')
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')  # Nobody listens.
  assert re.search(r'the hub does not give it \(.*refused', refusal(other))


@pytest.mark.parametrize('variable', ['RESNEST_JAX_OFFLINE', 'HF_HUB_OFFLINE'])
def test_offline_only_the_cache_is_used(server, monkeypatch, variable):
  table = published(f'{server.url}/{NAME}')
  monkeypatch.setenv(variable, '1')
  assert f'put it at {cache_folder() / NAME}' in refusal('net', table)
  assert server.requests == []
  # As the message says: brought there by other means.
  cache_folder().mkdir(parents=True)
  (cache_folder() / NAME).write_bytes(CONTENT)
  assert fetch('net', table).read_bytes() == CONTENT


def test_path_wins_and_known_file_names_are_checked(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'resnest50').write_bytes(CONTENT)
  assert fetch('resnest50').read_bytes() == CONTENT
  path = tmp_path / 'resnest50-528c19ca.pth'
  path.write_bytes(CONTENT)
  assert re.search(r'wrong checksum.*not with 528c19ca', refusal(path))


def test_unknown_name_suggests_and_lists():
  said = r'Did you mean ade20k_pspnet.* resnest50_fast_1s4x24d'
  assert re.search(said, refusal('ade20k_psp'))


def test_published_files_end_in_the_digits_that_are_checked():
  digits = [published.sha256 for published in PUBLISHED.values()]
  assert len(set(digits)) == len(digits) == 26
  for name, known in PUBLISHED.items():
    (ending,) = {url.rpartition('/')[2] for url in known.urls}
    assert known_file(ending) == known, name
