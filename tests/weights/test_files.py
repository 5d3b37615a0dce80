"""Weight files: what is read, what is refused, what is written."""

import json
import os
import sys
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from golden.reference import FOLDER, assert_same_bits
from safetensors.numpy import save_file
from trouble import small_files

from resnest_jax.errors import UserError
from resnest_jax.weights.files import read_weights, write_weights

ABOUT = {
  'task': 'segmentor',
  'classes': ['wall', 'sky'],
  'palette': [[120, 120, 120], [6, 230, 230]],
}
VALUES = np.random.default_rng(0).random((3, 5, 3, 4), np.float32)
STATE_DICT = {
  'conv.weight': VALUES.transpose(3, 2, 0, 1),  # Not as it lies in memory.
  'bn.num_batches_tracked': np.zeros((), np.int64),
}
TENSORS = {name: torch.tensor(value) for name, value in STATE_DICT.items()}
FORMATS = pytest.mark.parametrize('legacy', [False, True])


def torch_file(path, content, legacy=False):
  torch.save(content, path, _use_new_zipfile_serialization=not legacy)
  assert (path.read_bytes()[:2] == b'PK') != legacy
  return path


@pytest.mark.parametrize('kind', ['ours', 'mmseg'])
def test_full_disk_is_told_and_leaves_nothing(kind, tmp_path):
  about = ABOUT | {'task': 'x' * 1024}
  with (
    small_files(),
    pytest.raises(UserError, match=r'weights: File too large\. .* or give an'),
  ):
    write_weights(tmp_path / 'weights', kind, STATE_DICT, about)
  assert list(tmp_path.iterdir()) == []
  # Others may read what is written where they may read.
  (tmp_path / 'plain').touch()
  mode = (tmp_path / 'plain').stat().st_mode
  for path in write_weights(tmp_path / 'weights', kind, STATE_DICT, about):
    assert path.stat().st_mode == mode


@pytest.mark.parametrize('start', [b'\x80\x38', b'PK\x03\x04'])
def test_safetensors_whose_length_begins_as_another_format(start, tmp_path):
  """The first byte is 0x80, as of pickles, in one of 32 files."""
  value = np.arange(6, dtype=np.float32)
  entry = {'dtype': 'F32', 'shape': [6], 'data_offsets': [0, 24]}
  header = json.dumps({'x': entry}).encode()
  length = int.from_bytes(start, 'little')
  path = tmp_path / 'model.safetensors'
  with path.open('wb') as file:
    file.write(length.to_bytes(8, 'little') + header.ljust(length))
    file.write(value.tobytes())
  assert path.read_bytes().startswith(start)
  np.testing.assert_array_equal(read_weights(path).state_dict['x'], value)


def test_folder_means_the_weights_in_it(tmp_path):
  for kind in ('ours', 'mmseg'):
    files = write_weights(tmp_path / kind, kind, STATE_DICT, ABOUT)
    read = read_weights(tmp_path / kind)
    assert_same_bits(read.state_dict, STATE_DICT)
    assert read.about == ABOUT == json.loads(files[1].read_text())
  for path, message in (
    (tmp_path, r'holds neither .* but mmseg, ours\. Give'),
    (tmp_path / 'none', 'there is no weight file'),
  ):
    with pytest.raises(UserError, match=message):
      read_weights(path)


@pytest.mark.parametrize(('mask', 'mode'), [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize('kind', ['ours', 'mmseg'])
def test_files_have_the_modes_that_the_umask_leaves(kind, mask, mode, tmp_path):
  before = os.umask(mask)
  try:
    files = write_weights(tmp_path / 'x', kind, STATE_DICT, ABOUT)
  finally:
    os.umask(before)
  assert [path.stat().st_mode & 0o777 for path in files] == [mode, mode]


@pytest.mark.parametrize(
  ('half', 'torchs'),
  [(ml_dtypes.bfloat16, torch.bfloat16), (np.float16, torch.float16)],
)
def test_half_precision_becomes_float32_exactly(half, torchs, tmp_path):
  values = np.array([1.0, -0.3, 3e-5, 60000])
  save_file({'x': values.astype(half)}, tmp_path / 'x.safetensors')
  torch_file(tmp_path / 'x.pth', {'x': torch.tensor(values, dtype=torchs)})
  for name in ('x.safetensors', 'x.pth'):
    read = read_weights(tmp_path / name).state_dict
    assert_same_bits(read, {'x': values.astype(half).astype('f')})


@FORMATS
@pytest.mark.parametrize(
  ('key', 'prefix'),
  [(None, ''), ('state_dict', ''), ('model', ''), ('state_dict', 'module.')],
)
def test_pytorch_file_of_either_format(legacy, key, prefix, tmp_path):
  """Bare, of mmsegmentation 0.x, of timm's training, of DataParallel."""
  meta = {'mmseg_version': '0.6.0', 'CLASSES': ['wall', 'sky'], 'iter': 9}
  tensors = {prefix + name: value for name, value in TENSORS.items()}
  whole = {key: tensors, 'meta': meta, 'optimizer': {'lr': [0.1]}}
  path = torch_file(tmp_path / 'x.pth', whole if key else tensors, legacy)
  read = read_weights(path)
  assert_same_bits(read.state_dict, STATE_DICT)
  assert read.meta == (meta if key else {})
  assert read.about == {}


def test_checkpoint_of_mmengine_with_its_log_objects():
  """A file of mmengine 0.10.7, with message hub and optimizer."""
  path = FOLDER / 'mmengine_checkpoint.pth'
  with zipfile.ZipFile(path) as file:
    assert b'HistoryBuffer' in file.read('mmengine_checkpoint/data.pkl')
  read = read_weights(path)
  assert_same_bits(
    read.state_dict,
    {
      'weight': np.arange(6, dtype=np.float32).reshape(2, 3),
      'bias': np.float32([0.5, -2]),
    },
  )
  assert read.meta['dataset_meta']['classes'] == ('wall', 'sky')


class Bomb:
  """Its pickle runs a command that leaves a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


@FORMATS
def test_code_in_a_pickle_is_not_run(legacy, tmp_path):
  trace = tmp_path / 'was_run'
  content = {'state_dict': {'x': torch.ones(1)}, 'meta': Bomb(trace)}
  path = torch_file(tmp_path / 'x.pth', content, legacy)
  with pytest.raises(UserError, match=r'wants to run posix\.system'):
    read_weights(path)
  assert not trace.exists()


@pytest.mark.parametrize(
  ('write', 'reason'),
  [
    (
      lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path),
      'holds more than weights',
    ),
    (
      lambda path: torch_file(path, {'epoch': 3, 'lr': 0.1}),
      r"no state dict.*\['epoch', 'lr'\]",
    ),
    (lambda path: torch_file(path, [torch.ones(2)]), 'no state dict'),
    (lambda path: path.touch(), 'neither a safetensors nor a PyTorch'),
    (lambda path: path.write_text('<html>'), 'neither a safetensors nor'),
  ],
)
def test_other_files_are_refused_in_our_words(write, reason, tmp_path):
  """PyTorch would advise to switch the restriction off."""
  path = tmp_path / 'x.pth'
  write(path)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    with pytest.raises(UserError, match=reason) as error:
      read_weights(path)
  message = str(error.value)
  assert message.startswith(str(path))
  assert 'weights_only' not in message
  assert '\n' not in message


@pytest.mark.parametrize('share', [0.3, 0.7, 0.999])
@pytest.mark.parametrize('name', ['zip.pth', 'legacy.pth', 'x.safetensors'])
def test_truncated_file_is_refused(name, share, tmp_path):
  path = tmp_path / name
  values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
  if path.suffix == '.pth':
    torch_file(path, {'x': torch.from_numpy(values)}, name == 'legacy.pth')
  else:
    save_file({'x': values}, path)
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])
  with pytest.raises(UserError, match=r'cut off|damaged'):
    read_weights(path)


def test_without_torch_the_package_is_named(tmp_path, monkeypatch):
  path = torch_file(tmp_path / 'x.pth', TENSORS)
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match=r'package torch .* pip install'):
    read_weights(path)
