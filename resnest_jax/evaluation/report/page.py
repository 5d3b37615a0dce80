"""Puts the report together, from page.html, page.css, page.js and results.

Text from data (names of classes, images, paths) is escaped, and the page's
policy forbids it to load anything or to run another script. Only the confusion
matrix needs JavaScript.
"""

import base64
import datetime
import hashlib
import importlib.resources
import json
import string
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from resnest_jax import files
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.report import images, tables
from resnest_jax.evaluation.report.parts import percent
from resnest_jax.text import listed
from resnest_jax.weights.infer import title_of

NAME = 'report.html'


def write(
  path: Path,
  result: Mapping[str, Any],
  confusion: np.ndarray,
  image_counts: np.ndarray,
  pictures: Mapping[str, Sequence[images.Picture]],
  palette: np.ndarray,
) -> None:
  """Writes the whole page or nothing.

  `result` is the content of metrics.json; `confusion` and `image_counts` are as
  in `Evaluation`, `pictures` as from `make_pictures`.
  """
  page = render(result, confusion, image_counts, pictures, palette)
  files.write_text(path, page)


def render(
  result: Mapping[str, Any],
  confusion: np.ndarray,
  image_counts: np.ndarray,
  pictures: Mapping[str, Sequence[images.Picture]],
  palette: np.ndarray,
) -> str:
  classes = [entry['class'] for entry in result['per_class']]
  # Only classes with pixels are in the matrix: of 150 in ADE20K a small split
  # may have 20, and the matrix is drawn and stored at this size.
  occurring = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
  sections = {
    'Scores': headline(
      result, np.array([metrics.own_score(x) for x in image_counts])
    ),
    'Classes': tables.class_table(result, confusion, palette),
    'Confusions': tables.confusions(confusion, occurring, classes),
    'Images': images.section(pictures, result['images']),
    'Legend': images.full_legend(classes, palette),
    'Details': details(result, confusion),
  }
  # The page's Content-Security-Policy admits the script by its hash, so that a
  # script smuggled in by a name would not run even if escaping failed.
  script = _part('page.js')
  digest = hashlib.sha256(script.encode()).digest()
  model, data = result['model'], result['data']
  subtitle = (
    f'{model["head"]} on {title_of(model)}',
    f'{data["split"]} split of {data["name"]}',
    f'{result["images"]:,} images',
    f'protocol {result["protocol"]["name"]}',
    _date(result['date']),
  )
  name = result['config'] or Path(result['checkpoint']).name
  return string.Template(_part('page.html')).substitute(
    title=escape(f'{name}: mIoU {percent(result["mIoU"])}'),
    heading=escape(name),
    subtitle=escape(' · '.join(subtitle)),
    links=''.join(
      f'<a href="#{title.lower()}">{title}</a>' for title in sections
    ),
    sections='\n'.join(
      f'<section id="{title.lower()}"><h2>{title}</h2>{content}</section>'
      for title, content in sections.items()
    ),
    footer=escape(f'resnest-jax {result["versions"]["resnest-jax"]}'),
    style=_part('page.css'),
    script=script,
    script_hash=base64.b64encode(digest).decode(),
    data=_json_in_html(
      {
        'names': [classes[i] for i in occurring],
        'counts': confusion[np.ix_(occurring, occurring)].tolist(),
      }
    ),
  )


def _part(name: str) -> str:
  folder = importlib.resources.files(__package__)
  return folder.joinpath(name).read_text('utf-8')


def _json_in_html(content: Any) -> str:
  # A class named '</script>' would end the element that holds the JSON. These
  # three characters occur only in strings, where \uXXXX stands for them.
  text = json.dumps(content, separators=(',', ':'))
  for character in '<>&':
    text = text.replace(character, f'\\u{ord(character):04x}')
  return text


def _date(text: str) -> str:
  moment = datetime.datetime.fromisoformat(text)
  return moment.strftime('%Y-%m-%d %H:%M %Z')


# --- Scores ------------------------------------------------------------------


def headline(result: Mapping[str, Any], image_scores: np.ndarray) -> str:
  """The HTML of the means, the interval and the images' own mIoU."""
  interval, mean = result['mIoU_interval'], result['mean']
  cards = [_card(key, percent(result[key])) for key in ('mAcc', 'aAcc')]
  cards += [
    _card(f'm{key}', percent(mean[key])) for key in ('Dice', 'Precision')
  ]
  # With beta 1 it is the same number as mDice.
  if result['fscore_beta'] != 1:
    title = f'mFscore, beta {result["fscore_beta"]:g}'
    cards.append(_card(title, percent(mean['Fscore'])))
  if result['boundary']:
    title = 'Boundary mIoU'
    cards.append(_card(title, percent(result['boundary']['mIoU'])))
  averaged = f'{result["classes_averaged"]} of {len(result["per_class"])}'
  cards.append(_card('Classes in the mean', averaged))
  cards.append(_card('Images', f'{result["images"]:,}'))
  main = _card('mIoU', percent(result['mIoU']), _interval(result), 'main')
  content = (
    f'<div class="cards"><dl>{main}</dl><dl class="more">{"".join(cards)}</dl>'
    '</div>'
  )
  if interval['low'] is not None:
    content += (
      '<p class="muted">In percent. The interval is where mIoU lies on other '
      f'images like these: {interval["level"]:.0%} of '
      f'{interval["resamples"]} bootstrap samples of the images.</p>'
    )
  elif not result['images']:
    content += '<p class="note">The split has no images: nothing to score.</p>'
  else:
    content += '<p class="note">No pixel has a label: nothing to score.</p>'
  return content + _histogram(image_scores)


def _card(title: str, value: str, more: str = '', kind: str = '') -> str:
  return (
    f'<div class="card {kind}"><dt>{escape(title)}</dt>'
    f'<dd>{escape(value)}</dd>{more}</div>'
  )


def _interval(result: Mapping[str, Any]) -> str:
  interval = result['mIoU_interval']
  low, high = interval['low'], interval['high']
  # None is a score that is not defined, as no pixel was counted.
  if low is None or result['mIoU'] is None:
    return ''
  return (
    f'<dd class="small"><div class="interval"><i style="left:{100 * low:.2f}%;'
    f'width:{100 * (high - low):.2f}%"></i>'
    f'<b style="left:{100 * result["mIoU"]:.2f}%"></b></div>'
    f'{interval["level"]:.0%} interval {percent(low)} to {percent(high)}</dd>'
  )


def _histogram(image_scores: np.ndarray, bins: int = 25) -> str:
  # Images without a labelled pixel have no mIoU.
  known = image_scores[~np.isnan(image_scores)]
  if not known.size:
    return ''
  counts, edges = np.histogram(known, bins=bins, range=(0, 1))
  bars = []
  for i, count in enumerate(counts):
    # Relative to the highest bar, which is as high as the picture.
    height = 100 * count / counts.max()
    told = f'{percent(edges[i], 0)} to {percent(edges[i + 1], 0)}: {count:,}'
    bars.append(
      f'<rect x="{4 * i + 0.2:.1f}" y="{100 - height:.2f}" width="3.6" '
      f'height="{height:.2f}"><title>{told} images</title></rect>'
    )
  median = percent(float(np.median(known)))
  return (
    '<h3>Images by their own mIoU</h3>'
    '<svg class="histogram" viewBox="0 0 100 100" preserveAspectRatio="none" '
    'role="img" aria-label="Histogram of the images\' own mIoU">'
    f'{"".join(bars)}</svg>'
    '<div class="axis"><span>0</span><span>25</span><span>50</span>'
    '<span>75</span><span>100</span></div>'
    f'<p class="muted">Median {median}. An image&rsquo;s own mIoU is the mean '
    'over the classes that it has or was given; mIoU above sums the pixels of '
    'all images first.</p>'
  )


# --- Details -----------------------------------------------------------------


def details(result: Mapping[str, Any], confusion: np.ndarray) -> str:
  """The HTML of all that the scores depend on."""
  where = ('config', 'checkpoint', 'step', 'file', 'sha256')
  how = ('batch_size', 'bucket', 'dtype', 'seconds', 'devices')
  seconds, interval = result['seconds'], dict(result['mIoU_interval'])
  speed = f'{result["images"] / seconds:.3g}' if seconds else None
  groups = {
    'Weights': {key: result.get(key) for key in where},
    'Data': {
      **result['data'],
      'images': f'{result["images"]:,}',
      'labelled pixels': f'{int(confusion.sum()):,}',
      'classes without a pixel': listed(result['classes_absent'], 12),
    },
    'Protocol': result['protocol'],
    'Evaluation': {
      **{key: result[key] for key in how},
      'images/s': speed,
      'date': _date(result['date']),
      'fscore_beta': result['fscore_beta'],
    },
    'Interval of mIoU': interval,
    'Boundary IoU': result['boundary'] or {},
    'Model': result['model'],
    'Versions': result['versions'],
  }
  content = []
  for title, facts in groups.items():
    known = {
      str(key).replace('_', ' '): _value(value)
      for key, value in facts.items()
      # Some keys do not apply: published weights have no step, runs no file.
      if value not in (None, '')
    }
    if known:
      pairs = ''.join(
        f'<dt>{escape(key)}</dt><dd>{escape(value)}</dd>'
        for key, value in known.items()
      )
      content.append(f'<div><h3>{title}</h3><dl>{pairs}</dl></div>')
  return f'<div class="facts">{"".join(content)}</div>'


def _value(value: Any) -> str:
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, (list, tuple)):
    return ', '.join(_value(x) for x in value)
  return f'{value:g}' if isinstance(value, float) else str(value)
