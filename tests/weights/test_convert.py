"""The converter as a command, and from Python."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden.reference import TINY, assert_same_bits, variables_of

import resnest_jax as rj
from resnest_jax.checkpoints.state import TrainState
from resnest_jax.checkpoints.store import open_checkpoints, save
from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.weights import convert
from resnest_jax.weights.files import write_weights
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import KINDS, export_state_dict

COMMAND = ('-m', 'resnest_jax.weights.convert')
NETWORK = TINY | {'dtype': 'float32'}
HEADS = ['--drop', 'decode_head', 'auxiliary_head']


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
def official(classifier, tmp_path_factory):
  """A file of a classifier in the authors' names, and its state dict."""
  state_dict = export_state_dict(*classifier, 'official')
  folder = tmp_path_factory.mktemp('classifier') / 'net'
  path, _ = write_weights(folder, 'official', state_dict, {})
  return path, state_dict


def converted(source, out, *flags):
  """What the converter writes."""
  convert.main([str(source), '--out', str(out), *flags])
  return load_weights(out)


def test_there_and_back_again(pth, run_script, tmp_path):
  path, state_dict = pth
  ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
  process = run_script(*COMMAND, path, '--out', ours)
  assert ' blocks with pspnet, 7 classes, dilation rule mmse' in process.stdout
  back = converted(ours, theirs, '--to', 'mmseg')
  assert_same_bits(back.state_dict, state_dict)
  # What belongs to the weights went along both ways.
  about = json.loads((theirs / 'about.json').read_text())
  assert about['normalization']['std'] == [58.395, 57.12, 57.375]
  assert about['provenance']['from']['source'] == path.name
  # Nothing is overwritten.
  process = run_script(*COMMAND, ours, '--out', theirs, status=1)
  assert process.stderr.startswith(f'error: {theirs} is there already')
  assert 'Traceback' not in process.stderr


@pytest.mark.parametrize('kind', KINDS)
def test_classifier_to_every_kind_and_back(kind, official, tmp_path, capsys):
  path, state_dict = official
  there = converted(path, tmp_path / kind, '--to', kind)
  first, second, assumed, third = capsys.readouterr().out.splitlines()
  assert first.startswith('classifier: a ResNeSt of (1, 1, 1, 1) blocks, 10 ')
  assert 'rule' not in first  # Undilated models have none.
  assert "does not say: ImageNet's normalisation (RGB" in assumed
  assert f" / timm's names: {len(state_dict)} tensors, all placed" in second
  assert f' names: {len(there.state_dict)} tensors, in ' in third
  weights = converted(tmp_path / kind, tmp_path / 'back', '--to', 'official')
  assert_same_bits(weights.state_dict, state_dict)


def test_classifier_loses_its_layer_by_name_only(official, tmp_path):
  path, state_dict = official
  weights = converted(path, tmp_path / 'backbone', '--drop', 'fc')
  assert weights.description.task == 'backbone'
  assert weights.provenance['from']['dropped'] == ['fc']
  assert_same_bits(
    export_state_dict(*weights.create(), 'official'),
    {k: v for k, v in state_dict.items() if k[:3] != 'fc.'},
  )


@pytest.fixture(scope='module')
def run(segmentor, tmp_path_factory):
  """A training's folder: steps 7 and, with zeros and the better score, 9."""
  _, variables = segmentor
  workdir = tmp_path_factory.mktemp('runs') / 'tiny'
  config = {'model': TINY | {'dtype': 'float32'}}
  config |= {'name': 'tiny', 'data': {'image_scale': [99, 66]}}
  about = {
    'config': config,
    'classes': list('abcdefg'),
    'palette': [[i, 2 * i, 3 * i] for i in range(7)],
    'dilation_rule': 'mmseg',
  }
  zeros = jax.tree.map(np.zeros_like, variables)
  with open_checkpoints(workdir, keep=2) as manager:
    for step, tree, score in ((7, zeros, 0.5), (9, variables, 0.25)):
      empty = {'empty': np.zeros(1)}
      state = TrainState(step=np.int32(step), opt_state=empty, **tree)
      more = about | {'step': step}
      save(manager, jax.device_put(state), more, {'mIoU': score})
  return workdir


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'config': 5}, 'config is 5; it must be an object'),
    ({'config': {'model': TINY}}, 'it has no data'),
    ({'config': {'model': TINY | {'dtype': 'x'}, 'data': {}}}, "dtype is 'x'"),
    (
      {'config': {'model': NETWORK | {'stage_sizes': [10**9] * 4}, 'data': {}}},
      r'stage_sizes is \[1000000000, ',
    ),
    (
      {'config': {'model': NETWORK, 'data': {'image_scale': 30_000}}},
      'image_scale is 30000; it must be two',
    ),
    ({'palette': [[0, 0, 300]]}, r'palette is \[\[0, 0, 300\]\]'),
    ({'classes': [1, 2]}, r'classes is \[1, 2\]'),
  ],
)
def test_hostile_runs_are_refused(changes, said, segmentor, tmp_path):
  config = {'model': NETWORK, 'name': 'x', 'data': {}}
  about = {
    'config': config,
    'dilation_rule': 'mmseg',
    'step': 1,
    'classes': None,
  }
  state = TrainState(
    step=np.int32(1), opt_state={'empty': np.zeros(1)}, **segmentor[1]
  )
  with open_checkpoints(tmp_path) as manager:
    save(manager, jax.device_put(state), about | changes, None)
  with pytest.raises(UserError, match=said):
    load_weights(tmp_path)


def test_every_source_has_the_same_weights(run, pth, run_script, tmp_path):
  """A run's, converted or not, and a published checkpoint's."""
  out = tmp_path / 'pth'
  assert run_script(*COMMAND, run, '--out', out, '--to', 'mmseg').stderr == ''
  weights = load_weights(out)
  assert weights.provenance['from']['step'] == 9
  assert weights.classes == list('abcdefg')
  assert weights.palette == [[i, 2 * i, 3 * i] for i in range(7)]
  assert weights.image_scale == [99, 66]
  meta = torch.load(out / 'model.pth', weights_only=True)['meta']
  assert meta['CLASSES'] == meta['dataset_meta']['classes'] == weights.classes
  assert meta['PALETTE'] == meta['dataset_meta']['palette'] == weights.palette
  assert_same_bits(weights.state_dict, pth[1])

  converted(run, tmp_path / 'ours')
  model, variables, about = rj.load_pretrained(run)
  for source in (out, tmp_path / 'ours', pth[0]):
    same, others, _ = rj.load_pretrained(source)
    assert same == model
    jax.tree.map(np.testing.assert_array_equal, others, variables)
  backbone, variables, about = rj.load_pretrained(
    run, drop=HEADS[1:], dtype='bfloat16'
  )
  assert about['task'] == 'backbone'
  assert backbone == model.backbone.clone(dtype=backbone.dtype)
  assert backbone.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('source', 'kind'), [('run', 'timm'), ('pth', 'official')]
)
def test_backbone_of_a_segmentor(source, kind, run, pth, tmp_path):
  source = {'run': run, 'pth': pth[0]}[source]
  out = tmp_path / 'backbone'
  with pytest.raises(UserError, match=r'no place .*--drop decode_head aux'):
    converted(source, out, '--to', kind)
  exported = converted(source, out, '--to', kind, *HEADS)
  assert exported.description.task == 'backbone'
  assert exported.palette is not None
  for ours, theirs in (
    ('conv1.0.weight', 'stem.0.weight'),
    ('bn1.running_var', 'stem.7.running_var'),
    ('layer4.0.conv2.fc1.bias', 'layer4.0.conv2.fc1.bias'),
  ):
    np.testing.assert_array_equal(
      exported.state_dict[ours], pth[1][f'backbone.{theirs}']
    )


def test_best_checkpoint_of_a_run(run, tmp_path):
  best = ['--checkpoint', 'best']
  weights = converted(run, tmp_path / 'x', *best)
  assert weights.provenance['from']['step'] == 7
  assert not weights.state_dict['params/backbone/stem_conv1/kernel'].any()
  with pytest.raises(UserError, match=r"x is not the workdir .* 'best'"):
    converted(tmp_path / 'x', tmp_path / 'y', *best)


def test_weights_that_are_not_finite_write_nothing(pth, tmp_path):
  bad = {'decode_head.conv_seg.bias': np.full(7, np.nan, 'f')}
  write_weights(tmp_path / 'bad', 'mmseg', pth[1] | bad, {})
  with pytest.raises(UserError, match=r'1 of \d+ .*: decode_head\.conv_seg\.'):
    converted(tmp_path / 'bad', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_assumed_backbone_is_said_and_can_be_named(tmp_path, capsys):
  """Of two backbones with one shape, through a file of ours."""
  named = 'resnest50_fast_2s1x64d'
  model = create_classifier(named, 4)
  state_dict = export_state_dict(model, variables_of(model), 'timm')
  write_weights(tmp_path / 'theirs', 'timm', state_dict, {})
  flags = ([], [], ['--backbone', named])
  paths = [tmp_path / x for x in ('theirs', 'guessed', 'again', 'named')]
  known = [
    converted(source, out, *more).provenance['backbone_known']
    for source, out, more in zip(paths, paths[1:], flags, strict=False)
  ]
  assert known == [False, False, True]
  lines = capsys.readouterr().out.splitlines()
  said = [line for line in lines if line.startswith('classifier')]
  assumed = f'resnest50 (assumed from shapes; {named} has the same: --backbone'
  assert said[0].startswith(f'classifier: {assumed}')
  assert said[1] == said[0]
  assert said[2].startswith('classifier: resnest50_fast_2s1x64d, 4 classes')
  with pytest.raises(UserError, match=r'known to be of .*_2s1x64d, not of res'):
    converted(paths[3], tmp_path / 'x', '--backbone', 'resnest50')


def test_segmentor_without_an_auxiliary_head(pth, tmp_path, capsys):
  """As mmsegmentation trains it with auxiliary_head=None."""
  path, state_dict = pth
  kept = {k: v for k, v in state_dict.items() if k[:10] != 'auxiliary_'}
  write_weights(tmp_path / 'theirs', 'mmseg', kept, {})
  weights = converted(tmp_path / 'theirs', tmp_path / 'ours')
  assert 'pspnet and no auxiliary head, 7 ' in capsys.readouterr().out
  model, variables = weights.create()
  assert_same_bits(export_state_dict(model, variables, 'mmseg'), kept)
  # Dropping it gives the same.
  converted(path, tmp_path / 'whole')
  for source in (path, tmp_path / 'whole'):
    dropped = load_weights(source, drop=['auxiliary_head'])
    assert dropped.description.create() == model


def test_python_of_the_docs(run, official, root, tmp_path, monkeypatch):
  """Its blocks run as printed, on a small classifier and a small run."""
  text = (root / 'docs' / 'weights.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  converted(official[0], tmp_path / 'weights' / 'resnest50')
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'pspnet').symlink_to(run)
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(blocks[0], names)
  assert names['logits'].shape == (1, 10)
  exec(blocks[1], names)
  assert names['label_map'].shape == (1, 8, 8)
  assert names['about']['classes'] == list('abcdefg')
  assert names['about']['provenance']['step'] == 7
  exec(blocks[2], names)
  assert_same_bits(names['state_dict'], official[1])
  exec(blocks[3], names)
  assert [names[f'c{i}'].shape[1] for i in range(1, 5)] == [16, 8, 8, 8]
