"""How the scripts of benchmarks/ are run."""

import json

import pytest

# A machine that has jax, flax, optax, NumPy and matplotlib, and none of these.
BARE = """
import runpy, sys
words = 'array_record cv2 grain ml_collections tensorboardX tensorflow_datasets'
sys.modules.update(dict.fromkeys(words.split()))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture
def measure(run_script, tmp_path):
  """`measure('x.py --smoke', 'done')`: its result; 'done' has been printed."""

  def measure(command, *said, bare=True, **options):
    out = tmp_path / 'results'
    words = f'benchmarks/{command} --out {out}'.split()
    process = run_script(*(('-c', BARE) if bare else ()), *words, **options)
    (path,) = out.glob('*.json')
    if bare and '--smoke' in words:
      assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    assert [words for words in said if words not in process.stdout] == []
    return json.loads(path.read_text('utf-8')) | {'printed': process.stdout}

  return measure
