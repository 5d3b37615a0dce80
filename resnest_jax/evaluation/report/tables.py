"""The tables of the report, of scores and of confusions, and their words."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from resnest_jax import text

MOST_CONFUSIONS = 16  # In the list next to the matrix.
UNDEFINED = '<span class="none">&ndash;</span>'
percent = functools.partial(text.percent, undefined='\N{EN DASH}')


def numbered(number: int, noun: str) -> str:
  """Returns '1 image', '1,234 images'."""
  return f'{number:,} {noun}{"" if number == 1 else "s"}'


def named(colour: np.ndarray, name: str) -> str:
  """The HTML of a name after a small square in its RGB colour."""
  style = f'background:rgb({",".join(map(str, colour.tolist()))})'
  return f'<span class="swatch" style="{style}"></span>{escape(name)}'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a task's tables of classes show."""

  total: str  # Key of the main score of all classes, with an interval.
  unit: str  # 'pixel' or 'image'; in the plural a key of each class.
  columns: Mapping[str, str]  # Key of each class -> heading, the main first.
  foot: str  # Name of the last row.
  means: Mapping[str, float]  # Its scores.

  @property
  def main(self) -> str:
    return next(iter(self.columns))


def plan(result: Mapping[str, Any]) -> Plan:
  """Of the content of metrics.json."""
  if 'top1' in result:
    means = {'top1': result['top1']}
    return Plan('top1', 'image', {'top1': 'Top-1'}, 'all', means)
  # Recall is left out, as Acc equals it.
  columns = {key: key for key in ('IoU', 'Acc', 'Precision', 'Dice')}
  means = dict(result['mean'])
  if result['fscore_beta'] != 1:
    columns['Fscore'] = f'F{result["fscore_beta"]:g}'
  if result['boundary']:
    columns['BoundaryIoU'] = 'Boundary IoU'
    means['BoundaryIoU'] = result['boundary']['mIoU']
  foot = f'mean of {result["classes_averaged"]}'
  return Plan('mIoU', 'pixel', columns, foot, means)


def described(interval: Mapping[str, Any]) -> str:
  """How an interval of metrics.json was found."""
  if 'resamples' in interval:
    samples = f'{interval["resamples"]} bootstrap samples'
    return f'{interval["level"]:.0%} of {samples}'
  return f"Wilson's interval of {interval['level']:.0%}"


def class_table(
  result: Mapping[str, Any],
  confusion: np.ndarray,
  palette: np.ndarray | None = None,
) -> str:
  """The HTML of all scores: a row for each class, and a last one.

  `result` is the content of metrics.json, `palette` has the names' colours.
  """
  of, entries = plan(result), result['per_class']
  kinds = dict.fromkeys(('Class', 'Mostly taken for'), ' class="text"')
  head = ''.join(
    f'<th scope="col" data-type="{"text" if title == "Class" else "number"}" '
    f'aria-sort="{"ascending" if title == "#" else "none"}"'
    f'{kinds.get(title, "")}><button type="button">{title}</button></th>'
    for title in (
      *('#', 'Class', *of.columns.values()),
      *(f'{of.unit.capitalize()}s', 'Mostly taken for'),
    )
  )
  choice = ''
  if unscored := sum(entry[of.main] is None for entry in entries):
    # Hidden at first if they would bury the others.
    many = len(entries) / 2 < unscored < len(entries)
    choice = (
      f'<label><input id="scored" type="checkbox"{" checked" * many}> only '
      'classes with a score</label>'
    )
  rows = [
    _row(i, of, counts, entries, palette) for i, counts in enumerate(confusion)
  ]
  means = ''.join(f'<td>{percent(of.means[key])}</td>' for key in of.columns)
  return (
    '<p class="muted">Scores in percent. A heading sorts by its column, and '
    'again the other way round.</p>'
    '<div class="tools"><label>Filter <input id="filter" type="search" '
    f'placeholder="name of a class" autocomplete="off"></label>{choice}'
    '<span id="filtered" class="muted" role="status"></span></div>'
    '<div class="scroll" tabindex="0" role="region" aria-label="Classes">'
    f'<table id="class-table"><thead><tr>{head}</tr></thead>'
    f'<tbody>{"".join(rows)}</tbody><tfoot><tr><td></td>'
    f'<th scope="row" class="text">{of.foot}</th>'
    f'{means}<td>{confusion.sum():,}</td><td></td></tr></tfoot></table></div>'
  )


def _row(
  index: int,
  of: Plan,
  counts: np.ndarray,
  per_class: Sequence[Mapping[str, Any]],
  palette: np.ndarray | None,
) -> str:
  # page.js sorts by data-value, which has all digits; '' sorts last.
  entry = per_class[index]
  name, number = entry['class'], entry[f'{of.unit}s']
  shown = escape(name) if palette is None else named(palette[index], name)
  cells = [
    f'<td data-value="{index}">{index}</td>',
    f'<th scope="row" class="text" data-value="{escape(name)}" '
    f'title="{escape(name)}">{shown}</th>',
  ]
  for key in of.columns:
    value = entry[key]
    bar = ''
    if key == of.main:
      width = 0 if value is None else 100 * value
      bar = f'<span class="bar"><i style="width:{width:.1f}%"></i></span>'
    shown = UNDEFINED if value is None else percent(value)
    sorted_by = '' if value is None else repr(value)
    cells.append(f'<td data-value="{sorted_by}">{shown}{bar}</td>')
  cells.append(f'<td data-value="{number}">{number:,}</td>')
  others = counts.copy()
  others[index] = 0  # The diagonal: these pixels are right.
  worst = others.argmax()
  share, taken = '', UNDEFINED
  if others[worst]:
    share = float(others[worst] / counts.sum())
    taken = f'{escape(per_class[worst]["class"])} {percent(share, 1)} %'
  cells.append(f'<td class="text" data-value="{share}">{taken}</td>')
  mark = ' data-unscored' if entry[of.main] is None else ''
  return f'<tr{mark}>{"".join(cells)}</tr>'


def confusions(
  confusion: np.ndarray,
  occurring: np.ndarray,
  classes: Sequence[str],
  unit: str,
) -> str:
  """The HTML of the matrix, which page.js draws, and of its largest errors."""
  if not occurring.size:
    return f'<p class="note">No {unit} was counted.</p>'
  without = ''
  if left_out := len(classes) - len(occurring):
    without = f' {text.plural(left_out, "class")} without any {unit} left out.'
  return (
    '<p class="muted">A row is a class of the ground truth, a column what was '
    f'predicted; each row adds up to 100 %.{without}</p>'
    '<div class="split"><div>'
    '<div class="tools"><span class="ramps"><span>right 0<i class="ramp r">'
    '</i>100 %</span><span>wrong 0<i class="ramp w"></i>100 %</span></span>'
    '<label>Size <input id="zoom" type="range" min="3" '
    'max="44" value="6"></label></div>'
    '<div class="heat"><div class="heat-grid">'
    '<div class="corner">predicted &rarr;<br>ground truth &darr;</div>'
    '<div class="columns" aria-hidden="true"></div>'
    '<div class="rows" aria-hidden="true"></div>'
    '<div class="matrix"><canvas id="heat" tabindex="0" role="img" '
    'aria-label="Confusion matrix; the arrow keys go from cell to cell">'
    '</canvas></div></div></div>'
    '<noscript><p class="note">The matrix needs JavaScript.</p></noscript>'
    '</div><div><h3>Most frequent confusions</h3>'
    f'{_confusion_list(confusion, occurring, classes, unit)}</div></div>'
  )


def _confusion_list(
  confusion: np.ndarray,
  occurring: np.ndarray,
  classes: Sequence[str],
  unit: str,
) -> str:
  # By counts: sorted by share, rare classes would fill the list.
  wrong = confusion - np.diag(np.diagonal(confusion))
  order = np.argsort(-wrong, axis=None, kind='stable')[:MOST_CONFUSIONS]
  # The matrix on the page has only the classes that occur.
  place = {index: i for i, index in enumerate(occurring)}
  entries = []
  for r, c in zip(*np.unravel_index(order, wrong.shape), strict=True):
    if not wrong[r, c]:
      break
    share = wrong[r, c] / confusion[r].sum()
    entries.append(
      f'<li><button type="button" data-row="{place[r]}" '
      f'data-column="{place[c]}"><span>{escape(classes[r])} &rarr; '
      f'{escape(classes[c])}</span><b>{numbered(wrong[r, c], unit)}</b>'
      f'<small>{percent(share, 1)} % of {escape(classes[r])}</small>'
      '</button></li>'
    )
  if not entries:
    return f'<p>None: every {unit} is right.</p>'
  return f'<ol class="confusions">{"".join(entries)}</ol>'
