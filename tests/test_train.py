"""`train.py` as a user starts it, on prepared data."""

import gzip
import json
import re
import struct

import cv2
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data.refusals import refused
from data.small_archives import decode
from pages import ROOT, blocks_of
from small import MINI, scalars, small_flags
from tensorboardX.proto.event_pb2 import Event

from resnest_jax.labels import ADE20K
from resnest_jax.runtime import lock_folder
from resnest_jax.training.workdir import longer

STEPS = 8


@pytest.fixture(scope='module')
def command(mini_data_dir):
  """The command line, to which the workdir comes last."""
  values = {'data.data_dir': mini_data_dir, 'train.total_steps': STEPS}
  values |= {'train.checkpoint_steps': 2, 'train.eval_steps': 4}
  values['train.log_steps'] = 2
  return 'train.py', '--config', MINI, *small_flags(values), '--workdir'


@pytest.fixture(scope='module')
def finished_run(command, run_script, tmp_path_factory):
  """A run that nothing disturbed, what it printed, and what JAX logged."""
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  words = *command, workdir, '--profile', '5:6'
  process = run_script(*words, environment={'JAX_LOG_COMPILES': '1'})
  return workdir, process.stdout, process.stderr


def test_run_leaves_what_it_promises(finished_run):
  workdir, stdout, _ = finished_run
  names = 'loss', 'mIoU', 'val_loss'
  losses, means, val_losses = (dict(scalars(workdir, x)) for x in names)
  assert (list(losses), list(means)) == ([2, 4, 6, 8], [4, 8])
  # Both heads begin near the logarithm of 150 classes, the auxiliary's
  # weight is 0.4.
  assert losses[2] == pytest.approx(1.4 * np.log(150), rel=0.1)
  assert losses[8] < losses[2]
  assert val_losses[4] == pytest.approx(np.log(150), rel=0.1)
  assert val_losses[8] < val_losses[4]
  ious = [scalars(workdir, f'IoU/{name}') for name in ADE20K.classes]
  at_end = [x for rows in ious for step, x in rows if step == 8]
  assert 10 < len(at_end) < 150
  assert means[8] == pytest.approx(np.mean(at_end))
  rate = (0.05 - 5e-4) * (1 - 5 / STEPS) ** 0.9 + 5e-4
  assert dict(scalars(workdir, 'learning_rate'))[6] == pytest.approx(rate)
  words = ['ETA', 'images/s', 'data wait', 'traced in', 'compiled in', 'mIoU']
  words += ['stage 4', '24 of 24 samples of train and 8 of 8 samples of val']
  assert [x for x in words if x not in stdout] == []
  assert json.loads((workdir / 'doctor.json').read_text())['findings'] == []
  for name in ('curves.png', 'doctor.png'):
    assert (workdir / name).read_bytes().startswith(b'\x89PNG')


def test_tensorboard_shows_scalars_and_predictions(finished_run):
  workdir = finished_run[0]
  (path,) = (workdir / 'tensorboard').glob('events.out.tfevents.*')
  data, values = path.read_bytes(), []
  while data:  # Length, its checksum, the event, its checksum.
    (length,) = struct.unpack('<Q', data[:8])
    event = Event.FromString(data[12 : 12 + length])
    values += [(event.step, value) for value in event.summary.value]
    data = data[16 + length :]
  for name in ('loss', 'IoU/wall'):
    shown = [(step, v.simple_value) for step, v in values if v.tag == name]
    # float32 there.
    np.testing.assert_allclose(shown, scalars(workdir, name), rtol=1e-6)
  pictures = [(step, v) for step, v in values if v.HasField('image')]
  assert [step for step, _ in pictures] == [4, 4, 8, 8]
  for _, value in pictures:
    assert value.tag.startswith('validation/ADE_val_')
    picture = decode(value.image.encoded_image_string)
    # Four pictures of 320 pixels and 12 of margin.
    assert picture.shape[1] == 4 * (320 + 12)
    assert picture.std() > 20


def test_profile_has_its_steps_and_nothing_is_compiled_again(finished_run):
  """The step once, the network once for the one padded shape there is."""
  workdir, stdout, log = finished_run
  assert f'steps 5 to 6 are traced in {workdir / "profile"}' in stdout
  (path,) = (workdir / 'profile').rglob('perfetto_trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  steps = [x['args']['step_num'] for x in events if x.get('name') == 'train']
  assert sorted(map(int, steps)) == [5, 6]
  assert 'compiled again' not in stdout
  names = re.findall(r'Finished XLA compilation of jit\((\w+)\)', log)
  assert names.count('train_step') == names.count('forward') == 1


def test_keeps_the_newest_and_the_best(finished_run):
  folder = finished_run[0] / 'checkpoints'
  scores = dict(scalars(folder.parent, 'mIoU'))
  assert {4, 6, 8} <= {int(path.name) for path in folder.glob('[0-9]*')}
  about = json.loads((folder / '8' / 'about' / 'metadata').read_text())
  best = max(scores, key=scores.get)
  assert about['best'] == {'step': best, 'mIoU': scores[best]}
  assert (about['position'], about['dilation_rule']) == (8 * 4, 'mmseg')
  assert about['palette'][2] == [6, 230, 230]


def test_started_again_does_nothing(finished_run, command, run_script):
  workdir = finished_run[0]
  before = {path.stat().st_mtime_ns for path in workdir.rglob('*')}
  stdout = run_script(*command, workdir).stdout
  told = rf'{STEPS} steps are done: best mIoU 0\.\d+ at step \d+\. To train'
  assert re.search(told, stdout)
  assert stdout.endswith(f' --config.pretrained={workdir}\n')
  left = {*workdir.rglob('*')} - {workdir / 'config.json', workdir / '.lock'}
  assert {path.stat().st_mtime_ns for path in left} <= before


@pytest.mark.long
def test_starts_from_a_run(finished_run, command, run_script, tmp_path):
  source, workdir = finished_run[0], tmp_path / 'run'
  # As the message of a finished run says.
  flag = re.search(r'--config\.pretrained=\S+', longer(source))[0]
  process = run_script(*command, workdir, flag)
  assert f'starting from {source} (step 8)' in process.stdout
  # Lower than halfway between start and end of the other run.
  before = dict(scalars(source, 'loss'))
  assert dict(scalars(workdir, 'loss'))[2] < (before[2] + before[8]) / 2


def test_python_of_the_readme(finished_run, tmp_path, monkeypatch, capsys):
  """Its block and those of the reference run, on this run and a picture."""
  pages = '../README.md', 'reference/package.md'
  predicted, trained, fresh = (x for page in pages for x in blocks_of(page))
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'pspnet').symlink_to(finished_run[0])
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  noise = np.random.default_rng(0).integers(0, 256, (60, 83, 3), np.uint8)
  cv2.imwrite(str(tmp_path / 'street.jpg'), noise)
  monkeypatch.chdir(tmp_path)
  exec(predicted, names := {})
  assert names['prediction'].labels.shape == (60, 83)
  printed = set(re.findall(r"'([^']+)'", capsys.readouterr().out))
  assert set() < printed <= set(names['model'].classes)
  exec(trained, names)
  assert names['label_map'].shape == (8, 11)
  assert names['about']['step'] in (4, 8)
  exec(fresh, names)
  initial = names['init'](jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, names['variables'], initial)


MISTAKES = {
  '--config.data.data_dir=nowhere': 'prepare ade20k_mini --data_dir nowhere',
  '--config.train.batch_size=6': 'a batch of 6.*4 devices',
  '--config.data.transform=no.py:f': '(?s)No such file .*no.py.*FILE.py:FUNC',
}


@pytest.mark.parametrize('flag', MISTAKES)
def test_mistake_leaves_no_workdir(flag, command, call_script, tmp_path):
  refused(MISTAKES[flag], call_script, *command, tmp_path / 'run', flag)
  # So the next command may be another.
  assert not (tmp_path / 'run').exists()


def test_workdir_of_another_process(command, call_script, tmp_path):
  with lock_folder(tmp_path, 'trains in'):
    refused(f'another.* trains in {tmp_path}', call_script, *command, tmp_path)
  assert not (tmp_path / 'checkpoints').exists()


def test_workdir_that_is_a_file(command, call_script, tmp_path):
  (workdir := tmp_path / 'file').write_text('mine')
  refused(f'cannot write to {workdir}', call_script, *command, workdir)
  assert workdir.read_text() == 'mine'


def test_infinite_loss_keeps_the_last_state(command, run_script, tmp_path):
  keys = 'model.head=fcn', 'model.radix=1', 'optimizer.learning_rate=1e30'
  flags = [f'--config.{key}' for key in keys]
  stderr = run_script(*command, tmp_path, *flags, status=1).stderr
  assert re.match('error: .* at step .*learning_rate', stderr)
  assert 'Traceback' not in stderr
  for item in (tmp_path / 'checkpoints').glob('[0-9]*/[mo]*'):
    assert item.name in ('model', 'optimizer')
    for leaf in jax.tree.leaves(ocp.StandardCheckpointer().restore(item)):
      assert np.isfinite(leaf).all(), item
