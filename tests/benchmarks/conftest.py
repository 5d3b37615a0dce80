"""How the scripts of benchmarks/ are run."""

import json

import pytest
from bare import on_a_bare_machine


@pytest.fixture
def measure(run_script, tmp_path):
  """`measure('conv_forms', '--smoke')`: its result, and what it prints."""

  def measure(name, *flags, bare=True, **options):
    script = f'benchmarks/{name}.py'
    start = on_a_bare_machine(script) if bare else (script,)
    out = tmp_path / 'results'
    process = run_script(*start, *flags, '--out', out, **options)
    (path,) = out.glob('*.json')
    if bare and '--smoke' in flags:
      assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    return json.loads(path.read_text('utf-8')), process.stdout

  return measure
