"""`train.py` as a user starts it: real processes on prepared data."""

import gzip
import json
import re
import struct
from pathlib import Path

import cv2
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event

from resnest_jax.runtime import lock_folder

ROOT = Path(__file__).resolve().parent.parent
CONFIG = 'configs/ade20k_pspnet.py:mini'
STEPS = 8
# As small as it gets: the time goes into starting and compiling.
SMALL = (
  '--config.model.width=8',
  '--config.model.stem_width=8',
  '--config.model.head_channels=16',
  '--config.model.aux_channels=8',
  '--config.data.image_scale=64,64',
  '--config.data.scale_range=1.0,1.5',
  '--config.data.crop_size=32,32',
  f'--config.train.total_steps={STEPS}',
  '--config.train.batch_size=4',
  '--config.train.checkpoint_steps=2',
  '--config.train.eval_steps=4',
  '--config.train.log_steps=2',
  '--config.eval.batch_size=4',
  '--config.eval.bucket=64',
)


@pytest.fixture(scope='module')
def arguments(mini_data_dir):
  """The command line, but for `--workdir`."""
  data_dir = f'--config.data.data_dir={mini_data_dir}'
  return ('train.py', '--config', CONFIG, *SMALL, data_dir)


@pytest.fixture(scope='module')
def finished_run(arguments, run_script, tmp_path_factory):
  """A run that nothing disturbed, and what it printed; JAX's log beside it."""
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  process = run_script(
    *(*arguments, '--workdir', workdir, '--profile', '5:6'),
    environment={'JAX_LOG_COMPILES': '1'},
  )
  (workdir.parent / 'compilations').write_text(process.stderr)
  return workdir, process.stdout


def stored(workdir, step=STEPS):
  """All arrays of a checkpoint by name."""
  arrays = {}
  for item in ('model', 'optimizer'):
    path = workdir / 'checkpoints' / str(step) / item
    tree = ocp.StandardCheckpointer().restore(path)
    for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
      arrays[item + jax.tree_util.keystr(key)] = np.asarray(leaf)
  return arrays


def log_of(workdir):
  lines = (workdir / 'log.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_run_leaves_what_it_promises(finished_run):
  workdir, stdout = finished_run
  log = log_of(workdir)
  losses = {line['step']: line['loss'] for line in log if 'loss' in line}
  assert list(losses) == [2, 4, 6, 8]
  # Both heads begin near the logarithm of 150 classes, the auxiliary's
  # weight is 0.4.
  assert losses[2] == pytest.approx(1.4 * np.log(150), rel=0.1)
  assert losses[8] < losses[2]
  evaluated = {line['step']: line['mIoU'] for line in log if 'mIoU' in line}
  assert list(evaluated) == [4, 8]
  rates = {
    line['step']: line['learning_rate']
    for line in log
    if 'learning_rate' in line
  }
  assert rates[6] == pytest.approx(
    (0.05 - 5e-4) * (1 - 5 / STEPS) ** 0.9 + 5e-4
  )
  assert (workdir / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert list((workdir / 'tensorboard').glob('events.out.tfevents.*'))
  words = (
    'ETA',
    'images/s',
    'data wait',
    'traced in',
    'compiled in',
    'mIoU',
    'stage 4',
  )
  for word in words:
    assert word in stdout
  assert (
    'label doctor: 24 of 24 samples of train and 8 of 8 samples of validation: '
    'nothing wrong'
  ) in stdout
  doctor = json.loads((workdir / 'doctor.json').read_text())
  assert doctor['findings'] == []
  assert (workdir / 'doctor.png').read_bytes().startswith(b'\x89PNG')


def board_of(workdir):
  """The events for TensorBoard."""
  (path,) = (workdir / 'tensorboard').glob('events.out.tfevents.*')
  data, events = path.read_bytes(), []
  while data:  # Length, its checksum, the event, its checksum.
    (length,) = struct.unpack('<Q', data[:8])
    events.append(Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return events


def test_tensorboard_shows_scalars_and_predictions(finished_run):
  workdir, _ = finished_run
  values = [(x.step, v) for x in board_of(workdir) for v in x.summary.value]
  losses = [(step, v.simple_value) for step, v in values if v.tag == 'loss']
  logged = [(x['step'], x['loss']) for x in log_of(workdir) if 'loss' in x]
  np.testing.assert_allclose(losses, logged, rtol=1e-6)  # float32 there
  pictures = [(step, v) for step, v in values if v.HasField('image')]
  assert [step for step, _ in pictures] == [4, 4, 8, 8]
  assert len({v.tag for _, v in pictures}) == 2
  for _, value in pictures:
    assert value.tag.startswith('validation/ADE_val_')
    encoded = np.frombuffer(value.image.encoded_image_string, np.uint8)
    picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    # Four pictures of 320 pixels and 12 of margin; names below them.
    assert picture.shape[1] == 4 * (320 + 12)
    assert picture.shape[0] > 240
    assert picture.std() > 20


def test_profile_holds_the_steps_that_were_asked_for(finished_run):
  workdir, stdout = finished_run
  assert f'steps 5 to 6 are traced in {workdir / "profile"}' in stdout
  (path,) = (workdir / 'profile').rglob('perfetto_trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  steps = [x['args'] for x in events if x.get('name') == 'train']
  assert sorted(int(step['step_num']) for step in steps) == [5, 6]
  assert list((workdir / 'profile').rglob('*.xplane.pb'))


def test_nothing_is_compiled_again(finished_run):
  """The step once, the network once for the one padded shape there is."""
  workdir, stdout = finished_run
  assert 'compiled again' not in stdout
  log = (workdir.parent / 'compilations').read_text()
  names = re.findall(r'Finished XLA compilation of jit\((\w+)\)', log)
  assert names.count('train_step') == names.count('forward') == 1


def test_keeps_the_newest_and_the_best(finished_run):
  workdir, _ = finished_run
  steps = {int(path.name) for path in (workdir / 'checkpoints').glob('[0-9]*')}
  assert {4, 6, 8} <= steps
  about = json.loads(
    (workdir / 'checkpoints' / '8' / 'about' / 'metadata').read_text()
  )
  evaluated = [line for line in log_of(workdir) if 'mIoU' in line]
  best = max(evaluated, key=lambda line: line['mIoU'])
  assert about['best'] == {'step': best['step'], 'mIoU': best['mIoU']}
  assert about['position'] == 8 * 4
  assert about['dilation_rule'] == 'mmseg'
  assert about['classes'][:3] == ['wall', 'building', 'sky']
  assert about['palette'][2] == [6, 230, 230]


def test_started_again_does_nothing(finished_run, arguments, run_script):
  workdir, _ = finished_run
  before = sorted(path.stat().st_mtime_ns for path in workdir.rglob('*'))
  process = run_script(*arguments, '--workdir', workdir)
  assert f'{STEPS} steps are done' in process.stdout
  rewritten = (workdir / 'config.json', workdir / '.lock')
  after = sorted(
    path.stat().st_mtime_ns
    for path in workdir.rglob('*')
    if path not in rewritten
  )
  assert set(after) <= set(before)


@pytest.mark.long
def test_starts_from_the_weights_of_a_run(
  finished_run, arguments, run_script, tmp_path
):
  process = run_script(
    *arguments,
    f'--config.pretrained={finished_run[0]}',
    *('--workdir', tmp_path / 'run'),
  )
  assert f'starting from {finished_run[0]} (step 8)' in process.stdout
  # Where the other run began and where it ended.
  before, after = (
    {line['step']: line['loss'] for line in log_of(run) if 'loss' in line}
    for run in (finished_run[0], tmp_path / 'run')
  )
  assert after[2] < (before[2] + before[8]) / 2


def refused(run_script, *arguments):
  """Standard error of a command that has to end with status 1, in one line."""
  process = run_script(*arguments, status=1)
  assert process.stderr.startswith('error: ')
  assert 'Traceback' not in process.stderr
  return process.stderr


def test_data_that_is_not_prepared(arguments, run_script, tmp_path):
  # The last flag counts.
  stderr = refused(
    run_script,
    *arguments,
    f'--config.data.data_dir={tmp_path / "none"}',
    *('--workdir', tmp_path / 'run'),
  )
  assert (
    'python -m resnest_jax.data.prepare ade20k_mini --data_dir '
    f'{tmp_path / "none"}'
  ) in stderr
  assert not (tmp_path / 'run').exists()


def test_pretrained_that_does_not_exist(arguments, run_script, tmp_path):
  stderr = refused(
    run_script,
    *arguments,
    '--config.pretrained=resnest101_d3',
    *('--workdir', tmp_path / 'run'),
  )
  assert 'Did you mean resnest101_d2' in stderr
  # Nothing has begun, so the next command may be another.
  assert not (tmp_path / 'run').exists()


def test_full_row_names_the_command_that_prepares_it(run_script, tmp_path):
  stderr = refused(
    run_script,
    *('train.py', '--config', 'configs/ade20k_pspnet.py'),
    f'--config.data.data_dir={tmp_path}',
    *('--workdir', tmp_path / 'run'),
  )
  assert (
    'python -m resnest_jax.data.prepare ade20k '
    f'--archive ADEChallengeData2016.zip --data_dir {tmp_path}'
  ) in stderr


def test_unknown_config_key(arguments, run_script, tmp_path):
  stderr = refused(
    run_script,
    *arguments,
    '--config.train.total_step=3',
    *('--workdir', tmp_path / 'run'),
  )
  assert 'train.total_step' in stderr
  assert 'did you mean train.total_steps' in stderr


def test_workdir_of_another_config(
  finished_run, arguments, run_script, tmp_path
):
  workdir, _ = finished_run
  before = (workdir / 'config.json').read_bytes()
  stderr = refused(
    run_script,
    *arguments,
    '--config.optimizer.momentum=0.5',
    *('--workdir', workdir),
  )
  assert 'optimizer.momentum: 0.9 before, 0.5 now' in stderr
  assert '--workdir' in stderr
  assert (workdir / 'config.json').read_bytes() == before


def test_workdir_that_another_process_trains_in(
  arguments, run_script, tmp_path
):
  with lock_folder(tmp_path, 'trains in'):
    stderr = refused(run_script, *arguments, '--workdir', tmp_path)
  assert f'another process trains in {tmp_path}' in stderr
  assert not (tmp_path / 'checkpoints').exists()


def test_workdir_that_is_a_file(arguments, run_script, tmp_path):
  workdir = tmp_path / 'file'
  workdir.write_text('mine')
  stderr = refused(run_script, *arguments, '--workdir', workdir)
  assert f'cannot write to {workdir}' in stderr
  assert workdir.read_text() == 'mine'


def test_python_of_the_readme(finished_run, tmp_path, monkeypatch, capsys):
  """Its block and those of the reference run, on this run and a picture."""
  pages = (ROOT / 'README.md', ROOT / 'docs' / 'reference' / 'package.md')
  text = ''.join(page.read_text() for page in pages)
  predicted, trained, fresh = re.findall(
    r'```python\n(.*?)```', text, re.DOTALL
  )
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'pspnet').symlink_to(finished_run[0])
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  rng = np.random.default_rng(0)
  picture = rng.integers(0, 256, (60, 83, 3), np.uint8)
  cv2.imwrite(str(tmp_path / 'street.jpg'), picture)
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(predicted, names)
  assert names['prediction'].labels.shape == (60, 83)
  printed = set(re.findall(r"'([^']+)'", capsys.readouterr().out))
  assert printed
  assert printed <= set(names['model'].classes)
  exec(trained, names)
  assert names['label_map'].shape == (8, 11)
  assert names['about']['step'] in (4, 8)
  exec(fresh, names)
  initial = names['init'](jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, names['variables'], initial)


def test_batch_that_the_devices_cannot_share(arguments, run_script, tmp_path):
  stderr = refused(
    run_script,
    *arguments,
    '--config.train.batch_size=6',
    *('--workdir', tmp_path / 'run'),
  )
  assert 'a batch of 6' in stderr
  assert '4 devices' in stderr


def test_loss_that_is_not_finite_stops_and_keeps_the_last_state(
  arguments, run_script, tmp_path
):
  workdir = tmp_path / 'run'
  stderr = refused(
    run_script,
    *arguments,
    '--config.optimizer.learning_rate=1e30',
    '--config.model.head=fcn',
    '--config.model.radix=1',
    *('--workdir', workdir),
  )
  assert 'at step' in stderr
  assert 'learning_rate' in stderr
  for step in (workdir / 'checkpoints').glob('[0-9]*'):
    for name, value in stored(workdir, step.name).items():
      assert np.isfinite(value).all(), name
