"""How the scripts of benchmarks/ are run."""

import json

import pytest

# A machine that has jax, flax, optax, NumPy and matplotlib, and none of these.
ABSENT = (
  *('array_record', 'cv2', 'grain', 'ml_collections', 'tensorboardX'),
  'tensorflow_datasets',
)
BARE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture
def measure(run_script, tmp_path):
  """`measure('conv_forms', '--smoke')`: its result, and what it prints."""

  def measure(name, *flags, bare=True, **options):
    start = ('-c', BARE) if bare else ()
    out = tmp_path / 'results'
    script = f'benchmarks/{name}.py'
    process = run_script(*start, script, *flags, '--out', out, **options)
    (path,) = out.glob('*.json')
    if bare and '--smoke' in flags:
      assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    return json.loads(path.read_text('utf-8')), process.stdout

  return measure
