"""The reliability diagrams of the report: how often a sure guess is right."""

from collections.abc import Mapping
from typing import Any

from resnest_jax.evaluation.report.tables import numbered, percent


def section(result: Mapping[str, Any], unit: str) -> str:
  """The HTML of `calibration` in metrics.json, '' without; of 'pixel's, say."""
  if not (found := result.get('calibration')):
    return ''
  titles = {'before': 'As trained', 'after': 'With the temperature'}
  diagrams = (_diagram(titles[x], found[x], unit) for x in titles)
  return (
    f'<p>Logits divided by the temperature {found["temperature"]:.4g} have '
    'the least negative log likelihood (NLL) on this split.</p>'
    f'<div class="diagrams">{"".join(diagrams)}</div><p class="muted">A bar is '
    f'the share of {unit}s that are right, of those whose class has a '
    'probability in its range, in percent. On the line they are equal; ECE is '
    'the mean distance from it.</p>'
  )


def _diagram(title: str, errors: Mapping[str, Any], unit: str) -> str:
  width, bars = 100 / len(errors['bins']), ''
  for i, each in enumerate(errors['bins']):
    if each['count']:
      right, sure = each['accuracy'], percent(each['confidence'])
      bars += (
        f'<rect x="{width * i:.2f}" y="{100 - 100 * right:.2f}" '
        f'width="{width - 0.5:.2f}" height="{100 * right:.2f}"><title>'
        f'{numbered(each["count"], unit)} of mean probability {sure}, of which '
        f'{percent(right)} % are right</title></rect>'
      )
  said = f'ECE {percent(errors["ECE"])}, NLL {errors["NLL"]:.4f}'
  return (
    f'<div><h3>{title}</h3><svg class="histogram" viewBox="0 0 100 100" '
    f'role="img" aria-label="Reliability, {title}: {said}">{bars}'
    '<path d="M0 100L100 0"/></svg><div class="axis"><span>0</span>'
    f'<span>50</span><span>100</span></div><p class="muted">{said}</p></div>'
  )
