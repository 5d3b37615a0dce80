"""TIFF files that are read in parts: the label maps of `slide` in memory."""

import json
import signal
import time

import hosts
import numpy as np
import pytest
import tifffile
from data.pictures import write_tiff
from data.small_archives import encode
from evaluation import plain
from evaluation.drawn import smooth_picture
from numpy.testing import assert_array_equal
from PIL import Image

from resnest_jax.errors import UserError
from resnest_jax.inference.protocols import Protocol, choose_protocol
from resnest_jax.labels import ADE20K

SLIDE = ('--protocol', 'slide', '--image_scale', 0, 0)
SLIDE += ('--slide_crop', 64, 96, '--slide_stride', 42, 65)
# Pixels on the ground, a tie point, keys of the projection, and a name.
GEO = [(33550, 12, 3, (0.5, 0.5, 0.0), True)]
GEO += [(33922, 12, 6, (0.0, 0.0, 0.0, 4e5, 5.8e6, 0.0), True)]
GEO += [(34735, 3, 8, (1, 1, 0, 1, 3072, 0, 1, 32632), True)]
GEO += [(34737, 2, 13, 'WGS 84 / 32|', True)]


@pytest.mark.parametrize(
  ('size', 'crop', 'stride'),
  [
    # Three tiles of rows, which end within windows.
    ((2000, 3000), (512, 512), (341, 341)),
    # The last windows are moved back, or fit.
    ((301, 777), (64, 96), (42, 65)),
    ((190, 64), (64, 64), (42, 42)),
    # Lower than a window, and smaller than it.
    ((50, 333), (64, 64), (64, 40)),
    ((20, 25), (64, 64), (42, 42)),
  ],
)
def test_rows_of_windows_give_the_labels_of_all(size, crop, stride):
  predictor = plain.make_predictor(Protocol('slide', (0, 0), crop, stride))
  image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  expected = predictor.predict(image).labels
  if len(image) < 2000:
    scores = plain.slide_scores(image, size, crop, stride)
    assert np.mean(expected == scores.argmax(-1)) > 0.9999
  for start in (0, 9 * size[0] // 10):
    told, rows = [], []

    def read(part, rows=rows):
      rows.append(part)
      return image[part]

    how = {'start': start, 'tell': lambda *x, told=told: told.append(x)}
    found = [*predictor.stream(read, size, **how)]
    assert found[0][0] <= start
    assert_array_equal(
      np.concatenate([x for _, x in found]), expected[found[0][0] :]
    )
    assert sum(x for x, _ in told) == told[-1][1]
  # Of the end alone, little more is read.
  assert min(x.start for x in rows[1:]) >= found[0][0] - crop[0]


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
  """A folder of a scene, and the same picture as a PNG file."""
  folder = tmp_path_factory.mktemp('scenes')
  picture = smooth_picture(1100, 300)
  write_tiff(folder / 'land.tif', picture, extratags=GEO)
  (folder / 'picture.png').write_bytes(encode(picture[..., ::-1]))
  return folder


@pytest.fixture(scope='module')
def predicted(scenes, written_run, run_script, tmp_path_factory):
  """The folder of predictions of one undisturbed run."""
  out = tmp_path_factory.mktemp('predicted') / 'out'
  run_script(
    'predict.py', '--weights', written_run, '--out', out, *SLIDE, scenes
  )
  return out


def test_a_scene_becomes_a_tiff_with_colours_and_place(predicted):
  whole = np.asarray(Image.open(predicted / 'picture.png'))
  names = {'land.tif', 'picture.png', 'picture_color.png'}
  names |= {'picture_overlay.png', 'classes.json', 'predictions.json'}
  assert {x.name for x in predicted.iterdir()} == names
  with tifffile.TiffFile(predicted / 'land.tif') as file:
    page = file.pages.first
    assert_array_equal(page.asarray(), whole)
    assert (page.is_tiled, page.photometric.name) == (True, 'PALETTE')
    assert_array_equal(
      page.colormap[:, :150], 257 * np.uint16(ADE20K.palette.T)
    )
    for code, _, _, value, _ in GEO:
      assert page.tags[code].value == value
  record = json.loads((predicted / 'predictions.json').read_text())
  entry = record['predictions'][-1]
  assert (entry['masks'], 'colors' in entry) == ('land.tif', False)
  # Pillow, as GIS programs do, takes the colours from the file.
  shown = Image.open(predicted / 'land.tif').convert('RGB')
  assert_array_equal(shown, ADE20K.palette[whole])


@pytest.mark.long
def test_killed_scenes_resume(scenes, predicted, written_run, tmp_path):
  out, counts = tmp_path / 'out', []
  words = ('--weights', written_run, '--out', out, *SLIDE, scenes / 'land.tif')

  def rows():
    file = out / 'land.tif.part' / 'rows'
    return file.stat().st_size / 300 if file.exists() else 0

  for _ in range(3):
    before = rows()
    with hosts.start('predict.py', *words, devices=4) as process:
      while rows() <= before:
        assert process.poll() is None
        time.sleep(0.001)
      process.send_signal(signal.SIGKILL)
    counts.append(rows())
    # A part of a row is computed again.
    with (out / 'land.tif.part' / 'rows').open('ab') as file:
      file.write(b'x')
  assert counts == sorted({*counts})  # Each of them has more.
  assert counts[-1] < 1100
  process = hosts.start('predict.py', *words, devices=4)
  printed, _ = hosts.finish(process)
  assert f'{int(counts[-1])} of 1100 rows are there already' in printed
  expected = (predicted / 'land.tif').read_bytes()
  assert (out / 'land.tif').read_bytes() == expected
  assert not (out / 'land.tif.part').exists()


def test_rows_of_other_weights_are_not_taken(
  scenes, written_run, call_script, tmp_path, predicted
):
  out = tmp_path / 'out'
  part = out / 'land.tif.part'
  part.mkdir(parents=True)
  (part / 'about.json').write_text('{"weights": "others"}')
  (part / 'rows').write_bytes(bytes(256 * 300))
  words = ('predict.py', '--weights', written_run, '--out', out, *SLIDE)
  with pytest.raises(UserError, match=r'another prediction: .*weights'):
    call_script(*words, scenes / 'land.tif')
  call_script(*words, '--overwrite', scenes / 'land.tif')
  expected = (predicted / 'land.tif').read_bytes()
  assert (out / 'land.tif').read_bytes() == expected
  with pytest.raises(UserError, match='--save masks is all'):
    call_script(*words, scenes / 'land.tif', '--save', 'colors')


def test_damaged_scenes_are_one_error_each(
  scenes, written_run, run_script, tmp_path
):
  pixels, folder = smooth_picture(150, 201), tmp_path / 'broken'
  folder.mkdir()
  encoded = (scenes / 'land.tif').read_bytes()
  (folder / 'cut.tif').write_bytes(encoded[: len(encoded) // 2])
  (folder / 'empty.tif').write_bytes(b'')
  write_tiff(folder / 'tile.tif', pixels, compression='lzw')
  with tifffile.TiffFile(folder / 'tile.tif') as file:
    places = file.pages.first.dataoffsets, file.pages.first.databytecounts
  content = bytearray((folder / 'tile.tif').read_bytes())
  place, length = places[0][9], places[1][9]  # Of the third row of tiles.
  content[place : place + length] = length * b'\xff'
  (folder / 'tile.tif').write_bytes(content)
  turned = [(274, 3, 1, 6, True)]
  write_tiff(folder / 'turned.tif', pixels, extratags=turned)
  words = ('--weights', written_run, '--out', tmp_path / 'out', *SLIDE, folder)
  process = run_script('predict.py', *words, status=1)
  told = {
    'cut': 'cut off: ',
    'empty': 'cannot be read: ',
    'turned': '3 bands of uint8, with orientation 6, ',
  }
  told |= {'tile': 'cannot be read in rows 42 to 106'}
  first, *lines = process.stderr.strip().splitlines()
  assert first.startswith('error: 4 of 4 could not be read')
  for name, why in told.items():
    (line,) = [x for x in lines if f'{name}.tif' in x]
    assert why in line


@pytest.mark.parametrize('name', ['slide', 'ms_flip_0x'])
def test_only_whole_and_slide_keep_the_size(name):
  given = {'image_scale': (0, 5 * (name == 'slide'))}
  with pytest.raises(UserError, match='two numbers of pixels from 1'):
    choose_protocol(name, image_scale=(9, 9), crop=(9, 9), given=given)
  found = [
    choose_protocol(
      x, image_scale=(9, 9), crop=(9, 9), given={'image_scale': (0, 0)}
    )
    for x in ('whole', 'slide')
  ]
  assert [x.largest((30, 50)) for x in found] == 2 * [[30, 50]]
