"""Texts of the page to try a network, without a browser."""

import re
import socketserver
import sys

import cv2
import numpy as np
import pytest
from browser import plain
from evaluation.drawn import smooth_picture
from evaluation.plain import make_predictor
from PIL import Image

from resnest_jax.demo import page, result, serve
from resnest_jax.errors import UserError


@pytest.mark.parametrize(
  ('counts', 'expected'),
  [
    # A third each: the thousandth goes to the first of equal remainders.
    ([1, 1, 1], [(0, 334), (1, 333), (2, 333)]),
    # 1/7 is 142.86 thousandths, 2/7 285.71, 4/7 571.43.
    ([1, 4, 0, 2], [(1, 571), (3, 286), (0, 143)]),
    # Of 5000 pixels one is 0.2 thousandths.
    ([4999, 1], [(0, 1000), (1, 0)]),
  ],
)
def test_shares_add_up(counts, expected):
  labels = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)[None]
  assert result.shares(labels, len(counts)) == expected


@pytest.fixture
def look(tmp_path):
  """look(predictor, height, width): results for such a picture."""

  def look_at(predictor, *size):
    cv2.imwrite(f'{tmp_path}/street.png', smooth_picture(*size))
    return result.look_at(predictor, tmp_path / 'street.png')

  return look_at


@pytest.mark.parametrize(
  ('size', 'shown', 'seen', 'padded', 'words'),
  [
    ((50, 60), (50, 60), (64, 77), (64, 128), '60 x 50 pixels. The network'),
    (
      *((1700, 3300), (824, 1600), (64, 124), (64, 128)),
      '3300 x 1700; it is large and was shrunk to 1600 x 824',
    ),
  ],
)
def test_sizes_are_told(look, size, shown, seen, padded, words):
  predictor = make_predictor()
  found = look(predictor, *size)
  assert found.original == size
  assert found.prediction.labels.shape == shown
  assert (found.seen, tuple(found.padded)) == (seen, padded)
  assert 0 < found.seconds < 60
  assert predictor.on_step is None
  assert words in plain(re.sub('<.*?>', '', result.facts(found)))


def test_time_is_without_compiling(look):
  """The first picture is shown to the network twice, those after it once."""
  predictor, steps = make_predictor(), []
  run = predictor._step
  predictor._step = lambda *given: steps.append(given) or run(*given)
  for number, expected in ((1, 2), (2, 3), (3, 4)):
    look(predictor, 40 + number, 50)
    assert len(steps) == expected


def test_pictures_of_too_many_pixels_are_not_decoded(tmp_path):
  path = tmp_path / 'bomb.png'
  Image.new('1', (20_000, 10_000)).save(path)
  assert path.stat().st_size < 100_000
  with pytest.raises(UserError, match=r'bomb\.png has more than 100 million'):
    result.look_at(make_predictor(), path)


def test_only_what_was_uploaded_is_read(tmp_path, monkeypatch):
  """Though the browser gives a path, and may lie."""
  monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
  inside = tmp_path / 'uploads' / 'x' / 'a.png'
  assert page.uploaded({'path': str(inside)}) == inside
  for path in (tmp_path / 'a.png', tmp_path / 'uploads' / '..' / 'a.png'):
    with pytest.raises(UserError, match=r'^a\.png was not uploaded'):
      page.uploaded({'path': str(path)})


def run_command(monkeypatch, *flags):
  command = ['demo', '--weights', 'nowhere', *flags]
  monkeypatch.setattr(sys, 'argv', command)
  serve.main()


def test_a_taken_port_is_told(monkeypatch):
  with socketserver.TCPServer(('127.0.0.1', 0), None) as server:
    port = server.server_address[1]
    with pytest.raises(UserError, match=f'port {port} is taken .* --port 0'):
      run_command(monkeypatch, f'--port={port}')


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--port=70000'], r'--port is 70000; give 1 to 65535'),
    (['--port=0', '--host=192.0.2.1'], r'192\.0\.2\.1 is no address of'),
    (['--port=0'], 'nowhere'),
    (['--port=0', '--examples=none.jpg'], r'no file.* none\.jpg'),
    (['--prot=1'], 'unrecognized arguments: --prot=1'),
  ],
)
def test_mistakes_are_told(monkeypatch, flags, message):
  with pytest.raises(UserError, match=message):
    run_command(monkeypatch, *flags)


def test_a_missing_gradio_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  message = "needs the package gradio: pip install 'gradio>=6'"
  with pytest.raises(UserError, match=message):
    run_command(monkeypatch)
