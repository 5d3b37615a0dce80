"""Pictures: colours that can be computed by hand, and files that open."""

import json
import os

import cv2
import numpy as np
import pytest
from data.small_archives import encode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from resnest_jax import drawing
from resnest_jax.errors import UserError

PALETTE = np.array([[200, 0, 0], [0, 100, 0], [0, 0, 50]], np.uint8)
CLASSES = ('wall', 'sky', 'tree'), PALETTE
LABEL = np.array([[0, 1], [2, 255]], np.uint8)


def colours(picture):
  return set(map(tuple, picture.reshape(-1, 3).tolist()))


def test_colours_are_the_palettes_and_no_class_is_black():
  picture = drawing.colour(LABEL, PALETTE).reshape(-1, 3)
  np.testing.assert_array_equal(picture, [*PALETTE, [0, 0, 0]])


def test_overlay_mixes_by_opacity_and_leaves_unlabelled_pixels():
  image = np.full((2, 2, 3), 100, np.uint8)
  picture = drawing.overlay(image, LABEL, PALETTE, opacity=0.25)
  mixed = [[125, 75, 75], [75, 100, 75], [75, 75, 88], [100, 100, 100]]
  assert picture.reshape(-1, 3).tolist() == mixed
  with pytest.raises(ValueError, match='differ in size'):
    drawing.overlay(image[:1], LABEL, PALETTE)


def test_error_map_has_three_kinds_of_pixels():
  picture = drawing.error_map(np.array([[0, 2], [2, 0]], np.uint8), LABEL)
  right, wrong, ignored = (232, 236, 240), (214, 39, 40), (150, 160, 180)
  np.testing.assert_array_equal(picture, [[right, wrong], [right, ignored]])


def test_legend_shows_the_classes_that_occur():
  label = np.array([[0, 0, 2, 255]], np.uint8)
  found = colours(drawing.legend([label], *CLASSES, 300))
  assert {(200, 0, 0), (0, 0, 50)} <= found
  assert (0, 100, 0) not in found
  # In a narrow one the entries flow into further rows.
  three = [np.arange(3, dtype=np.uint8)]
  wide, narrow = (drawing.legend(three, *CLASSES, x).shape for x in (300, 50))
  assert (wide[1], narrow[1]) == (300, 50)
  assert narrow[0] > 2 * wide[0]
  assert len(drawing.legend(three, *CLASSES, 900, 3)) == 3 * wide[0]


def test_mask_panel_shows_classes_ignored_pixels_and_a_note():
  image = np.full((40, 60, 3), 100, np.uint8)
  label = np.zeros((40, 60), np.uint8)
  label[:, 30:] = 255

  def panel(mask, **options):
    about = options | {'box': (80, 120), 'title': 'a'}
    return drawing.mask_panel(image, mask, *CLASSES, **about)

  plain, noted = panel(label), panel(label, note='size_mismatch')
  # Each twice as large, with 12 pixels of paper around.
  right = plain[:, 120 + 12 :].reshape(-1, 3)
  # 45 % of the image and 55 % of the colour; what is ignored shows the image
  # and the hatching.
  for colour, share in (((155, 45, 45), 0.5), ((100, 100, 100), 0.5 * 5 / 8)):
    number = (right == colour).all(-1).sum()
    assert number == pytest.approx(share * 80 * 120, rel=0.05)
  np.testing.assert_array_equal(noted[44:], plain[22:])
  np.testing.assert_array_equal(noted[22:44].min((0, 1)), (214, 39, 40))
  # A mask that is no label map is shown as it is.
  stored = panel(np.full((20, 60, 3), (9, 8, 7), np.uint8))  # Of another shape.
  assert (stored == (9, 8, 7)).all(-1).sum() == 40 * 120


@pytest.mark.parametrize('shape', [(60, 90), (90, 30), (1, 1)])
def test_panels_of_all_shapes_are_equally_wide(shape):
  label = np.zeros(shape, np.uint8)
  label[0, 0] = 255
  maps = np.full((*shape, 3), 77, np.uint8), label, np.ones(shape, np.uint8)
  panel = drawing.panel(*maps, *CLASSES, 'title', box=(50, 60))
  assert panel.shape[1] == 4 * 72
  found = colours(panel)
  assert {(77, 77, 77), (0, 100, 0)} <= found
  assert ((200, 0, 0) in found) == (shape != (1, 1))


def test_contact_sheet_keeps_every_picture():
  shapes = {10: (10, 30), 20: (20, 10), 30: (5, 5)}
  pictures = [np.full((*x, 3), i, np.uint8) for i, x in shapes.items()]
  sheet = drawing.contact_sheet(pictures, columns=2, gap=4)
  assert sheet.shape == (20 + 5 + 3 * 4, 30 + 10 + 3 * 4, 3)
  for value, (height, width) in shapes.items():
    assert np.count_nonzero((sheet == value).all(-1)) == height * width
  with pytest.raises(ValueError, match='at least one'):
    drawing.contact_sheet([])


def test_pictures_are_what_opencv_writes_where_it_can(tmp_path):
  (tmp_path / 'a.png').touch()
  with pytest.raises(FileExistsError, match=r'a\.png'):  # It is no folder.
    drawing.write_image(tmp_path / 'a.png' / 'b.png', PALETTE[None])
  # Python opens the file: OpenCV ends the process at names without UTF-8.
  for name in (b'stra\xdfe.png', 'e\u0301 [x] %.JPG'.encode(), b'\\ \n.tiff'):
    path = tmp_path / os.fsdecode(name)
    drawing.write_image(path, LABEL)
    assert path.read_bytes() == encode(LABEL, path.suffix)
    drawing.write_image(path, PALETTE[None])
    assert path.read_bytes() == encode(PALETTE[None, :, ::-1], path.suffix)
  with pytest.raises(UserError, match='encode 70000x1 pixels as'):
    drawing.write_image(tmp_path / 'a.jpg', np.zeros((1, 70000, 3), np.uint8))


def test_log_of_a_resumed_run_counts_the_last_word(tmp_path):
  log = tmp_path / 'log.jsonl'
  log.write_text("""{"step": 1, "loss": 3.0}
{"step": 2, "loss": 2.0, "note": "text", "done": true}
{"step": 2, "mIoU": NaN}
{"step": 3, "loss": 1.5}
{"step": 4, "lo
{"step": 2, "loss": 2.5}""")
  scalars = drawing.read_log(log)
  assert set(scalars) == {'loss', 'mIoU'}
  np.testing.assert_array_equal(scalars['loss'], [[1, 2, 3], [3.0, 2.5, 1.5]])


def test_smoothing_is_unbiased_and_passes_over_nan():
  np.testing.assert_allclose(drawing.smooth(np.full(5, 3.0), 10), 3.0)
  # Weights 1/4 (older) and 1/2 (newer), over their sum.
  values = drawing.smooth(np.array([1.0, np.nan, 4.0]), 1)
  np.testing.assert_allclose(values, [1.0, 1.0, 3.0])


@pytest.mark.parametrize('scores', [(0.01, 0.02), (0.1, 0.2), (0.3, 0.9)])
@pytest.mark.parametrize('steps', [(10, 20), (10, 300)])
def test_best_score_does_not_lie_on_the_legend(scores, steps):
  figure = Figure(figsize=(5, 3), layout='constrained')
  canvas, axes = FigureCanvasAgg(figure), figure.subplots()
  for values in (scores, scores[::-1]):
    axes.clear()
    drawing._scores(axes, {'mIoU': (np.array(steps), np.array(values))})
    axes.set_ylim(0, 1)
    canvas.draw()
    number, legend = axes.texts[0], axes.get_legend()
    assert not number.get_window_extent().overlaps(legend.get_window_extent())


def test_curves_are_drawn(tmp_path):
  keys = ('loss', 'aux_loss', 'accuracy', 'learning_rate', 'images_per_second')
  lines = [{'step': s, **dict.fromkeys(keys, 1 / s)} for s in range(1, 30)]
  lines += [{'step': 10, 'mIoU': 0.2}, {'step': 20, 'mIoU': 0.5}]
  coloured = []
  for text in ('\n'.join(map(json.dumps, lines)), ''):
    (tmp_path / 'log.jsonl').write_text(text)
    drawing.plot_curves(tmp_path / 'log.jsonl', tmp_path / 'a.png', 'a title')
    picture = cv2.imread(f'{tmp_path}/a.png')
    coloured.append(np.count_nonzero(np.ptp(picture, axis=-1) > 60))
  # Saturated pixels are curves; without a log there are none.
  assert coloured[0] > 2000
  assert coloured[1] == 0
