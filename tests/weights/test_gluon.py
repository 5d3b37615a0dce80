"""GluonCV's files, written here byte by byte."""

import numpy as np
import pytest
from golden.reference import assert_same_bits, manifest
from weights.built import refused

from resnest_jax.weights.files import read_weights
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import export_state_dict

CODES = {'f4': 0, 'f8': 1, 'f2': 2, 'u1': 3, 'i4': 4}
V2, V3 = 0xF993FAC9, 0xF993FACA


def number(value, size):
  return value.to_bytes(size, 'little')


def packed(arrays, magic=V2, storage=0):
  """A file's bytes, as MXNet's NDArray::Save and dmlc's streams lay them."""
  parts = [number(0x112, 8), number(0, 8), number(len(arrays), 8)]
  for x in arrays.values():
    parts += [number(magic, 4), number(storage, 4), number(x.ndim, 4)]
    parts += [number(size, 8) for size in x.shape]
    parts += [number(1, 4), number(0, 4), number(CODES[x.dtype.str[1:]], 4)]
    parts.append(x.tobytes())
  parts.append(number(len(arrays), 8))
  for name in arrays:
    parts += [number(len(name), 8), name.encode()]
  return b''.join(parts)


@pytest.mark.parametrize('magic', [V2, V3])
def test_names_of_the_real_library(magic, tmp_path):
  """Listed by GluonCV 0.10.5's deeplab_resnest50_ade in MXNet 1.9.1."""
  names = manifest('gluon/deeplab_resnest50_ade')
  shapes = {name: np.array(shape, 'f4') for name, shape in names.items()}
  (tmp_path / 'x.params').write_bytes(packed(shapes, magic))
  found = read_weights(tmp_path / 'x.params').state_dict
  expected = manifest('encoding/deeplab_resnest50_ade').items()
  assert {k: (*v,) for k, v in found.items()} == {
    k: v for k, v in expected if not k.endswith('num_batches_tracked')
  }


def test_other_types_and_classifiers(classifier, tmp_path):
  odd = {
    'conv1.0.weight': np.ones((2, 3), 'f8'),
    'layer1.0.bn1.gamma': np.arange(3, dtype='f2'),
  }
  (tmp_path / 'x').write_bytes(packed(odd))
  found = read_weights(tmp_path / 'x').state_dict
  gamma = odd.pop('layer1.0.bn1.gamma').astype('f4')
  assert_same_bits(found, odd | {'layer1.0.bn1.weight': gamma})
  whole = export_state_dict(*classifier, 'official')
  state_dict = {k: v for k, v in whole.items() if 'tracked' not in k}
  (tmp_path / 'x').write_bytes(packed(state_dict))
  weights = load_weights(tmp_path / 'x')
  assert (weights.kind, weights.description.task) == ('official', 'classifier')
  assert_same_bits(weights.state_dict, state_dict)


SMALL = {'a': np.ones((2, 3), 'f4'), 'b.gamma': np.ones(2, 'f4')}
WHOLE = packed(SMALL)
ONES = {'a.gamma': np.ones(1), 'a.weight': np.ones(1)}
ODD = [
  (packed({'a': np.ones(2, 'i4')}), r'array has type 4; accepted are \[0, 1'),
  (packed(SMALL, storage=1), 'with 0xf993fac9, 1, 2; accepted are dense'),
  (packed(SMALL, magic=0xF993FAC8), 'begins with 0xf993fac8'),
  (packed({'a': np.ones((0, 2), 'f4')}), r'before an array of shape \(0, 2\)'),
  (packed(ONES), '2 arrays, 1 names'),
  (WHOLE + b'x', 'and 1 more bytes'),
  (WHOLE[:16] + number(2**60, 8) + WHOLE[24:], f'ends before {2**60} entries'),
  (WHOLE[:36] + number(2**60, 8) + WHOLE[44:], 'before an array of shape'),
  (WHOLE[:32] + number(2**31, 4) + WHOLE[36:], f'0, {2**31}; accepted'),
  (WHOLE.replace(b'gamma', b'gam\xff\xff'), 'codec'),
]


@pytest.mark.parametrize(('content', 'said'), ODD)
def test_what_is_no_such_file_is_refused(content, said, tmp_path):
  (tmp_path / 'x').write_bytes(content)
  said = f'x is damaged, or no weights of GluonCV: .*{said}'
  refused(said, read_weights, tmp_path / 'x')


def test_files_that_are_cut_off_are_refused(tmp_path):
  for length in range(8, len(WHOLE)):
    (tmp_path / 'x').write_bytes(WHOLE[:length])
    refused('is damaged, or no weights', read_weights, tmp_path / 'x')
