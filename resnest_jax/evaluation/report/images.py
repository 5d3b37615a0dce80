"""The pictures of the report, embedded in the page."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from resnest_jax import drawing
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.ranked_images import ScoredImage
from resnest_jax.evaluation.report.parts import named
from resnest_jax.labels import LabelSet

BOX = (480, 640)  # Height and width in pixels into which pictures are fitted.
MOST_CHIPS = 12  # Classes named below an image.


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image of the split as the page shows it."""

  name: str
  score: float  # Its own mIoU.
  right: float  # Share of its labelled pixels that are right.
  parts: Mapping[str, str]  # Caption -> data URI, from image to errors.
  size: tuple[int, int]  # Height and width of each part in pixels.
  classes: Sequence[tuple[str, np.ndarray, float]]  # Name, colour, IoU.


def make_picture(
  shown: ScoredImage, sample: Mapping[str, Any], labels: LabelSet
) -> Picture:
  """Image, ground truth, prediction and errors of a sample of the split."""
  classes, palette = labels.classes, labels.palette
  prediction, label = shown.prediction, sample['label']
  confusion = metrics.confusion_matrix(prediction, label, len(classes))
  intersection, union = metrics.intersection_and_union(confusion)
  # Stable: classes of equal size keep their order on every machine.
  largest = np.argsort(-union, kind='stable')[:MOST_CHIPS]
  maps = {
    'ground truth': drawing.colour(label, palette),
    'prediction': drawing.colour(prediction, palette),
    'errors': drawing.error_map(prediction, label),
  }
  # For the photograph alone: in maps averaging and JPEG would invent colours.
  image = drawing.fit(sample['image'], BOX, smooth=True)
  parts = {'image': data_uri(image, '.jpg')}
  for caption, picture in maps.items():
    parts[caption] = data_uri(drawing.fit(picture, BOX), '.png')
  return Picture(
    name=sample['name'],
    score=shown.score,
    right=metrics.scores(confusion).aAcc,
    parts=parts,
    size=image.shape[:2],
    classes=[
      (classes[i], palette[i], intersection[i] / union[i])
      for i in largest[union[largest] > 0]
    ],
  )


def data_uri(picture: np.ndarray, ending: str) -> str:
  """An RGB picture encoded as '.jpg' or '.png', as a data URI."""
  kind, options = {
    '.jpg': ('jpeg', [cv2.IMWRITE_JPEG_QUALITY, 85]),
    '.png': ('png', [cv2.IMWRITE_PNG_COMPRESSION, 9]),
  }[ending]
  encoded = drawing.encoded(ending, picture, *options)
  return f'data:image/{kind};base64,{base64.b64encode(encoded).decode()}'


def section(pictures: Mapping[str, Sequence[Picture]], images: int) -> str:
  """The HTML of the worst and the best images."""
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
      content.append(f'<h3>{kind.capitalize()}</h3>')
      content += [_article(kind, *item) for item in enumerate(shown, 1)]
  return ''.join(content)


def _figure(name: str, caption: str, uri: str, size: tuple[int, int]) -> str:
  # With sizes the page does not jump while it loads.
  return (
    f'<figure><button type="button" aria-label="enlarge: {caption}">'
    f'<img src="{uri}" alt="{escape(name)}: {caption}" width="{size[1]}" '
    f'height="{size[0]}"></button><figcaption>{caption}</figcaption></figure>'
  )


def _article(kind: str, rank: int, picture: Picture) -> str:
  name = escape(picture.name)
  figures = ''.join(
    _figure(picture.name, *part, picture.size) for part in picture.parts.items()
  )
  chips = ''.join(
    f'<li>{named(colour, label)} IoU {100 * iou:.1f}</li>'
    for label, colour, iou in picture.classes
  )
  return (
    f'<article class="shown" data-kind="{kind}"><header>'
    f'<strong>{rank}. {name}</strong>'
    f'<span>mIoU {100 * picture.score:.2f}</span>'
    f'<span class="muted">{picture.right:.1%} of pixels right</span></header>'
    f'<div class="four">{figures}</div>'
    f'<ul class="chips" aria-label="IoU of its largest classes">{chips}</ul>'
    '</article>'
  )


def mistake(image: np.ndarray, facts: Mapping[str, Any]) -> str:
  """The HTML of a wrongly classified image, by its entry in metrics.json."""
  image = drawing.fit(image, BOX, smooth=True)
  uri, name = data_uri(image, '.jpg'), facts['name']
  chips = ''.join(
    f'<li>{escape(name)} {100 * probability:.1f} %</li>'
    for name, probability in facts['best']
  )
  return (
    f'<article class="shown"><header><strong>{escape(name)}</strong>'
    f'<span>{escape(facts["class"])}</span></header><div class="four">'
    f'{_figure(name, "image", uri, image.shape[:2])}</div>'
    f'<ul class="chips" aria-label="most probable classes">{chips}</ul>'
    '</article>'
  )


def full_legend(classes: Sequence[str], palette: np.ndarray) -> str:
  """The HTML of all classes with their colours."""
  entries = ''.join(
    f'<li>{named(colour, name)}</li>'
    for name, colour in zip(classes, palette, strict=True)
  )
  return f'<ul class="legend">{entries}</ul>'
