"""What the scripts have in common."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from hosts import finish, start
from pages import run_python
from trouble import small_disk

from resnest_jax import __main__
from resnest_jax.__main__ import COMMANDS
from resnest_jax.errors import run

RUN = 'train.py --config configs/ade20k_pspnet.py --workdir x'
EXPORT = 'export.py --weights w'
MISTAKES = {
  f'{RUN} --steps=3': 'unrecognized arguments: --steps',
  f'{RUN} --config.sead=3': 'or seed?',
  RUN.replace('train', 'eval') + ' --weights w': 'either --workdir',
  'predict.py --weights w y': 'required: --out',
  EXPORT: 'required: --out',
  f'{EXPORT} --out y --sizes 512': 'write HEIGHTxWIDTH',
  f'{EXPORT} --renew x --out y --checkpoint latest --sizes 9x9': (
    'with --weights, --out, --sizes, --checkpoint.'
  ),
}
TRY_ALL = """
import contextlib, io, json, runpy, sys
ended = []
for sys.argv in json.loads(sys.argv[1]):
  with contextlib.redirect_stderr(io.StringIO()) as said:
    try:
      runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as end:
      ended.append((end.code, said.getvalue()))
print(json.dumps([ended, list(sys.modules)]))
"""


def test_mistakes_in_the_command_line_are_told_at_once(run_script):
  """Before the packages are imported that take seconds."""
  commands = json.dumps([command.split() for command in MISTAKES])
  ended, imported = json.loads(run_script('-c', TRY_ALL, commands).stdout)
  for told, (status, said) in zip(MISTAKES.values(), ended, strict=True):
    assert (status, said[:7], said.count('\n')) == (1, 'error: ', 1)
    assert told in said
  assert {'argparse', 'resnest_jax.flags'} <= set(imported)
  heavy = {'cv2', 'grain', 'jax', 'orbax.checkpoint', 'rich', 'tensorflow'}
  assert not heavy & set(imported)


LONG = 'x' * 5000
FOLDER = '--config configs/folder.py --workdir x'
HOSTILE = (
  f'train.py --config {LONG} --workdir x',
  f'train.py {FOLDER} --config.seed={10**20}',
  f'train.py {FOLDER} --config.name{LONG}=1',
  f'eval.py {FOLDER} --weights {LONG}',
  f'predict.py --weights w --out y {LONG}',
  f'export.py --weights {LONG} --out y',
  f'export.py --weights w --out {LONG}',
  f'-m resnest_jax.data.prepare ade20k --archive {LONG}',
  f'-m resnest_jax.data.prepare ade20k_mini --images {"1" * 5000} 1',
  '-m resnest_jax.data.prepare ade20k_mini --imagess 1 1',
  '-m resnest_jax.data.prepare own m',
  f'-m resnest_jax.data.mini.ade20k_mini --out {LONG}',
  '-m resnest_jax.data.mini.cityscapes_mini --out o --size 1 1',
  f'-m resnest_jax.weights.convert {LONG} --out {LONG}',
  f'-m resnest_jax.data.doctor --config {LONG}',
  f'-m resnest_jax.evaluation.submission validate {LONG}',
  '-m resnest_jax.evaluation.submission cityscapes --prediction p',
)


@pytest.mark.parametrize('command', HOSTILE, ids=range(len(HOSTILE)))
def test_absurd_command_ends_with_a_line(command, monkeypatch, capsys):
  with pytest.raises(SystemExit, match=r'^1$'):
    run(lambda: run_python(command.split(), monkeypatch))
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert 'fault of resnest-jax' not in line
  if 'cannot be used' in line:
    assert 'x ... x' in line
    assert 'File name too long. Give a shorter name' in line


HANGS = "print('ready', flush=True)\nimport time\ntime.sleep(60)\n"
# Packages of which each of the programs imports one at least.
HEAVY = ('cv2', 'flax', 'ml_collections', 'rich', 'tensorflow_datasets')
MODULES = (
  *('data.prepare', 'data.doctor', 'data.mini', 'data.mini_cityscapes'),
  *('weights.convert', 'evaluation.submission'),
)
PROGRAMS = ['train.py', 'eval.py', *(f'-m resnest_jax.{x}' for x in MODULES)]


@pytest.mark.parametrize('command', PROGRAMS)
def test_interrupted_imports_end_with_a_line(tmp_path, command):
  for name in HEAVY:
    (tmp_path / f'{name}.py').write_text(HANGS)
  process = start(*command.split(), devices=1, PYTHONPATH=str(tmp_path))
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  (line,) = finish(process, status=130, timeout=30)[1].splitlines()
  assert line.startswith('stopped')


@pytest.mark.parametrize('name', COMMANDS)
def test_commands_have_their_name_in_help_and_errors(name, monkeypatch, capsys):
  said = {'--help': f'usage: resnest-jax {name} '}
  said['--sead=3'] = f'resnest-jax {name} --help lists the flags'
  for flag in said:
    monkeypatch.setattr(sys, 'argv', ['resnest-jax', name, flag])
    with pytest.raises(SystemExit) as ended:
      __main__.start()
    assert ended.value.code == (flag != '--help')
    assert said[flag] in ''.join(capsys.readouterr())


def test_missing_browser_is_said_with_what_to_install(root, tmp_path):
  (tmp_path / 'id').symlink_to(shutil.which('id'))  # And no apt-get.

  command = [shutil.which('bash'), root / 'tests/find_browser.sh']
  path = {'PATH': str(tmp_path)}
  process = subprocess.run(command, env=path, capture_output=True, text=True)
  assert process.returncode == 1
  assert 'apt install chromium chromium-driver npm' in process.stderr
  for name in ('chromedriver', 'google-chrome', 'npm'):
    (tmp_path / name).symlink_to(shutil.which('id'))
  subprocess.run(command, env=path, check=True)


def test_full_disk_is_told_in_one_line(tmp_path, capsys):
  with small_disk(tmp_path / 'disk', '64k') as disk:
    disk.fill(os.getpid())
    try:
      with pytest.raises(SystemExit, match='1'):
        run(lambda: (disk.folder / 'picture').write_bytes(bytes(10**5)))
    finally:
      disk.free(os.getpid())
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'error: a file cannot be written: {disk.refusal}. ')
