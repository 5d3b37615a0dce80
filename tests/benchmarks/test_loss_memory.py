"""`benchmarks/loss_memory.py`, and what it says at the rows' size."""

import json

import pytest
from bare import on_a_bare_machine

from benchmarks.loss_memory import WAYS, temporary_bytes


def test_measures_on_a_bare_machine(run_script, tmp_path):
  process = run_script(
    *on_a_bare_machine('benchmarks/loss_memory.py'),
    *('--smoke', '--out', tmp_path),
  )
  (path,) = tmp_path.glob('smoke-loss_memory-*.json')
  result = json.loads(path.read_text())
  tiled, plain = result['temporary_bytes'].values()
  assert result['ratio'] == pytest.approx(plain / tiled)
  # Upsampled logits of 2 x 64 x 64 pixels and 10 classes are there for sure.
  assert plain > 4 * 2 * 64 * 64 * 10
  assert set(result['seconds']) == set(WAYS)
  assert 'times as much memory' in process.stdout
  assert path.with_suffix('.png').exists()


def test_tiles_need_an_eighth_of_the_memory():
  """At the rows' batch, crop and classes; compiled, not run."""
  tiled, plain = (temporary_bytes(loss, 16, 512, 150) for loss in WAYS.values())
  logits = 4 * 16 * 512 * 512 * 150
  assert plain > logits
  assert tiled <= plain / 8
