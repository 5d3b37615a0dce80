"""What the scripts have in common."""

import os
import shutil
import subprocess

import pytest
from trouble import small_disk

from resnest_jax.errors import run

RUN = ('--config', 'configs/ade20k_pspnet.py', '--workdir', 'x')


@pytest.mark.parametrize(
  ('command', 'message'),
  [
    (('train.py', *RUN, '--steps=3'), 'unrecognized arguments: --steps'),
    (('train.py', *RUN, '--config.sead=3'), 'or seed?'),
    (('eval.py', *RUN, '--steps=3'), 'unrecognized arguments: --steps'),
    (('eval.py', *RUN, '--config.sead=3'), 'or seed?'),
    (('eval.py', *RUN, '--weights', 'x'), 'either --workdir'),
    (('predict.py', '--weights', 'x', 'y'), 'required: --out'),
    (('export.py', '--weights', 'x'), 'required: --out'),
    (
      ('export.py', '--weights', 'x', '--out', 'y', '--sizes', '512'),
      'write HEIGHTxWIDTH',
    ),
    (
      ('export.py', '--renew', 'x', '--out', 'y', '--checkpoint', 'latest'),
      'cannot be given with --out, --checkpoint.',
    ),
    (
      (
        *('export.py', '--weights', 'w', '--sizes', '9x9', '--probabilities'),
        *('--renew', 'x', '--formats', 'stablehlo', 'safetensors'),
      ),
      'with --weights, --formats, --sizes, --probabilities.',
    ),
  ],
)
def test_mistake_in_the_command_line_is_told_at_once(
  command, message, run_script
):
  """Before the packages are imported that take seconds."""
  process = run_script('-X', 'importtime', *command, status=1)
  lines = process.stderr.splitlines()
  imported = {line.rpartition('|')[2].strip() for line in lines}
  assert {'argparse', 'resnest_jax.flags'} <= imported
  assert not imported & {'cv2', 'jax', 'orbax.checkpoint', 'rich'}
  assert lines[-1].startswith('error: ')
  assert message in lines[-1]


def test_missing_browser_is_said_with_what_to_install(root, tmp_path):
  (tmp_path / 'id').symlink_to(shutil.which('id'))  # And no apt-get.
  process = subprocess.run(
    [shutil.which('bash'), root / 'tests/find_browser.sh'],
    env={'PATH': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 1
  assert 'apt install chromium chromium-driver' in process.stderr
  for name in ('id', 'chromedriver', 'google-chrome'):
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(shutil.which('id'))
  subprocess.run(
    [shutil.which('bash'), root / 'tests/find_browser.sh'],
    env={'PATH': str(tmp_path)},
    check=True,
  )


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
