"""What the scripts have in common."""

import pytest

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
  ],
)
def test_mistake_in_the_command_line_is_told_at_once(
  command, message, run_script
):
  """Before the packages are imported that take seconds."""
  process = run_script('-X', 'importtime', *command, status=1)
  lines = process.stderr.splitlines()
  imported = {line.rpartition('|')[2].strip() for line in lines}
  assert 'ml_collections' in imported
  assert not imported & {'cv2', 'jax', 'orbax.checkpoint', 'rich'}
  assert lines[-1].startswith('error: ')
  assert message in lines[-1]
