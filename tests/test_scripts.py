"""What the scripts have in common."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from hosts import finish, start
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
# Runs each as a program; prints status and errors of all, and their modules.
RUN_ALL = """
import contextlib, io, json, runpy, sys
ended = []
for words in json.loads(sys.argv[1]):
  said = io.StringIO()
  with contextlib.redirect_stderr(said):
    try:
      sys.argv = words[words[0] == '-m':]
      if words[0] == '-m':
        for name in (words[1], f'{words[1]}.__main__'):
          sys.modules.pop(name, None)  # Of which runpy would warn.
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
      else:
        runpy.run_path(words[0], run_name='__main__')
    except SystemExit as end:
      ended.append((end.code, said.getvalue()))
print('ended', json.dumps([ended, list(sys.modules)]))
"""


@pytest.fixture
def run_all(run_script):
  def run(commands):
    words = json.dumps([command.split() for command in commands])
    printed = run_script('-c', RUN_ALL, words).stdout
    ended, modules = json.loads(printed.rpartition('ended ')[2])
    for command, (status, said) in zip(commands, ended, strict=True):
      assert (status, said.count('\n')) == (1, 1), (command, said)
      assert said.startswith('error: ')
    return [said for _, said in ended], set(modules)

  return run


def test_mistakes_in_the_command_line_are_told_at_once(run_all):
  """Before the packages are imported that take seconds."""
  said, modules = run_all(MISTAKES)
  for expected, message in zip(MISTAKES.values(), said, strict=True):
    assert expected in message
  assert {'argparse', 'resnest_jax.flags'} <= modules
  heavy = {'cv2', 'grain', 'jax', 'orbax.checkpoint', 'rich', 'tensorflow'}
  assert not heavy & modules


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
  '-m resnest_jax.data.prepare palette2id --masks m',
  f'-m resnest_jax.data.mini --out {LONG}',
  '-m resnest_jax.data.mini_cityscapes --out o --size 1 1',
  f'-m resnest_jax.weights.convert {LONG} --out {LONG}',
  f'-m resnest_jax.data.doctor --config {LONG}',
  f'-m resnest_jax.evaluation.submission validate {LONG}',
  '-m resnest_jax.evaluation.submission cityscapes --prediction p',
)


def test_absurd_command_lines_end_with_a_line(run_all):
  for line in run_all(HOSTILE)[0]:
    assert 'fault of resnest-jax' not in line
    if 'cannot be used' in line:
      assert 'x ... x' in line
      assert 'File name too long. Give a shorter name' in line


HANGS = "print('ready', flush=True)\nimport time\ntime.sleep(60)\n"


# A program, and a package that it imports.
IMPORTS = [
  ('train.py', 'ml_collections'),
  ('eval.py', 'ml_collections'),
  ('-m resnest_jax.data.prepare', 'tensorflow_datasets'),
  ('-m resnest_jax.data.doctor', 'rich'),
  ('-m resnest_jax.data.mini', 'cv2'),
  ('-m resnest_jax.data.mini_cityscapes', 'cv2'),
  ('-m resnest_jax.weights.convert', 'flax'),
  ('-m resnest_jax.evaluation.submission', 'cv2'),
]


@pytest.mark.parametrize(('command', 'module'), IMPORTS)
def test_interrupt_during_the_imports_ends_with_a_line(
  root, tmp_path, command, module
):
  (tmp_path / f'{module}.py').write_text(HANGS)
  path = f'{tmp_path}{os.pathsep}{root}'
  process = start(*command.split(), devices=1, PYTHONPATH=path)
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  (line,) = finish(process, status=130, timeout=30)[1].splitlines()
  assert line.startswith('stopped')


@pytest.mark.parametrize('name', COMMANDS)
def test_commands_have_their_name_in_help_and_errors(name, monkeypatch, capsys):
  for flag, said in (
    ('--help', f'usage: resnest-jax {name} '),
    ('--sead=3', f'resnest-jax {name} --help lists the flags'),
  ):
    monkeypatch.setattr(sys, 'argv', ['resnest-jax', name, flag])
    with pytest.raises(SystemExit) as ended:
      __main__.start()
    assert ended.value.code == (flag != '--help')
    assert said in ''.join(capsys.readouterr())


def test_missing_browser_is_said_with_what_to_install(root, tmp_path):
  (tmp_path / 'id').symlink_to(shutil.which('id'))  # And no apt-get.

  command = [shutil.which('bash'), root / 'tests/find_browser.sh']
  path = {'PATH': str(tmp_path)}
  process = subprocess.run(command, env=path, capture_output=True, text=True)
  assert process.returncode == 1
  assert 'apt install chromium chromium-driver' in process.stderr
  for name in ('chromedriver', 'google-chrome'):
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
