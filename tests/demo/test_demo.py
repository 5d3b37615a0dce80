"""Texts of the page to try a network, without a browser."""

import os
import re
import socketserver
import sys

import cv2
import numpy as np
import pytest
from browser import plain
from data.pictures import claiming, png_bomb
from evaluation import class_runs
from evaluation.drawn import smooth_picture
from evaluation.plain import make_predictor

from resnest_jax.demo import page, result, serve
from resnest_jax.errors import UserError


def test_shares_add_up():
  for counts, expected in (
    # A third each: the thousandth goes to the first of equal remainders.
    ([1, 1, 1], [(0, 334), (1, 333), (2, 333)]),
    # 1/7 is 142.86 thousandths, 2/7 285.71, 4/7 571.43.
    ([1, 4, 0, 2], [(1, 571), (3, 286), (0, 143)]),
    # Of 5000 pixels one is 0.2 thousandths.
    ([4999, 1], [(0, 1000), (1, 0)]),
  ):
    labels = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)[None]
    assert result.shares(labels, len(counts)) == expected


def look(predictor, folder, *size):
  cv2.imwrite(f'{folder}/street.png', smooth_picture(*size))
  return result.look_at(predictor, folder / 'street.png')


def test_sizes_of_a_large_picture_are_told(tmp_path):
  found = look(make_predictor(), tmp_path, 1700, 3300)
  assert found.prediction.labels.shape == (824, 1600)
  told = plain(re.sub('<.*?>', '', result.facts(found)))
  assert '3300 x 1700; it is large and was shrunk to 1600 x 824' in told
  assert 'saw it at 124 x 64, padded to 128 x 64' in told


def test_time_is_without_compiling(tmp_path):
  """The first picture is shown to the network twice, those after it once."""
  predictor, steps = make_predictor(), []
  run = predictor._step
  predictor._step = lambda *given: steps.append(given) or run(*given)
  for number in (1, 2, 3):
    look(predictor, tmp_path, 40 + number, 50)
    assert len(steps) == 1 + number
    assert predictor.on_step is None


def test_pictures_of_too_many_pixels_are_not_decoded(tmp_path):
  """Whether Pillow reads them or OpenCV alone."""
  predictor = make_predictor()
  whole = {'bomb': png_bomb(10_000, 20_000)}
  for kind, encoded in (whole | claiming(10_001, 10_000)).items():
    path = tmp_path / kind
    path.write_bytes(encoded)
    assert len(encoded) < 100_000
    why = 'has more than 100 million pixels'
    if kind == 'HDR':
      why = 'cannot be decoded'
    with pytest.raises(UserError, match=f'^{kind} {why}'):
      result.look_at(predictor, path)


def test_only_what_was_uploaded_is_read(tmp_path, monkeypatch):
  """Though the browser gives a path, and may lie."""
  folder = tmp_path / 'uploads'
  monkeypatch.setenv('GRADIO_TEMP_DIR', str(folder))
  inside = folder / 'x' / 'a.png'
  assert page.uploaded({'path': str(inside)}) == inside
  for path in (tmp_path / 'a.png', folder / '..' / 'a.png'):
    with pytest.raises(UserError, match=r'^a\.png was not uploaded'):
      page.uploaded({'path': str(path)})
  # A program sends anything.
  for upload in ({}, {'path': 3}, {'path': None}, [], 'a', {'path': 'a\0'}):
    with pytest.raises(UserError, match='no upload'):
      page.uploaded(upload)


def test_the_oldest_uploads_give_way(tmp_path):
  for number, name in enumerate(('old', 'x/middle', 'new', 'y/newest')):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(100))
    os.utime(path, (number, number))

  def kept(most):
    serve.trim_uploads(tmp_path, most)
    return sorted(x.name for x in tmp_path.rglob('*') if x.is_file())

  assert len(kept(400)) == 4
  assert kept(399) == ['middle', 'new', 'newest']
  assert (kept(150), kept(0)) == (['newest'], [])


def refused(message, monkeypatch, *flags):
  """Asserts that the command ends in this message."""
  monkeypatch.setattr(sys, 'argv', ['demo', '--weights', 'nowhere', *flags])
  with pytest.raises(UserError, match=message):
    serve.main()


def test_mistakes_are_told(monkeypatch):
  refused('--port is 70000; give 1 to 65535', monkeypatch, '--port=70000')
  said = r'--host 192\.0\.2\.1 --port 0: Cannot assign'
  refused(said, monkeypatch, '--port=0', '--host=192.0.2.1')
  said = r'no file.* none\.jpg'
  refused(said, monkeypatch, '--port=0', '--examples=none.jpg')
  with socketserver.TCPServer(('127.0.0.1', 0), None) as server:
    taken = server.server_address[1]
    said = f'--port {taken}: Address already in use.*0 for any free'
    refused(said, monkeypatch, f'--port={taken}')


def test_a_missing_gradio_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  refused("needs the package gradio: pip install 'gradio>=6'", monkeypatch)


def test_classifiers_are_refused(tmp_path, monkeypatch):
  class_runs.write_weights(tmp_path / 'weights')
  flags = ['serve.py', '--weights', str(tmp_path / 'weights')]
  monkeypatch.setattr(sys, 'argv', flags)
  monkeypatch.setattr(serve.signal, 'signal', lambda *_: None)
  with pytest.raises(UserError, match='weights is a classifier, and the page'):
    serve.main()
