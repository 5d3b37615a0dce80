"""`benchmarks/long_run.py`: steps become neither slower nor larger."""

import json
import os

import pytest

from benchmarks.long_run import compare


def test_first_and_last_steps_are_compared_after_the_warm_up():
  rows = [
    {'step': step, 'milliseconds': step / 2, 'megabytes': 3 * step}
    for step in range(10, 101, 10)
  ]
  assert compare(rows, 20) == {
    'first_milliseconds': 17.5,  # Of steps 30 and 40.
    'first_megabytes': 105,
    'last_milliseconds': 47.5,  # Of steps 90 and 100.
    'last_megabytes': 285,
  }


@pytest.mark.long
def test_a_training_is_watched_from_start_to_end(run_script, tmp_path):
  one_device = os.environ['XLA_FLAGS'].replace('count=4', 'count=1')
  process = run_script(
    *('benchmarks/long_run.py', '--steps', 30, '--out', tmp_path),
    environment={'XLA_FLAGS': one_device},
  )
  (path,) = tmp_path.glob('long_run-*.json')
  result = json.loads(path.read_text())
  rows = result['rows']
  assert {10, 20, 30} <= {row['step'] for row in rows}
  assert rows[-1]['step'] == 30
  found = compare(rows, 10)
  assert {key: result[key] for key in found} == found
  assert f'the last 10: {found["last_milliseconds"]:.1f} ms' in process.stdout
  # What a process with jax takes, and no more than a small training does.
  assert 200 < found['first_megabytes'] < 4000
