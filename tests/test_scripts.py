"""What the scripts have in common."""

import json
import os
import shutil
import subprocess
import sys

import pytest
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
import json, runpy, sys
from resnest_jax.errors import UserError
said = []
for sys.argv in json.loads(sys.argv[1]):
  try:
    runpy.run_path(sys.argv[0])['main']()
  except UserError as error:
    said.append(str(error))
print(json.dumps([said, list(sys.modules)]))
"""


def test_mistakes_in_the_command_line_are_told_at_once(run_script):
  """Before the packages are imported that take seconds."""
  commands = json.dumps([command.split() for command in MISTAKES])
  said, imported = json.loads(run_script('-c', TRY_ALL, commands).stdout)
  for expected, message in zip(MISTAKES.values(), said, strict=True):
    assert expected in message
  assert {'argparse', 'resnest_jax.flags'} <= set(imported)
  heavy = {'cv2', 'grain', 'jax', 'orbax.checkpoint', 'rich', 'tensorflow'}
  assert not heavy & set(imported)


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

  def find():
    return subprocess.run(
      [shutil.which('bash'), root / 'tests/find_browser.sh'],
      env={'PATH': str(tmp_path)},
      capture_output=True,
      text=True,
    )

  process = find()
  assert process.returncode == 1
  assert 'apt install chromium chromium-driver' in process.stderr
  for name in ('chromedriver', 'google-chrome'):
    (tmp_path / name).symlink_to(shutil.which('id'))
  assert find().returncode == 0


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
