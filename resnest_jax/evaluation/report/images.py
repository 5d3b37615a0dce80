"""The pictures of the report, embedded in the page."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from resnest_jax import drawing
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.ranked_images import ScoredImage
from resnest_jax.evaluation.report.tables import named
from resnest_jax.labels import LabelSet

BOX = (480, 640)  # Height and width in pixels into which pictures are fitted.
MOST_CHIPS = 12  # Classes named below an image.


def article(
  kind: str,
  rank: int,
  shown: ScoredImage,
  sample: Mapping[str, Any],
  labels: LabelSet,
) -> str:
  """The HTML of an image of the split: ground truth, prediction and errors."""
  classes, palette = labels.classes, labels.palette
  prediction, label = shown.prediction, sample['label']
  confusion = metrics.confusion_matrix(prediction, label, len(classes))
  intersection, union = metrics.intersection_and_union(confusion)
  # For the photograph alone: in maps averaging and JPEG would invent colours.
  image = drawing.fit(sample['image'], BOX, smooth=True)
  maps = {
    'ground truth': drawing.colour(label, palette),
    'prediction': drawing.colour(prediction, palette),
    'errors': drawing.error_map(prediction, label),
  }
  parts = {'image': data_uri(image, '.jpg')} | {
    caption: data_uri(drawing.fit(picture, BOX), '.png')
    for caption, picture in maps.items()
  }
  figures = ''.join(
    _figure(sample['name'], *part, image.shape[:2]) for part in parts.items()
  )
  # Stable: classes of equal size keep their order on every machine.
  largest = np.argsort(-union, kind='stable')[:MOST_CHIPS]
  chips = ''.join(
    f'<li>{named(palette[i], classes[i])} IoU '
    f'{100 * intersection[i] / union[i]:.1f}</li>'
    for i in largest[union[largest] > 0]
  )
  right = metrics.scores(confusion).aAcc
  head = (
    f'<strong>{rank}. {escape(sample["name"])}</strong>'
    f'<span>mIoU {100 * shown.score:.2f}</span>'
    f'<span class="muted">{right:.1%} of pixels right</span>'
  )
  return _shown(kind, head, figures, 'IoU of its largest classes', chips)


def data_uri(picture: np.ndarray, ending: str) -> str:
  """An RGB picture encoded as '.jpg' or '.png', as a data URI."""
  kind, options = {
    '.jpg': ('jpeg', [cv2.IMWRITE_JPEG_QUALITY, 85]),
    '.png': ('png', [cv2.IMWRITE_PNG_COMPRESSION, 9]),
  }[ending]
  encoded = drawing.encoded(ending, picture, *options)
  return f'data:image/{kind};base64,{base64.b64encode(encoded).decode()}'


def section(pictures: Mapping[str, Sequence[str]], images: int) -> str:
  """The HTML of the worst and the best images, of the `article` of each."""
  if not any(pictures.values()):
    why = 'None was asked for.' if images else 'There are none.'
    return f'<p class="note">{why}</p>'
  content = [
    '<p class="muted">By their own mIoU. In the errors, wrong pixels are red '
    'and those without a label grey blue; in the ground truth these are '
    'black.</p>'
  ]
  for kind, shown in pictures.items():
    if shown:
      content += [f'<h3>{kind.capitalize()}</h3>', *shown]
  return ''.join(content)


def _figure(name: str, caption: str, uri: str, size: tuple[int, int]) -> str:
  # With sizes the page does not jump while it loads.
  return (
    f'<figure><button type="button" aria-label="enlarge: {caption}">'
    f'<img src="{uri}" alt="{escape(name)}: {caption}" width="{size[1]}" '
    f'height="{size[0]}"></button><figcaption>{caption}</figcaption></figure>'
  )


def _shown(kind: str, head: str, figures: str, what: str, chips: str) -> str:
  return (
    f'<article class="shown" data-kind="{kind}"><header>{head}</header>'
    f'<div class="four">{figures}</div>'
    f'<ul class="chips" aria-label="{what}">{chips}</ul></article>'
  )


def mistake(image: np.ndarray, facts: Mapping[str, Any]) -> str:
  """The HTML of a wrongly classified image, by its entry in metrics.json."""
  image = drawing.fit(image, BOX, smooth=True)
  figure = _figure(
    facts['name'], 'image', data_uri(image, '.jpg'), image.shape[:2]
  )
  chips = ''.join(
    f'<li>{escape(label)} {100 * probability:.1f} %</li>'
    for label, probability in facts['best']
  )
  head = (
    f'<strong>{escape(facts["name"])}</strong>'
    f'<span>{escape(facts["class"])}, taken for '
    f'{escape(facts["best"][0][0])}</span>'
  )
  return _shown('worst', head, figure, 'most probable classes', chips)


def full_legend(classes: Sequence[str], palette: np.ndarray) -> str:
  """The HTML of all classes with their colours."""
  entries = ''.join(
    f'<li>{named(colour, name)}</li>'
    for name, colour in zip(classes, palette, strict=True)
  )
  return f'<ul class="legend">{entries}</ul>'
