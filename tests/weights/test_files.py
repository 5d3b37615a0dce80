"""Weight files: what is read, what is refused, what is written."""

import json
import os
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from golden.reference import FOLDER, assert_same_bits
from safetensors.numpy import load_file, save
from safetensors.torch import save_file as save_torch
from torch.utils.serialization import config as serialization
from trouble import small_files
from weights.built import refused, saved

from resnest_jax.weights.files import read_weights, write_weights

COLOURS = [[120, 120, 120], [6, 230, 230]]
ABOUT = {'task': 'segmentor', 'classes': ['wall', 'sky'], 'palette': COLOURS}
VALUES = np.random.default_rng(0).random((3, 5, 3, 4), np.float32)
STATE_DICT = {
  'conv.weight': VALUES.transpose(3, 2, 0, 1),  # Not as it lies in memory.
  'bn.num_batches_tracked': np.zeros((), np.int64),
}


@pytest.mark.parametrize('kind', ['ours', 'mmseg'])
def test_full_disk_is_told_and_leaves_nothing(kind, tmp_path):
  weights = (tmp_path / 'weights', kind, STATE_DICT, {'task': 'x' * 1024})
  with small_files():
    refused(r'weights: File too large\. .* or give', write_weights, *weights)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('mask', 'mode'), [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize('kind', ['ours', 'mmseg'])
def test_files_have_the_modes_that_the_umask_leaves(kind, mask, mode, tmp_path):
  before = os.umask(mask)
  try:
    files = write_weights(tmp_path / 'x', kind, STATE_DICT, ABOUT)
  finally:
    os.umask(before)
  assert [path.stat().st_mode & 0o777 for path in files] == [mode, mode]


# 0x80, as of pickles, is the first byte of one in 32 files.
@pytest.mark.parametrize('start', [b'\x80\x38', b'PK\x03\x04'])
def test_safetensors_whose_length_begins_as_another_format(start, tmp_path):
  content = save({'x': np.arange(6.0)})
  end = 8 + int.from_bytes(content[:8], 'little')
  header = content[8:end].ljust(int.from_bytes(start, 'little'))
  path = tmp_path / 'model.safetensors'
  path.write_bytes(start.ljust(8, b'\0') + header + content[end:])
  assert read_weights(path).state_dict['x'].tolist() == [0, 1, 2, 3, 4, 5]


def test_folder_means_the_weights_in_it(tmp_path):
  for kind in ('ours', 'mmseg'):
    files = write_weights(tmp_path / kind, kind, STATE_DICT, ABOUT)
    read = read_weights(tmp_path / kind)
    assert_same_bits(read.state_dict, STATE_DICT)
    assert read.about == ABOUT == json.loads(files[1].read_text())
  refused(r'holds neither .* but mmseg, ours\. Give', read_weights, tmp_path)
  (tmp_path / 'log.jsonl').touch()
  refused('no checkpoint yet: let train.py go on', read_weights, tmp_path)
  refused('there is no weight file', read_weights, tmp_path / 'none')
  (step := tmp_path / 'run/checkpoints/9').mkdir(parents=True)
  refused(r'Give the folder .*/run\.', read_weights, step)


@pytest.mark.parametrize('kind', ['ours', 'mmseg'])
def test_files_are_the_same_byte_for_byte(kind, tmp_path):
  more = {'x': np.ones(3, np.float64), 'y': np.ones(3, ml_dtypes.bfloat16)}
  contents = STATE_DICT | (more if kind == 'ours' else {})
  # PyTorch's files keep the order of their names.
  turned = dict(reversed(contents.items())) if kind == 'ours' else contents
  first, _ = write_weights(tmp_path / 'a', kind, contents, ABOUT)
  second, _ = write_weights(tmp_path / 'b', kind, turned, ABOUT)
  assert first.read_bytes() == second.read_bytes()
  if kind == 'ours':
    # By the package of the format.
    assert_same_bits(load_file(first), contents)


HALVES = [(ml_dtypes.bfloat16, torch.bfloat16), (np.float16, torch.float16)]


@pytest.mark.parametrize(('half', 'torchs'), HALVES)
def test_half_precision_becomes_float32_exactly(half, torchs, tmp_path):
  values = np.array([1.0, -0.3, 3e-5, 60000])
  ours = saved(tmp_path / 'x.safetensors', {'x': values.astype(half)})
  theirs = {'x': torch.tensor(values, dtype=torchs)}
  for path in (ours, saved(tmp_path / 'x.pth', theirs)):
    read = read_weights(path).state_dict
    assert_same_bits(read, {'x': values.astype(half).astype('f')})


@pytest.mark.parametrize('old', [False, True])
# Bare, of mmsegmentation 0.x, of timm's training.
@pytest.mark.parametrize('key', [None, 'state_dict', 'model'])
def test_pytorch_file_of_either_format(old, key, tmp_path):
  meta = {'mmseg_version': '0.6.0', 'CLASSES': ['wall', 'sky'], 'iter': 9}
  whole = {key: STATE_DICT, 'meta': meta, 'optimizer': {'lr': [0.1]}}
  path = saved(tmp_path / 'x.pth', whole if key else STATE_DICT, old)
  assert (path.read_bytes()[:2] == b'PK') != old
  read = read_weights(path)
  assert_same_bits(read.state_dict, STATE_DICT)
  assert (read.meta, read.about) == (meta if key else {}, {})


def test_checkpoint_of_mmengine_with_its_log_objects():
  """A file of mmengine 0.10.7, with message hub and optimizer."""
  path = FOLDER / 'mmengine_checkpoint.pth'
  with zipfile.ZipFile(path) as file:
    assert b'HistoryBuffer' in file.read('mmengine_checkpoint/data.pkl')
  read = read_weights(path)
  weight, bias = np.arange(6, dtype='f').reshape(2, 3), np.float32([0.5, -2])
  assert_same_bits(read.state_dict, {'weight': weight, 'bias': bias})
  assert read.meta['dataset_meta']['classes'] == ('wall', 'sky')


class Bomb:
  """Its pickle runs a command that leaves a file."""

  def __reduce__(self):
    return os.system, ('touch was_run',)


@pytest.mark.parametrize('old', [False, True])
def test_code_in_a_pickle_is_not_run(old, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  content = {'state_dict': {'x': torch.ones(1)}, 'meta': Bomb()}
  path = saved(tmp_path / 'x.pth', content, old)
  refused(r'wants to run posix\.system', read_weights, path)
  assert list(tmp_path.iterdir()) == [path]


def script(path):
  torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def flipped(path):
  content = saved(path, {'x': VALUES}).read_bytes()
  path.write_bytes(content.replace(VALUES.tobytes()[:4], b'abcd'))


OTHERS = [
  (script, 'holds more than weights'),
  (flipped, r"is damaged: 'x/data/0' in it does not .*\. Get it again"),
  (lambda x: zipfile.ZipFile(x, 'w').writestr('a', ''), "data.pkl, but 'a'"),
  (lambda x: x.touch(), 'neither a safetensors nor a PyTorch'),
  (lambda x: x.write_text('<html>'), 'neither a safetensors nor'),
  (lambda x: saved(x, {'epoch': 3, 'lr': 1}), 'no state dict.*keys epoch, lr'),
  (lambda x: saved(x, [torch.ones(2)]), 'no state dict'),
]


@pytest.mark.parametrize(('write', 'reason'), OTHERS)
def test_other_files_are_refused_in_our_words(write, reason, tmp_path):
  path = tmp_path / 'x.pth'
  write(path)
  message = refused(reason, read_weights, path)
  assert message.startswith(str(path))
  # PyTorch would advise to switch the restriction off.
  assert 'weights_only' not in message
  assert '\n' not in message


@pytest.mark.parametrize('share', [0.3, 0.7, 0.999])
@pytest.mark.parametrize('name', ['zip.pth', 'legacy.pth', 'x.safetensors'])
def test_truncated_file_is_refused(name, share, tmp_path):
  content = {'x': VALUES.repeat(30)}
  path = saved(tmp_path / name, content, name == 'legacy.pth')
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * share)])
  refused(r'damaged (or cut off\. Get|\(.*\); get) it', read_weights, path)


def test_without_torch_the_package_is_named(tmp_path, monkeypatch):
  path = saved(tmp_path / 'x.pth', STATE_DICT)
  monkeypatch.setitem(sys.modules, 'torch', None)
  refused(r'package torch .* pip install', read_weights, path)


ODD = [
  (torch.zeros(1).expand(10**12), r'odd of shape \(1000000000000,\) r'),
  (torch.zeros(4, 1).expand(4, 10**9), 'less data than its tensors'),
  (torch.zeros(2).to(torch.float8_e4m3fn), 'odd is of type torch.float8'),
  (torch.zeros(2, dtype=torch.complex64), 'type torch.complex64'),
  (torch.eye(2).to_sparse(), 'odd is of type torch.sparse_coo'),
]


@pytest.mark.parametrize(('odd', 'said'), ODD)
def test_tensors_that_are_no_arrays_are_refused(odd, said, tmp_path):
  path = saved(tmp_path / 'x.pth', {'conv.weight': torch.ones(3), 'odd': odd})
  refused(said, read_weights, path)


@pytest.mark.filterwarnings('ignore:torch.quantize_per_tensor')
def test_quantized_tensors_are_refused(tmp_path):
  odd = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
  path = saved(tmp_path / 'x.pth', {'conv.weight': torch.ones(3), 'odd': odd})
  refused(r'odd is of type torch\.qint8', read_weights, path)


def test_one_storage_of_a_thousand_tensors_is_refused(tmp_path):
  value = torch.zeros(100_000)
  path = saved(tmp_path / 'x.pth', {f'x{i}': value[:] for i in range(1000)})
  refused('less data than its tensors need', read_weights, path)


@pytest.mark.parametrize('name', ['x' * 10**6, 'a\nb', '\x1b[31mred'])
def test_names_that_spoil_messages_are_refused(name, tmp_path):
  path = saved(tmp_path / 'x.safetensors', {name: np.zeros(1)})
  message = refused('which is no name of a', read_weights, path)
  assert message.isprintable()
  assert len(message) < 400


# Without checksums, which are zeros then.
@serialization.patch('save.compute_crc32', False)
def test_tied_tensors_are_read(tmp_path):
  value = torch.arange(10.0)
  path = saved(tmp_path / 'x.pth', {'a': value, 'b': value, 'c': value[2:5]})
  whole = np.arange(10, dtype='f')
  expected = {'a': whole, 'b': whole, 'c': whole[2:5]}
  assert_same_bits(read_weights(path).state_dict, expected)


def test_packed_zeros_are_not_unpacked(tmp_path):
  whole = saved(tmp_path / 'x.pth', {'x': torch.zeros(10**6)})
  file, bomb = zipfile.ZipFile(whole), tmp_path / 'bomb.pth'
  with file, zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as out:
    for name in file.namelist():
      out.writestr(name, file.read(name))
  assert bomb.stat().st_size < 20_000
  refused(r'unpack to 0\.0 GB, many times its size', read_weights, bomb)


def test_float8_of_safetensors_is_named(tmp_path):
  path = tmp_path / 'x.safetensors'
  save_torch({'odd': torch.zeros(4).to(torch.float8_e4m3fn)}, path)
  refused('odd is of type F8_E4M3, which is not', read_weights, path)
