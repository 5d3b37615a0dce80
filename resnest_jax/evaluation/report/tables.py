"""The tables of the report: scores of the classes, and confusions."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from resnest_jax.evaluation.report.parts import UNDEFINED, named, percent
from resnest_jax.text import plural

MOST_CONFUSIONS = 16  # In the list next to the matrix.


def pixel_table(
  result: Mapping[str, Any], confusion: np.ndarray, palette: np.ndarray
) -> str:
  """The `class_table` of a segmentor."""
  # Recall is left out, as Acc equals it.
  columns = {key: key for key in ('IoU', 'Acc', 'Precision', 'Dice')}
  means = dict(result['mean'])
  if result['fscore_beta'] != 1:
    columns['Fscore'] = f'F{result["fscore_beta"]:g}'
  if result['boundary']:
    columns['BoundaryIoU'] = 'Boundary IoU'
    means['BoundaryIoU'] = result['boundary']['mIoU']
  foot = f'mean of {result["classes_averaged"]}', means
  return class_table(result['per_class'], columns, foot, confusion, palette)


def class_table(
  entries: Sequence[Mapping[str, Any]],
  columns: Mapping[str, str],
  foot: tuple[str, Mapping[str, float]],
  confusion: np.ndarray,
  palette: np.ndarray | None = None,
  unit: str = 'pixels',
) -> str:
  """The HTML of all scores: a row for each class, and a last one.

  Args:
    entries: of each class, from metrics.json.
    columns: their key -> heading; the first score is the main one.
    foot: name of the last row, and its scores.
    confusion: int (C, C).
    palette: colours shown with the names.
    unit: what is counted, a key of `entries`.
  """
  text = dict.fromkeys(('Class', 'Mostly taken for'), ' class="text"')
  head = ''.join(
    f'<th scope="col" data-type="{"text" if title == "Class" else "number"}" '
    f'aria-sort="{"ascending" if title == "#" else "none"}"'
    f'{text.get(title, "")}><button type="button">{title}</button></th>'
    for title in (
      *('#', 'Class', *columns.values(), unit.capitalize()),
      'Mostly taken for',
    )
  )
  choice, main = '', next(iter(columns))
  if unscored := sum(entry[main] is None for entry in entries):
    # Hidden at first if they would bury the others.
    many = len(entries) / 2 < unscored < len(entries)
    choice = (
      f'<label><input id="scored" type="checkbox"{" checked" * many}> only '
      'classes with a score</label>'
    )
  rows = [
    _row(i, columns, counts, entries, unit, palette)
    for i, counts in enumerate(confusion)
  ]
  means = ''.join(f'<td>{percent(foot[1][key])}</td>' for key in columns)
  return (
    '<p class="muted">Scores in percent. A heading sorts by its column, and '
    'again the other way round.</p>'
    '<div class="tools"><label>Filter <input id="filter" type="search" '
    f'placeholder="name of a class" autocomplete="off"></label>{choice}'
    '<span id="filtered" class="muted" role="status"></span></div>'
    '<div class="scroll" tabindex="0" role="region" aria-label="Classes">'
    f'<table id="class-table"><thead><tr>{head}</tr></thead>'
    f'<tbody>{"".join(rows)}</tbody><tfoot><tr><td></td>'
    f'<th scope="row" class="text">{foot[0]}</th>'
    f'{means}<td>{confusion.sum():,}</td><td></td></tr></tfoot></table></div>'
  )


def _row(
  index: int,
  columns: Iterable[str],
  counts: np.ndarray,
  per_class: Sequence[Mapping[str, Any]],
  unit: str,
  palette: np.ndarray | None,
) -> str:
  # page.js sorts by data-value, which has all digits; '' sorts last.
  entry = per_class[index]
  name, main = entry['class'], next(iter(columns))
  shown = escape(name) if palette is None else named(palette[index], name)
  cells = [
    f'<td data-value="{index}">{index}</td>',
    f'<th scope="row" class="text" data-value="{escape(name)}" '
    f'title="{escape(name)}">{shown}</th>',
  ]
  for key in columns:
    value = entry[key]
    bar = ''
    if key == main:
      width = 0 if value is None else 100 * value
      bar = f'<span class="bar"><i style="width:{width:.1f}%"></i></span>'
    shown = UNDEFINED if value is None else percent(value)
    sorted_by = '' if value is None else repr(value)
    cells.append(f'<td data-value="{sorted_by}">{shown}{bar}</td>')
  cells.append(f'<td data-value="{entry[unit]}">{entry[unit]:,}</td>')
  others = counts.copy()
  others[index] = 0  # The diagonal: these pixels are right.
  worst = others.argmax()
  share, taken = '', UNDEFINED
  if others[worst]:
    share = float(others[worst] / counts.sum())
    taken = f'{escape(per_class[worst]["class"])} {percent(share, 1)} %'
  cells.append(f'<td class="text" data-value="{share}">{taken}</td>')
  mark = ' data-unscored' if entry[main] is None else ''
  return f'<tr{mark}>{"".join(cells)}</tr>'


def confusions(
  confusion: np.ndarray,
  occurring: np.ndarray,
  classes: Sequence[str],
  unit: str = 'pixel',
) -> str:
  """The HTML of the matrix, which page.js draws, and of its largest errors."""
  if not occurring.size:
    return f'<p class="note">No {unit} was counted.</p>'
  without = ''
  if left_out := len(classes) - len(occurring):
    without = f' {plural(left_out, "class")} without any {unit} left out.'
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
      f'{escape(classes[c])}</span><b>{wrong[r, c]:,} {unit}s</b>'
      f'<small>{percent(share, 1)} % of {escape(classes[r])}</small>'
      '</button></li>'
    )
  if not entries:
    return f'<p>None: every {unit} is right.</p>'
  return f'<ol class="confusions">{"".join(entries)}</ol>'
