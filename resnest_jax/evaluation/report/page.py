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
import math
import string
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from resnest_jax import files
from resnest_jax.config_keys import CLASSIFIER
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.report import images, reliability, tables
from resnest_jax.evaluation.report.tables import numbered, percent
from resnest_jax.text import listed
from resnest_jax.weights.infer import title_of

NAME = 'report.html'
_MAIN = {'mIoU': 'mIoU', 'top1': 'Top-1'}


def write(
  path: Path,
  result: Mapping[str, Any],
  confusion: np.ndarray,
  pictures: str,
  image_counts: np.ndarray | None = None,
  palette: np.ndarray | None = None,
) -> None:
  """Writes the whole page or nothing.

  `result` is the content of metrics.json, `pictures` are HTML. The last two are
  of segmentors alone: `Evaluation.image_counts`, and the classes' colours.
  """
  plan = tables.plan(result)
  classes = [entry['class'] for entry in result['per_class']]
  # Of 150 classes a small split may have 20; the matrix has no others.
  occurring = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
  confusions = tables.confusions(confusion, occurring, classes, plan.unit)
  sections = {
    'Scores': headline(result)
    + ('' if image_counts is None else _histogram(image_counts)),
    'Calibration': reliability.section(result, plan.unit),
    'Classes': tables.class_table(result, confusion, palette),
    'Confusions': confusions,
    'Mistakes' if palette is None else 'Images': pictures,
    'Legend': '' if palette is None else images.full_legend(classes, palette),
    'Details': details(result, confusion),
  }
  sections = {title: content for title, content in sections.items() if content}
  # The Content-Security-Policy admits the script by its hash: another, smuggled
  # in by a name, would not run even if escaping failed.
  script = _part('page.js')
  digest = hashlib.sha256(script.encode()).digest()
  model, data = result['model'], result['data']
  subtitle = (
    f'{model.get("head", CLASSIFIER)} on {title_of(model)}',
    f'{data["split"]} split of {data["name"]}',
    numbered(result['images'], 'image'),
    f'protocol {result["protocol"]["name"]}',
    _date(result['date']),
  )
  name = result['config'] or Path(result['checkpoint']).name
  page = string.Template(_part('page.html')).substitute(
    title=escape(f'{name}: {_MAIN[plan.total]} {percent(result[plan.total])}'),
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
      names=[classes[i] for i in occurring],
      counts=confusion[np.ix_(occurring, occurring)].tolist(),
      unit=plan.unit,
    ),
  )
  files.write_text(path, page)


def _part(name: str) -> str:
  folder = importlib.resources.files(__package__)
  return folder.joinpath(name).read_text('utf-8')


def _json_in_html(**content: Any) -> str:
  # A class named '</script>' would end the element that holds the JSON. These
  # three characters occur only in strings, where \uXXXX stands for them.
  text = json.dumps(content, separators=(',', ':'))
  return text.translate({ord(x): f'\\u{ord(x):04x}' for x in '<>&'})


def _date(text: str) -> str:
  return datetime.datetime.fromisoformat(text).strftime('%Y-%m-%d %H:%M %Z')


def headline(result: Mapping[str, Any]) -> str:
  """The HTML of the scores and of the interval of the main one."""
  main = tables.plan(result).total
  if main == 'top1':
    cards = {'Top-5': percent(result['top5'])} if 'top5' in result else {}
  else:
    mean, scores = result['mean'], {x: result[x] for x in ('mAcc', 'aAcc')}
    if 'mIoU_all_classes' in result:
      scores['mIoU of all classes'] = result['mIoU_all_classes']
    scores |= {f'm{key}': mean[key] for key in ('Dice', 'Precision')}
    # With beta 1 it is the same number as mDice.
    if result['fscore_beta'] != 1:
      scores[f'mFscore, beta {result["fscore_beta"]:g}'] = mean['Fscore']
    if result['boundary']:
      scores['Boundary mIoU'] = result['boundary']['mIoU']
    cards = {title: percent(score) for title, score in scores.items()}
    averaged = f'{result["classes_averaged"]} of {len(result["per_class"])}'
    cards['Classes in the mean'] = averaged
  cards['Images'] = f'{result["images"]:,}'
  interval, bar = result[f'{main}_interval'], ''
  low, high = interval['low'], interval['high']
  if low is not None:
    note = (
      f'<p class="muted">In percent. The interval is where {_MAIN[main]} lies '
      f'on other images like these: {tables.described(interval)}.</p>'
    )
    bar = (
      '<dd class="small"><div class="interval">'
      f'<i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
      f'<b style="left:{100 * result[main]:.2f}%"></b></div>'
      f'{interval["level"]:.0%} interval {percent(low)} to {percent(high)}</dd>'
    )
  elif not result['images']:
    note = '<p class="note">The split has no images: nothing to score.</p>'
  else:
    note = '<p class="note">No pixel has a label: nothing to score.</p>'
  card = _card(_MAIN[main], percent(result[main]), bar, 'main')
  return (
    f'<div class="cards"><dl>{card}</dl><dl class="more">'
    f'{"".join(_card(*item) for item in cards.items())}</dl></div>{note}'
  )


def _card(title: str, value: str, more: str = '', kind: str = '') -> str:
  return (
    f'<div class="card {kind}"><dt>{escape(title)}</dt>'
    f'<dd>{escape(value)}</dd>{more}</div>'
  )


def _histogram(image_counts: np.ndarray) -> str:
  # Images without a labelled pixel have no mIoU.
  scores = map(metrics.own_score, image_counts)
  known = [score for score in scores if not math.isnan(score)]
  if not known:
    return ''
  counts, edges = np.histogram(known, bins=25, range=(0, 1))
  bars = []
  for i, count in enumerate(counts):
    height = 100 * count / counts.max()
    told = f'{percent(edges[i], 0)} to {percent(edges[i + 1], 0)}'
    bars.append(
      f'<rect x="{4 * i + 0.2:.1f}" y="{100 - height:.2f}" width="3.6" '
      f'height="{height:.2f}"><title>{told}: {numbered(count, "image")}'
      '</title></rect>'
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


def details(result: Mapping[str, Any], confusion: np.ndarray) -> str:
  """The HTML of all that the scores depend on."""
  where = ('config', 'checkpoint', 'step', 'file', 'sha256')
  how = ('batch_size', 'bucket', 'dtype', 'seconds', 'devices')
  seconds, plan = result['seconds'], tables.plan(result)
  absent = listed(result['classes_absent'], 12)
  counted = {'classes without an image': absent}
  if plan.unit == 'pixel':
    counted = {
      'labelled pixels': f'{int(confusion.sum()):,}',
      'classes without a pixel': absent,
    }
  groups = {
    'Weights': {key: result.get(key) for key in where},
    'Data': {**result['data'], 'images': f'{result["images"]:,}', **counted},
    'Protocol': result['protocol'],
    'Evaluation': {
      **{key: result.get(key) for key in how},
      'images/s': f'{result["images"] / seconds:.3g}' if seconds else None,
      'date': _date(result['date']),
      'fscore_beta': result.get('fscore_beta'),
    },
    f'Interval of {plan.total}': result[f'{plan.total}_interval'],
    'Boundary IoU': result.get('boundary') or {},
    'Model': result['model'],
    'Versions': result['versions'],
  }
  content = []
  for title, facts in groups.items():
    pairs = ''.join(
      f'<dt>{escape(key.replace("_", " "))}</dt>'
      f'<dd>{escape(_value(value))}</dd>'
      for key, value in facts.items()
      # Some keys do not apply: published weights have no step, runs no file.
      if value not in (None, '')
    )
    if pairs:
      content.append(f'<div><h3>{title}</h3><dl>{pairs}</dl></div>')
  return f'<div class="facts">{"".join(content)}</div>'


def _value(value: Any) -> str:
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, (list, tuple)):
    return ', '.join(_value(x) for x in value)
  return f'{value:g}' if isinstance(value, float) else str(value)
