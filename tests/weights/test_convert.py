"""The converter as a command, and from Python."""

import json

import jax
import numpy as np
import pytest
import torch
from golden.reference import TINY, filled_variables

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training.checkpoints import open_checkpoints, save
from resnest_jax.training.step import TrainState
from resnest_jax.weights import convert
from resnest_jax.weights.files import read_weights, write_weights
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import (
  export_state_dict,
  import_state_dict,
  variable_shapes,
)

SEGMENTOR = TINY | {'dtype': 'float32'}


@pytest.fixture(scope='module')
def segmentor():
  model = create_segmentor(SEGMENTOR)
  return model, filled_variables(variable_shapes(model))


@pytest.fixture(scope='module')
def pth(segmentor, tmp_path_factory):
  """mmsegmentation's file of the segmentor, and its state dict."""
  state_dict = export_state_dict(*segmentor, 'mmseg')
  tensors = {k: torch.from_numpy(v.copy()) for k, v in state_dict.items()}
  meta = {'CLASSES': list('abcdefg'), 'PALETTE': [[i] * 3 for i in range(7)]}
  path = tmp_path_factory.mktemp('pth') / 'pspnet.pth'
  torch.save({'meta': meta, 'state_dict': tensors}, path)
  return path, state_dict


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
  """A file of a classifier in the authors' names, and its state dict."""
  model = create_classifier('resnest14', 10, stem_width=8, width=8)
  variables = filled_variables(variable_shapes(model))
  state_dict = export_state_dict(model, variables, 'official')
  path = tmp_path_factory.mktemp('classifier') / 'net.pth'
  torch.save(
    {k: torch.from_numpy(v.copy()) for k, v in state_dict.items()}, path
  )
  return path, state_dict


def assert_same_bits(state_dict, expected):
  assert state_dict.keys() == expected.keys()
  for name, value in expected.items():
    assert state_dict[name].shape == value.shape
    assert state_dict[name].tobytes() == value.tobytes(), name


def test_there_and_back_again_as_commands(pth, run_script, tmp_path):
  path, state_dict = pth
  ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
  command = ('-m', 'resnest_jax.weights.convert')
  process = run_script(*command, path, '--out', ours)
  assert (
    'segmentor: a ResNeSt of (1, 1, 1, 1) blocks with pspnet, 7 classes'
    in (process.stdout)
  )
  assert (
    f'{len(state_dict)} tensors of kind mmseg, all placed' in process.stdout
  )
  run_script(*command, ours, '--out', theirs, '--to', 'mmseg')
  assert_same_bits(read_weights(theirs / 'model.pth').state_dict, state_dict)
  # What belongs to the weights went along both ways.
  about = json.loads((theirs / 'about.json').read_text())
  assert about['classes'] == list('abcdefg')
  assert about['palette'][6] == [6, 6, 6]
  assert about['model']['dilation_rule'] == 'mmseg'
  assert about['normalization']['std'] == [58.395, 57.12, 57.375]
  assert about['provenance']['from']['source'] == str(path)
  meta = torch.load(theirs / 'model.pth', weights_only=True)['meta']
  assert meta['CLASSES'] == list('abcdefg')
  # Once more: nothing is overwritten.
  process = run_script(*command, ours, '--out', theirs, status=1)
  assert process.stderr.startswith(f'error: {theirs} is there already')
  assert 'Traceback' not in process.stderr


@pytest.mark.parametrize('kind', ['official', 'timm', 'mmseg', 'ours'])
def test_classifier_to_every_kind_and_back(kind, classifier, tmp_path):
  path, state_dict = classifier
  arguments = ['--out', str(tmp_path / kind), '--to', kind]
  convert.main([str(path), *arguments])
  name = 'model.pth' if kind == 'mmseg' else 'model.safetensors'
  back = ['--out', str(tmp_path / 'back'), '--to', 'official']
  convert.main([str(tmp_path / kind / name), *back])
  weights = load_weights(tmp_path / 'back')
  assert_same_bits(weights.state_dict, state_dict)
  assert weights.description.task == 'classifier'
  assert weights.description.config['num_classes'] == 10


def test_classifier_loses_its_layer_by_name_only(classifier, tmp_path):
  path, state_dict = classifier
  out = tmp_path / 'backbone'
  convert.main([str(path), '--out', str(out), '--drop', 'fc'])
  weights = load_weights(out)
  assert weights.description.task == 'backbone'
  assert weights.provenance['from']['dropped'] == ['fc']
  model = weights.description.create()
  returned = export_state_dict(
    model, import_state_dict(model, weights.state_dict), 'official'
  )
  for name in ('fc.weight', 'fc.bias'):
    assert name not in returned
  assert_same_bits(
    returned, {k: v for k, v in state_dict.items() if k[:3] != 'fc.'}
  )


def test_segmentor_gives_its_backbone_to_official_names(pth, tmp_path):
  path, state_dict = pth
  out = str(tmp_path / 'x')
  with pytest.raises(UserError, match=r'no place for .*_head'):
    convert.main([str(path), '--out', out, '--to', 'official'])
  drop = ['--drop', 'decode_head', 'auxiliary_head']
  convert.main([str(path), '--out', out, '--to', 'official', *drop])
  exported = load_weights(out).state_dict
  assert exported.keys() >= {'conv1.0.weight', 'bn1.running_var'}
  np.testing.assert_array_equal(
    exported['layer4.0.conv2.fc1.bias'],
    state_dict['backbone.layer4.0.conv2.fc1.bias'],
  )


def test_run_of_train_goes_to_mmsegmentation(segmentor, tmp_path):
  _, variables = segmentor
  run = tmp_path / 'run'
  with open_checkpoints(run) as manager:
    state = TrainState(
      step=np.int32(7), opt_state={'empty': np.zeros(1)}, **variables
    )
    about = {
      'classes': list('abcdefg'),
      'palette': [[i, 2 * i, 3 * i] for i in range(7)],
      'dilation_rule': 'mmseg',
    }
    save(manager, jax.device_put(state), about)
    manager.wait_until_finished()
  config = {'name': 'tiny', 'model': SEGMENTOR}
  (run / 'config.json').write_text(json.dumps(config))
  out = tmp_path / 'x'
  convert.main([str(run), '--out', str(out), '--to', 'mmseg'])
  weights = load_weights(out / 'model.pth')
  assert weights.classes == list('abcdefg')
  assert weights.palette == [[i, 2 * i, 3 * i] for i in range(7)]
  assert weights.provenance['from']['step'] == 7
  backbone = str(tmp_path / 'backbone')
  drop = ['--drop', 'decode_head', 'auxiliary_head']
  convert.main([str(run), '--out', backbone, '--to', 'timm', *drop])
  exported = load_weights(backbone)
  assert exported.description.task == 'backbone'
  np.testing.assert_array_equal(
    exported.state_dict['conv1.0.weight'],
    weights.state_dict['backbone.stem.0.weight'],
  )
  assert_same_bits(weights.state_dict, export_state_dict(*segmentor, 'mmseg'))


def test_checkpoint_of_another_depth_writes_nothing(pth, tmp_path):
  path, state_dict = pth
  torn = {k: v for k, v in state_dict.items() if '.layer3.0.bn1.' not in k}
  tensors = {k: torch.from_numpy(v.copy()) for k, v in torn.items()}
  torch.save({'state_dict': tensors}, tmp_path / 'torn.pth')
  out = tmp_path / 'out'
  with pytest.raises(UserError, match=r'4 missing \(backbone\.layer3\.0\.bn1'):
    convert.main([str(tmp_path / 'torn.pth'), '--out', str(out)])
  with pytest.raises(UserError, match='not that of resnest101'):
    convert.main([str(path), '--out', str(out), '--backbone', 'resnest101'])
  assert not out.exists()


def test_left_over_tensors_write_nothing(pth, tmp_path):
  _, state_dict = pth
  tensors = {k: torch.from_numpy(v.copy()) for k, v in state_dict.items()}
  tensors['neck.weight'] = torch.ones(1)
  torch.save({'state_dict': tensors}, tmp_path / 'more.pth')
  out = ['--out', str(tmp_path / 'out')]
  with pytest.raises(UserError, match=r'1 left over \(neck\.weight\)'):
    convert.main([str(tmp_path / 'more.pth'), *out])
  assert not (tmp_path / 'out').exists()
  convert.main([str(tmp_path / 'more.pth'), *out, '--drop', 'neck'])
  assert (tmp_path / 'out' / 'model.safetensors').is_file()


def test_values_that_are_not_finite_are_pointed_out(pth, tmp_path, capsys):
  _, state_dict = pth
  bad = state_dict | {'decode_head.conv_seg.bias': np.full(7, np.nan, 'f')}
  write_weights(tmp_path / 'bad', 'official', bad, {})
  convert.main([str(tmp_path / 'bad'), '--out', str(tmp_path / 'out')])
  assert 'values that are not finite' in capsys.readouterr().out
