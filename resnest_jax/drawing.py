"""Pictures: label maps in colours, overlays, legends, panels, curves.

Images are uint8 (H, W, 3) RGB arrays, label maps uint8 (H, W) with 255 for "no
class", palettes uint8 (C, 3) RGB, boxes (height, width) in pixels. OpenCV draws
pixels, `lettering` text, matplotlib curves.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from resnest_jax import bands, lettering
from resnest_jax.config_keys import MAIN_SCORES, main_score_in
from resnest_jax.errors import UserError
from resnest_jax.files import whole_file
from resnest_jax.labels import IGNORE

_INK, _PAPER = (38, 38, 38), (255, 255, 255)
_RIGHT, _WRONG, _IGNORED = (232, 236, 240), (214, 39, 40), (150, 160, 180)

_Pair = tuple[int, int]  # Pixels: a box, or x and y.


def colour(label_map: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """The label map in the palette's colours; black where there is no class."""
  table = np.zeros((256, 3), np.uint8)
  table[: len(palette)] = palette
  table[IGNORE] = 0
  return table[label_map]


def overlay(
  image: np.ndarray,
  label_map: np.ndarray,
  palette: np.ndarray,
  opacity: float = 0.5,
) -> np.ndarray:
  """The image with the classes' colours over it, unchanged at pixels of 255.

  `opacity` of the colours is 0 (invisible) to 1.
  """
  if image.shape[:2] != label_map.shape:
    raise ValueError(
      f'image {image.shape} and label map {label_map.shape} differ in size'
    )
  # In place: a large picture would be in memory four times.
  mixed = colour(label_map, palette)
  cv2.addWeighted(image, 1 - opacity, mixed, opacity, 0, dst=mixed)
  np.copyto(mixed, image, where=(label_map == IGNORE)[..., None])
  return mixed


def error_map(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
  """Wrong pixels red, right ones light, unlabelled ones grey blue."""
  picture = np.full((*label.shape, 3), _RIGHT, np.uint8)
  picture[prediction != label] = _WRONG
  picture[label == IGNORE] = _IGNORED  # Last: predictions differ from 255.
  return picture


def legend(
  label_maps: Sequence[np.ndarray],
  class_names: Sequence[str],
  palette: np.ndarray,
  width: int,
  zoom: int = 1,
) -> np.ndarray:
  """Names and colours of the classes in the label maps, most frequent first.

  They flow over as many rows of `width` pixels as needed; `zoom` enlarges all.
  """
  counts = sum(np.bincount(m.ravel(), minlength=256) for m in label_maps)
  # Stable: classes of equal frequency keep their order on every platform.
  order = np.argsort(-counts[: len(class_names)], kind='stable')
  row_height, swatch, gap, left = (zoom * x for x in (24, 14, 22, 8))
  # Two passes: the number of rows has to be known before the picture exists.
  places, x, y = [], left, 0
  for entry in order[counts[order] > 0]:
    # Not cut off: names may differ in their ends alone.
    room = max(width - swatch - 14 * zoom, 60 * zoom)
    lines = lettering.wrapped(class_names[entry], room, zoom)
    length = swatch + gap + max(lettering.width(line, zoom) for line in lines)
    # A name that is wider than the picture still starts its own row.
    if x > left and (x + length > width or len(lines) > 1):
      x, y = left, y + row_height
    places.append((entry, x, y, lines))
    x, y = x + length, y + row_height * (len(lines) - 1)
  picture = _paper(y + row_height + 6 * zoom, width)
  for entry, x, y, lines in places:
    corner, far = (x, y + left), (x + swatch, y + left + swatch)
    cv2.rectangle(picture, corner, far, palette[entry].tolist(), cv2.FILLED)
    cv2.rectangle(picture, corner, far, _INK, zoom)
    for row, line in enumerate(lines):
      base = x + swatch + 6 * zoom, y + 20 * zoom + row * row_height
      lettering.write(picture, line, base, _INK, zoom)
  return picture


def panel(
  image: np.ndarray,
  label: np.ndarray,
  prediction: np.ndarray,
  class_names: Sequence[str],
  palette: np.ndarray,
  title: str,
  box: _Pair = (240, 320),
) -> np.ndarray:
  """Image, ground truth, prediction and errors side by side, with a legend.

  Each of the four is fitted into `box`: panels of all shapes are equally wide.
  """
  labelled = label != IGNORE
  right = np.count_nonzero((prediction == label) & labelled)
  share = right / max(np.count_nonzero(labelled), 1)
  score = f'{share:.1%} right; red: wrong, grey: ignored'
  parts = {
    'image': image,
    'ground truth (black: ignored)': colour(label, palette),
    'prediction': colour(prediction, palette),
    score: error_map(prediction, label),
  }
  # Only the photograph is smoothed: mixed colours would name no class.
  columns = [
    _captioned(fit(part, box, smooth=part is image), caption, box[1])
    for caption, part in parts.items()
  ]
  pictures = np.hstack(columns)
  heading = _paper(26, pictures.shape[1])
  _write(heading, title, (8, 18))
  names = legend([label, prediction], class_names, palette, pictures.shape[1])
  return np.vstack([heading, pictures, names])


def panels(
  split: Any, predictions: Mapping[int, np.ndarray]
) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
  """Yields sample, prediction and `panel` of each index in `predictions`."""
  # A generator: panels and samples of a whole split need not fit in memory.
  classes, palette = split.labels.classes, split.labels.palette
  for index, prediction in sorted(predictions.items()):
    sample = shown_sample(split, index)
    maps = sample['label'], prediction
    drawn = panel(sample['image'], *maps, classes, palette, sample['name'])
    yield sample, prediction, drawn


def shown_sample(split: Any, index: int) -> dict[str, Any]:
  """A sample whose image is RGB, also of a split with other bands."""
  sample = split[index]
  image = bands.shown(sample['image'], getattr(split, 'bands', ()))
  return sample | {'image': image}


def mask_panel(
  image: np.ndarray,
  label: np.ndarray,
  class_names: Sequence[str],
  palette: np.ndarray,
  title: str,
  note: str = '',
  box: _Pair = (240, 320),
) -> np.ndarray:
  """An image next to its overlay with the label map, and a legend.

  The label map is hatched where it is 255. Instead it may be a picture, uint8
  (h, w, 3), which is shown unchanged. The note is a second line, in red.
  """
  shown = fit(image, box, smooth=True)
  columns = [_captioned(shown, 'image', box[1])]
  if label.ndim == 3:
    caption, mask = 'mask as stored', fit(label, box)
  else:
    # Of the whole label map: after `fit`, thin borders may be lost.
    ignored = (label == IGNORE).mean()
    told = f' ({ignored:.1%} ignored, hatched)' if ignored else ''
    caption = f'classes{told}'
    mask = _with_classes(shown, fit(label, box), palette)
  columns.append(_captioned(mask, caption, box[1]))
  # Not `hstack`: a stored mask may have another shape than the image.
  pictures = contact_sheet(columns, columns=2, gap=0)
  heading = _paper(44 if note else 22, pictures.shape[1])
  _write(heading, title, (8, 18))
  _write(heading, note, (8, 40), _WRONG)
  rows = [heading, pictures]
  if label.ndim == 2:
    rows.append(legend([label], class_names, palette, pictures.shape[1]))
  return np.vstack(rows)


def _with_classes(
  image: np.ndarray, label: np.ndarray, palette: np.ndarray
) -> np.ndarray:
  """An overlay with lines between classes and hatched ignored pixels."""
  picture = overlay(image, label, palette, 0.55)
  # Not filled: the image under ignored pixels shows why they are ignored.
  y, x = np.indices(label.shape)
  picture[(label == IGNORE) & ((x + y) % 8 < 3)] = _IGNORED
  border = np.zeros(label.shape, bool)
  border[:, 1:] = label[:, 1:] != label[:, :-1]
  border[1:] |= label[1:] != label[:-1]
  picture[border] = _PAPER
  return picture


def fit(picture: np.ndarray, box: _Pair, smooth: bool = False) -> np.ndarray:
  """Resizes to the largest size that fits into the box, keeping the shape."""
  scale = min(box[0] / picture.shape[0], box[1] / picture.shape[1])
  height, width = (max(round(n * scale), 1) for n in picture.shape[:2])
  interpolation = cv2.INTER_AREA if smooth else cv2.INTER_NEAREST
  return cv2.resize(picture, (width, height), interpolation=interpolation)


def spread(length: int, number: int) -> list[int]:
  """Up to `number` evenly spread indices of a sequence, both ends included."""
  return np.linspace(0, length - 1, min(number, length), dtype=int).tolist()


def contact_sheet(
  pictures: Sequence[np.ndarray], columns: int = 1, gap: int = 12
) -> np.ndarray:
  """Pictures of any sizes in a grid on white, each column as wide as needed."""
  if not pictures:
    raise ValueError('a contact sheet needs at least one picture')
  rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
  widths = [
    max(x.shape[1] for x in pictures[i::columns]) for i in range(len(rows[0]))
  ]
  heights = [max(x.shape[0] for x in row) for row in rows]
  sheet = _paper(*(sum(x) + gap * (len(x) + 1) for x in (heights, widths)))
  y = gap
  for row, height in zip(rows, heights, strict=True):
    x = gap
    for picture, width in zip(row, widths, strict=False):  # The last is short.
      sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
      x += width + gap
    y += height + gap
  return sheet


def write_image(path: Path, image: np.ndarray) -> None:
  """Writes (H, W, 3) RGB or (H, W) grey, whole, in the format of the ending."""
  # Not `cv2.imwrite`: names that are not UTF-8 end the process there, and a
  # refusal of the system is only False.
  content = encoded(path.suffix, image)
  with whole_file(path) as temporary:
    temporary.write_bytes(content)


def encoded(ending: str, image: np.ndarray, *options: int) -> bytes:
  """The bytes of a file of this ending, with options of `cv2.imencode`."""
  if image.ndim == 3:
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  done, content = cv2.imencode(ending, image, options)
  if not done:
    raise UserError(
      f'OpenCV cannot encode {image.shape[1]}x{image.shape[0]} pixels as '
      f'{ending}; choose another format, or a smaller picture.'
    )
  return content.tobytes()


def _paper(height: int, width: int) -> np.ndarray:
  return np.full((height, width, 3), _PAPER, np.uint8)


def _write(
  picture: np.ndarray, text: str, corner: _Pair, ink: Sequence[int] = _INK
) -> None:
  room = picture.shape[1] - 2 * corner[0]
  lettering.write(picture, lettering.elided(text, room), corner, ink)


def _captioned(picture: np.ndarray, caption: str, width: int) -> np.ndarray:
  height = picture.shape[0]
  paper = _paper(22 + height + 4, width + 12)
  _write(paper, caption, (8, 15))
  paper[22 : 22 + height, 6 : 6 + picture.shape[1]] = picture
  return paper


# --- Curves ------------------------------------------------------------------


def read_log(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Scalars of a JSON-lines training log: name -> (steps, values)."""
  # A run that was killed and resumed logs some steps again: the last counts.
  scalars: dict[str, dict[int, float]] = {}
  for line in Path(path).read_text().splitlines():
    try:
      entry = json.loads(line)
      step = entry.pop('step')
    # A kill truncates the line that is being written.
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
      continue
    for name, value in entry.items():
      if type(value) in (int, float):
        scalars.setdefault(name, {})[step] = value
  return {
    name: (np.array(sorted(of)), np.array([of[x] for x in sorted(of)], float))
    for name, of in scalars.items()
  }


def smooth(values: np.ndarray, span: float) -> np.ndarray:
  """Exponential moving average over about `span` values; skips NaN."""
  # Dividing by the sum of the weights removes the bias towards 0 at the start.
  decay = span / (span + 1)
  result, total, weight = np.empty(len(values)), 0.0, 0.0
  for i, value in enumerate(values):
    if not np.isnan(value):
      total = decay * total + (1 - decay) * value
      weight = decay * weight + (1 - decay)
    result[i] = total / weight if weight else np.nan
  return result


def plot_curves(log_path: Path, out_path: Path, title: str = '') -> None:
  """Draws a training log: losses, accuracy and scores, learning rate, speed.

  The log has JSON lines, each a dict with 'step' and some keys of `_COLOURS`.
  The ending of `out_path` selects the format.
  """
  scalars = read_log(log_path)
  # Late: it takes half a second. Not pyplot, which wants the main thread.
  import matplotlib.ticker
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 7), dpi=110, layout='constrained')
  FigureCanvasAgg(figure)
  (loss, score), (rate, speed) = figure.subplots(2, 2, sharex=True)
  _curves(loss, 'Training loss', scalars, ('loss', 'aux_loss'))
  _curves(score, 'Training accuracy and held-out scores', scalars, ['accuracy'])
  _scores(score, scalars)
  _curves(rate, 'Learning rate', scalars, ['learning_rate'], smoothed=False)
  _curves(speed, 'Images per second', scalars, ['images_per_second'])
  rate.ticklabel_format(axis='y', style='sci', scilimits=(-2, 2))
  loss.set_ylim(bottom=0)
  speed.set_ylim(bottom=0)
  score.set_ylim(0, 1)
  score.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
  for axes in (rate, speed):
    axes.set_xlabel('step')
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=''))
  if title:
    # A name is no formula, whatever its dollar signs.
    figure.suptitle(title, fontsize=13, fontweight='bold', parse_math=False)
  figure.savefig(out_path)


_COLOURS = {
  'loss': '#1f5fa8',
  'aux_loss': '#e08214',
  'accuracy': '#7a7a7a',
  'learning_rate': '#542788',
  'images_per_second': '#35978f',
  'mIoU': '#b2182b',
  'mAcc': '#ef8a62',
  'top1': '#b2182b',
  'top5': '#ef8a62',
}


def _curves(axes, title, scalars, names, smoothed=True) -> None:
  axes.set_title(title, loc='left', fontsize=10.5)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  known = [name for name in names if name in scalars]
  for name in known:
    steps, values = scalars[name]
    line = {'color': _COLOURS[name], 'label': name.replace('_', ' ')}
    if smoothed and len(values) > 20:
      axes.plot(steps, values, color=line['color'], alpha=0.25, linewidth=0.8)
      values = smooth(values, len(values) / 40)
    axes.plot(steps, values, linewidth=1.7, **line)
  if len(known) > 1:
    axes.legend(frameon=False, fontsize=9)


def _scores(axes, scalars) -> None:
  for name in (x for x in ('mAcc', 'top5', *MAIN_SCORES) if x in scalars):
    line = {'color': _COLOURS[name], 'label': name}
    axes.plot(*scalars[name], 'o-', markersize=4, **line)
  # `nanargmax` raises if no evaluation had labelled pixels.
  steps, values = main_score_in(scalars) or ([], [])
  legend = 'lower right'
  if not np.isnan(values).all():
    best = np.nanargmax(values)
    if values[best] < 0.4:  # The number would lie on it.
      legend = 'upper left'
    axes.annotate(
      f'{values[best]:.1%}',
      (steps[best], values[best]),
      xytext=(0, -14),
      textcoords='offset points',
      # Towards the middle: the text does not leave the axes.
      ha='left' if 2 * steps[best] < steps[0] + steps[-1] else 'right',
      color=_COLOURS[MAIN_SCORES[0]],
      fontweight='bold',
    )
  if axes.lines:
    axes.legend(frameon=False, fontsize=9, loc=legend)
