"""Downloads, from a server on this machine."""

import contextlib
import hashlib
import http.server
import json
import re
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hosts import finish, start
from huggingface_hub import constants
from safetensors.numpy import load_file
from small import small_config
from weights.built import CLASSES, PALETTE, converted, refused, saved

from resnest_jax import downloads
from resnest_jax.config import config_to_json, differences
from resnest_jax.export.card import model_card
from resnest_jax.weights import published
from resnest_jax.weights.fetch import cache_folder, fetch
from resnest_jax.weights.files import write_weights
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.published import PUBLISHED, Published, known_file

CONTENT = bytes(range(256)) * 1000
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]
NAME = f'net-{DIGITS}.pth'
WEIGHT = {'weight': np.ones(1000, np.float32)}
COMMIT = '0123456789abcdef0123456789abcdef01234567'
HUB_FILE = '/timm/resnest50d.in1k/resolve/main/sub/model.safetensors'
FROM_HUB = 'hf://timm/resnest50d.in1k/sub/model.safetensors'
# What is sent of the paths in these folders, served badly; and of some then for
# ever: so many bytes every so many seconds.
OK = b'HTTP/1.0 200 OK\r\n'
BADLY = {
  'moved': (b'HTTP/1.0 302 Found\r\nLocation: /NAME\r\n\r\n', 0, 0),
  'vast': (OK + b'Content-Length: 10000000000000\r\n\r\n', 0, 0),
  'short': (OK + b'Content-Length: 256000\r\n\r\n' + bytes(1000), 0, 0),
  'login': (OK + b'\r\n<!DOCTYPE html><title>Sign in</title>', 0, 0),
  'endless': (OK + b'\r\n', 2**20, 0),
  'dripping': (OK + b'\r\n', 1, 0.05),
  'dripping_head': (OK + b'X-Long: ', 1, 0.05),
}


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves a folder, some paths of it badly."""

  def do_GET(self):
    self.server.requests.append(self.path)
    self.server.users.append(self.headers.get('Authorization'))
    kind, _, name = self.path[1:].partition('/')
    if kind == 'cut':  # Without a length, as by a proxy.
      self.wfile.write(OK + b'\r\n' + Path(name).read_bytes()[:-1000])
    elif kind in BADLY:
      content, size, seconds = BADLY[kind]
      with contextlib.suppress(OSError):
        self.wfile.write(content.replace(b'NAME', name.encode()))
        while size and not self.server.ended.wait(seconds):
          self.wfile.write(b'x' * size)
    else:
      super().do_GET()

  def end_headers(self):
    if '/resolve/' in self.path:  # What a hub says of its files.
      self.send_header('X-Repo-Commit', COMMIT)
      self.send_header('ETag', f'"{DIGITS}"')
      if not Path(self.translate_path(self.path)).is_file():
        self.send_header('X-Error-Code', 'EntryNotFound')
    super().end_headers()


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A server of the folder `served`, and an empty cache."""
  (folder := tmp_path / 'served').mkdir()
  monkeypatch.chdir(folder)  # Which the handler serves.
  (folder / NAME).write_bytes(CONTENT)
  saved(folder / 'x.safetensors', WEIGHT)
  monkeypatch.setenv('RESNEST_JAX_CACHE', str(tmp_path / 'cache'))
  for name in ('RESNEST_JAX_OFFLINE', 'HF_HUB_OFFLINE'):
    monkeypatch.delenv(name, raising=False)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.requests, server.users = [], []
    server.folder, server.ended = folder, threading.Event()
    server.url = f'http://127.0.0.1:{server.server_port}'
    server.weight = f'{server.url}/x.safetensors'
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
  thread.join()


def cached():
  return [x for x in cache_folder().rglob('*') if x.is_file()]


def test_name_is_downloaded_once_and_damage_noticed(server):
  table = {'net': Published([f'{server.url}/{NAME}'], 'resnest50')}
  path = fetch('net', table)
  assert path.read_bytes() == CONTENT
  assert fetch('net', table) == path
  assert server.requests == [f'/{NAME}']
  assert cached() == [path] == [cache_folder() / NAME]
  path.write_bytes(b'damaged')
  refused('remove it to download it again', fetch, 'net', table)


def test_next_mirror_is_tried(server):
  # At the first one nobody listens.
  folders = ['http://127.0.0.1:9', f'{server.url}/gone', f'{server.url}/moved']
  table = {'net': Published([f'{x}/{NAME}' for x in folders], 'resnest50')}
  assert fetch('net', table).read_bytes() == CONTENT
  assert server.requests == [f'/{x}{NAME}' for x in ('gone/', 'moved/', '')]


def test_failure_names_every_mirror_and_what_to_do(server):
  (server.folder / NAME).write_bytes(CONTENT[:-1] + b'x')
  a, b, c = urls = [f'{server.url}/{x}{NAME}' for x in ('gone/', 'short/', '')]
  told = f'{a}: HTTP Error 404.*; {b}: it was cut off after 1000 of 256000 '
  told += f'bytes; {c}: what it sends has the wrong checksum.* '
  told += f'put it at {cache_folder() / NAME}'
  refused(told, fetch, 'net', {'net': Published(urls, 'resnest50')})
  assert cached() == []


def test_nothing_is_downloaded_that_cannot_be_read(server, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  for source in (f'{server.url}/{NAME}', 'hf://timm/resnest50d.in1k/x.bin'):
    refused('need the package torch', fetch, source)
  assert server.requests == []


def test_address_is_cached_by_the_whole_address(server):
  for folder in ('a', 'b'):
    (server.folder / folder).mkdir()
    saved(server.folder / folder / 'x.safetensors', {folder: np.ones(1)})
  for name in ('a', 'b', 'a'):
    assert [*load_file(fetch(f'{server.url}/{name}/x.safetensors'))] == [name]
  assert len(server.requests) == 2


@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth'])
def test_what_is_no_weights_is_not_kept(server, name):
  """Or every later start would take it for the file."""
  content = saved(server.folder / name, WEIGHT).read_bytes()
  whys = {'login': 'is neither.*web page', 'cut': '(is damaged|cannot be read)'}
  for kind, why in whys.items():
    address = f'{server.url}/{kind}/{name}'
    told = f'succeeded. {address}: what it sends {why}'
    message = refused(told, fetch, address)
    # As the message says: downloaded by other means.
    assert cached() == []
    there = Path(re.search(r'or put it at (.*)\.$', message)[1])
    there.write_bytes(content)
    assert fetch(address) == there
    there.unlink()
  assert fetch(f'{server.url}/{name}').read_bytes() == content


ENDS = [
  ('vast', r'it has 1e\+04 GB, and at most 0.02 GB are downloaded .*MAX_DOWN'),
  ('endless', r'it has 0.02\d* GB, and at most 0.02 GB'),
  ('dripping', r'only \d\d? bytes came in 0.5 s'),
  ('dripping_head', r'only 0 bytes came in 0.5 s'),
]


@pytest.mark.parametrize(('kind', 'why'), ENDS)
def test_downloads_end(kind, why, server, monkeypatch):
  monkeypatch.setattr(downloads, 'PATIENCE', 0.5)
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '0.02')
  started = time.monotonic()
  refused(why, fetch, f'{server.url}/{kind}/x.safetensors')
  assert time.monotonic() - started < 10
  assert cached() == []


def test_ctrl_c_ends_a_download_that_hangs(server):
  address = f'{server.url}/dripping_head/x.safetensors'
  convert = '-m', 'resnest_jax.weights.convert', address, '--out', 'nowhere'
  process = start(*convert, devices=1)
  while not server.requests:
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  said = finish(process, status=130, timeout=20)[1]
  assert re.findall('stopped|Traceback', said) == ['stopped']
  assert cached() == []


def test_the_limit_of_downloads_can_be_raised(server, monkeypatch):
  for given in ('much', 'nan', '-1'):
    monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', given)
    told = f"RESNEST_JAX_MAX_DOWNLOAD is '{given}'; give a number"
    refused(told, fetch, server.weight)
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '0.000001')
  refused(r'has [\de.-]+ GB, and at most 1e-06 GB are', fetch, server.weight)
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '0.00001')
  assert fetch(server.weight).is_file()
  # More than there is space.
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '1e9')
  why = rf'1e\+04 GB, and {cache_folder()} has .* GB free'
  refused(why, fetch, f'{server.url}/vast/x.safetensors')


def test_a_hub_file_of_too_many_bytes(hub, monkeypatch):
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '0.0001')
  refused('0.000256 GB, and at most 0.0001 GB are downloaded', fetch, FROM_HUB)
  assert hub.requests == []  # Its head alone.


def test_names_and_caches_that_cannot_be(server, tmp_path, monkeypatch):
  refused('mean ade20k_pspnet.* resnest50_fast_1s4x24d', fetch, 'ade20k_psp')
  refused(r'//\[::1/x\.s.* is malformed', fetch, 'http://[::1/x.safetensors')
  assert len(fetch(f'{server.weight}?{"x" * 3000}').name) < 200
  monkeypatch.setenv('RESNEST_JAX_CACHE', f'{tmp_path}/served/{NAME}/cache')
  refused('set RESNEST_JAX_CACHE to another folder', fetch, server.weight)


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
  """A hub with one file, and an empty cache of it."""
  monkeypatch.setenv('HF_ENDPOINT', f'{server.url}/')
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub_cache'))
  (path := server.folder / HUB_FILE[1:]).parent.mkdir(parents=True)
  path.write_bytes(CONTENT)
  return server


def test_hub_file_is_downloaded_once_and_served_offline(hub, monkeypatch):
  path = fetch(FROM_HUB)
  assert path.read_bytes() == CONTENT
  assert path.parts[-3:] == (COMMIT, 'sub', 'model.safetensors')
  assert fetch(FROM_HUB) == path
  assert hub.requests == [HUB_FILE]  # Asked again for its head only.
  monkeypatch.setenv('RESNEST_JAX_OFFLINE', '1')
  assert fetch(FROM_HUB) == path
  refused('downloads are switched off', fetch, FROM_HUB.replace('sub/', ''))
  assert hub.requests == [HUB_FILE]


def test_hub_revision_and_what_it_does_not_have(hub, monkeypatch):
  (served := hub.folder / 'timm/resnest50d.in1k/resolve/v2').mkdir()
  (served / 'a').write_text('second')
  assert fetch('hf://timm/resnest50d.in1k@v2/a').read_text() == 'second'
  refused('hf://owner/repository/file', fetch, 'hf://timm/resnest50d.in1k')
  other = 'hf://timm/resnest50d.in1k/other.safetensors'
  refused(r'does not give it \(404.*Not Found', fetch, other)
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')  # Nobody listens.
  refused(r'the hub does not give it \(.*refused', fetch, other)


@pytest.mark.parametrize('variable', ['RESNEST_JAX_OFFLINE', 'HF_HUB_OFFLINE'])
def test_offline_only_the_cache_is_used(server, monkeypatch, variable):
  table = {'net': Published([f'{server.url}/{NAME}'], 'resnest50')}
  monkeypatch.setenv(variable, '1')
  refused(f'put it at {cache_folder() / NAME}', fetch, 'net', table)
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
  refused('wrong checksum.*not 528c19ca, as published', fetch, path)


def test_published_files_end_in_the_digits_that_are_checked():
  files = [y for x in PUBLISHED.values() for y in (x, *x.others)]
  assert len({x.digits for x in files}) == len(files) == 26 + 10 + 4
  for known in files:
    (ending,) = {url.rpartition('/')[2] for url in known.urls}
    assert known_file(ending) == known_file(known.name) == known
    assert f'-{known.digits[:8]}.' in ending
  assert all(name == name.lower() for name in PUBLISHED)


# Of files in zip archives.
SHA1 = hashlib.sha1(CONTENT).hexdigest()
STEM = f'net-{SHA1[:8]}'
INNER = f'{STEM}.pth'


def zipped(path, name=INNER, content=CONTENT, kind=zipfile.ZIP_DEFLATED):
  """The path of a zip archive as published, but for what is given."""
  with zipfile.ZipFile(path, 'w', kind) as archive:
    archive.writestr('folder/', '')
    archive.writestr(f'folder/{name}', content)
  return path


def archived(*urls, others=()):
  return Published(urls, 'resnest50', INNER, SHA1, others)


@pytest.fixture
def of_archive(server, monkeypatch):
  """A published file whose archive is served, under the name of net."""
  zipped(server.folder / f'{STEM}.zip')
  known = archived(f'{server.url}/{STEM}.zip')
  monkeypatch.setattr(published, '_FILES', {INNER: known, f'{STEM}.zip': known})
  return {'net': known}


def test_file_of_an_archive_is_kept_without_it(server, of_archive):
  path = fetch('Net', of_archive)
  assert path.read_bytes() == CONTENT
  assert cached() == [path] == [cache_folder() / INNER]
  assert fetch('net', of_archive) == path
  assert server.requests == [f'/{STEM}.zip']
  path.write_bytes(b'damaged')
  told = f'{path} has the wrong .* SHA-1 is {"[0-9a-f]" * 40}, not {SHA1}, as'
  refused(told, fetch, 'net', of_archive)


def test_archives_that_are_given(server, of_archive, tmp_path):
  """By path, whatever they are called, or by another address."""
  renamed = zipped(tmp_path / 'download (1)')
  kept = cache_folder() / INNER
  assert fetch(renamed) == kept
  assert kept.read_bytes() == CONTENT
  kept.write_bytes(b'damaged')
  assert fetch(zipped(tmp_path / INNER)).read_bytes() == CONTENT
  kept.unlink()
  assert fetch(f'{server.url}/moved/{STEM}.zip') == kept
  # What was in it, unpacked by hand.
  (tmp_path / INNER).write_bytes(CONTENT)
  assert fetch(tmp_path / INNER) == tmp_path / INNER
  (tmp_path / INNER).write_bytes(b'other')
  refused(f'not {SHA1}, as published', fetch, tmp_path / INNER)
  # PyTorch's own archives are no such ones.
  own = saved(tmp_path / 'own.pth', WEIGHT)
  assert fetch(own) == own


def encrypted(path):
  content = bytearray(zipped(path).read_bytes())
  for mark, offset in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
    content[content.rindex(mark) + offset] |= 1
  path.write_bytes(content)


ARCHIVES = [
  (lambda x: zipped(x, content=CONTENT[1:]), f'{INNER} in .*, not {SHA1}, as'),
  (lambda x: zipped(x, name='other.pth'), f'from which {INNER} can be .*named'),
  (lambda x: x.write_text('<html>'), 'no zip archive .*not a zip file.*page'),
  (lambda x: x.write_bytes(zipped(x).read_bytes()[:-9]), 'is no zip archive'),
  (lambda x: zipped(x, content=bytes(2**24 + 1)), 'would unpack from .* no we'),
  (lambda x: zipped(x, kind=zipfile.ZIP_LZMA), 'compressed in another way'),
  (encrypted, 'protected by a password'),
]


@pytest.mark.parametrize(('write', 'said'), ARCHIVES)
def test_other_archives_leave_none(write, said, server, of_archive, tmp_path):
  write(path := tmp_path / f'{STEM}.zip')
  assert str(path) in refused(said, fetch, path)
  path.rename(server.folder / path.name)
  address = f'{server.url}/{path.name}'
  message = refused(f'{address}: .*{said}', fetch, 'net', of_archive)
  assert 'what it sends' in message
  assert '.resnest-jax' not in message  # Where it was unpacked.
  assert cached() == []


def test_the_limit_of_downloads_is_that_of_what_is_unpacked(
  of_archive, monkeypatch
):
  monkeypatch.setenv('RESNEST_JAX_MAX_DOWNLOAD', '0.0001')
  refused('it has 0.000256 GB, and at most 0.0001', fetch, 'net', of_archive)


def test_the_same_network_from_elsewhere(server, monkeypatch):
  """If its file does not come; all that was tried is told at once."""
  other = archived(f'{server.url}/x.zip')._replace(member='net.params')
  table = {'net': archived('http://127.0.0.1:9/a.zip', others=(other,))}
  told = r'127.0.0.1:9/a.zip: .*refused.*; http://.*/x.zip: HTTP Error 404.*'
  told += f'path, or put {INNER}, which is in it, into {cache_folder()}'
  refused(told, fetch, 'net', table)
  zipped(server.folder / 'x.zip', 'net.params')
  path = fetch('net', table)
  assert (path.name, path.read_bytes()) == ('net.params', CONTENT)
  # From the cache, though it is not the first choice.
  monkeypatch.setenv('RESNEST_JAX_OFFLINE', '1')
  assert fetch('net', table) == path
  path.unlink()
  refused('a.zip or .*x.zip is not in the cache', fetch, 'net', table)
  (cache_folder() / INNER).write_bytes(CONTENT)
  assert fetch('net', table).name == INNER


def test_user_of_an_address_is_told_to_its_host_alone(server, mmseg, tmp_path):
  """Weights of such an address do not say it, in no file."""
  saved(server.folder / 'x.safetensors', mmseg)
  address = server.url.replace('//', '//me:se%40cret@')
  source = f'{address}/moved/x.safetensors?sig=se%40cret#token=secret'
  weights = converted(source, tmp_path / 'out')
  assert server.requests[0].startswith('/moved/x.safetensors?sig=')
  assert server.users == ['Basic bWU6c2VAY3JldA==', None]  # me:se@cret
  for path in (tmp_path / 'out').iterdir():
    assert b'cret' not in path.read_bytes(), path
  shown = f'{server.url}/moved/x.safetensors?...'
  assert weights.provenance['from']['source'] == shown
  about = weights.about() | {'classes': CLASSES, 'palette': PALETTE}
  assert 'cret' not in model_card(about, [])
  # Files that earlier versions wrote say it.
  about['provenance']['from'] = {'source': source}
  write_weights(tmp_path / 'old', 'mmseg', mmseg, about)
  chain = load_weights(tmp_path / 'old').provenance['from']
  assert chain['from']['source'] == shown
  # Failed downloads do not show it either.
  for path in ('gone/x.pth', 'gone/x.pth?token=secret'):
    assert 'cret' not in refused('HTTP Error 404', fetch, f'{address}/{path}')


def test_runs_do_not_keep_secrets():
  address = 'https://me:secret@host/x.pth?token='
  before = small_config(pretrained=f'{address}secret')
  renewed = small_config(pretrained=f'{address}2')
  text, old = config_to_json(before), json.dumps(before.to_dict())
  assert ('secret' in text, 'secret' in old) == (False, True)
  assert 'https://host/x.pth?...' in text
  # A new token for the same file is the same run, also of earlier versions.
  assert differences(text, renewed) == differences(old, renewed) == []
