"""The converter as a command, and from Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden.reference import TINY, assert_same_bits, variables_of
from pages import blocks_of
from weights.built import (
  CLASSES,
  NETWORK,
  PALETTE,
  changed,
  converted,
  refused,
  saved,
  written,
)

import resnest_jax as rj
from resnest_jax.checkpoints.state import TrainState
from resnest_jax.checkpoints.store import open_checkpoints, save
from resnest_jax.config import load_config
from resnest_jax.models.classifier import Classifier
from resnest_jax.weights.files import WITH_TORCH
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.start import start_from
from resnest_jax.weights.state_dict import KINDS

COMMAND = ('-m', 'resnest_jax.weights.convert')
HEADS = ('decode_head', 'auxiliary_head')
DATA = {'image_scale': [99, 66]}
# Of a training.
ABOUT = {
  'config': {'name': 'tiny', 'model': NETWORK, 'data': DATA},
  **{'classes': CLASSES, 'palette': PALETTE, 'dilation_rule': 'mmseg'},
}


@pytest.fixture(scope='module')
def pth(mmseg, tmp_path_factory):
  """mmsegmentation's file of the segmentor."""
  meta = {'CLASSES': CLASSES, 'PALETTE': PALETTE}
  path = tmp_path_factory.mktemp('pth') / 'pspnet.pth'
  return saved(path, {'meta': meta, 'state_dict': mmseg})


@pytest.fixture(scope='module')
def official(classifier):
  """The state dict of a classifier in the authors' names."""
  return rj.export_state_dict(*classifier, 'official')


def test_there_and_back_again(pth, mmseg, run_script, tmp_path, capsys):
  ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
  converted(pth, ours)
  said = capsys.readouterr().out
  assert ' blocks with pspnet, 7 classes, dilation rule mmse' in said
  back = converted(ours, theirs, '--to', 'mmseg')
  assert_same_bits(back.state_dict, mmseg)
  # What belongs to the weights went along both ways.
  assert back.normalization['std'] == [58.395, 57.12, 57.375]
  assert back.provenance['from']['from']['source'] == pth.name
  # Nothing is overwritten.
  process = run_script(*COMMAND, ours, '--out', theirs, status=1)
  assert process.stderr.startswith(f'error: {theirs} is there already')
  assert 'Traceback' not in process.stderr


@pytest.mark.parametrize('kind', KINDS)
def test_classifier_to_every_kind_and_back(kind, official, tmp_path, capsys):
  path = saved(tmp_path / 'x.safetensors', official)
  there = converted(path, tmp_path / kind, '--to', kind)
  first, second, assumed, third = capsys.readouterr().out.splitlines()
  assert first.startswith('classifier: a ResNeSt of (1, 1, 1, 1) blocks, 10 ')
  assert 'rule' not in first  # Undilated models have none.
  assert "does not say: ImageNet's normalisation (RGB" in assumed
  assert f" / timm's names: {len(official)} tensors, all placed" in second
  assert f' names: {len(there.state_dict)} tensors, in ' in third
  back = converted(tmp_path / kind, tmp_path / 'back', '--to', 'official')
  assert_same_bits(back.state_dict, official)
  if kind in WITH_TORCH:
    content = torch.load(tmp_path / kind / 'model.pth', weights_only=True)
    # By these, detectron2 looks for the names below `backbone.bottom_up`.
    assert content.get('matching_heuristics', False) == (kind == 'detectron2')
    key = 'model' if kind == 'detectron2' else 'state_dict'
    assert content[key].keys() == there.state_dict.keys()


def test_classifier_loses_its_layer_by_name_only(official, tmp_path):
  path = saved(tmp_path / 'x.safetensors', official)
  weights = converted(path, tmp_path / 'backbone', '--drop', 'fc')
  assert weights.description.task == 'backbone'
  assert weights.provenance['from']['dropped'] == ['fc']
  left = {k: v for k, v in official.items() if k[:3] != 'fc.'}
  assert_same_bits(rj.export_state_dict(*weights.create(), 'official'), left)


def trained(workdir, about, *checkpoints):
  """A training's folder; its checkpoints are steps, variables and scores."""
  with open_checkpoints(workdir, keep=2) as manager:
    for step, variables, score in checkpoints:
      state = TrainState(np.int32(step), opt_state=np.zeros(1), **variables)
      more = about | {'step': step}
      save(manager, jax.device_put(state), more, {'mIoU': score})
  return workdir


@pytest.fixture(scope='module')
def run(segmentor, tmp_path_factory):
  """A training of steps 7 and, with zeros and the better score, 9."""
  workdir, variables = tmp_path_factory.mktemp('runs') / 'pspnet', segmentor[1]
  zeros = jax.tree.map(np.zeros_like, variables)
  return trained(workdir, ABOUT, (7, zeros, 0.5), (9, variables, 0.25))


@pytest.fixture(scope='module')
def classifier_run(classifier, tmp_path_factory):
  """A training of a classifier, as the rows of ImageNet are."""
  config = load_config('configs/imagenet_resnest50.py').to_dict()
  widths = {'backbone': 'resnest14', 'stem_width': 8, 'width': 8}
  config['model'] |= widths | {'num_classes': 10}
  about = {'config': config, 'classes': list('abcdefghij'), 'palette': None}
  about['dilation_rule'] = 'official'
  workdir = tmp_path_factory.mktemp('runs') / 'imagenet'
  return trained(workdir, about, (7, classifier[1], 0.5))


def test_a_trained_classifier_is_applied_and_begins_others(
  classifier_run, classifier, segmentor, official, tmp_path
):
  """By us, and by others after a conversion."""
  for kind in ('timm', 'mmseg', 'ours'):
    there = converted(classifier_run, tmp_path / kind, '--to', kind)
    assert there.description.task == 'classifier'
    assert there.classes == list('abcdefghij')
    back = converted(tmp_path / kind, tmp_path / f'{kind}_', '--to', 'official')
    assert_same_bits(back.state_dict, official)
  model, variables, _ = rj.load_checkpoint(classifier_run)
  assert isinstance(model, Classifier)
  jax.tree.map(np.testing.assert_array_equal, variables, classifier[1])
  assert rj.load_pretrained(classifier_run)[0] == model
  same, notes = start_from(model, variables_of(model, 1), str(classifier_run))
  jax.tree.map(np.testing.assert_array_equal, same, variables)
  assert notes[0].endswith('(step 7)')
  found, notes = start_from(*segmentor, str(classifier_run))
  for key, tree in found.items():
    expected = segmentor[1][key] | {'backbone': variables[key]['backbone']}
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
  assert "the classifier's layer fc is left out" in notes


HOSTILE = [
  ('config', 5, 'config is 5; it must be an object'),
  ('config', {'model': TINY}, 'it has no data'),
  ('config.model.dtype', 'x', "dtype is 'x'"),
  ('config.model.stage_sizes', [10**9] * 4, r'stage_sizes is \[1000000000, '),
  ('config.data.image_scale', 30_000, 'image_scale is 30000; it must be two'),
  ('palette', [[0, 0, 300]], r'palette is \[\[0, 0, 300\]\]'),
  ('classes', [1, 2], r'classes is \[1, 2\]'),
]


@pytest.mark.parametrize(('where', 'value', 'said'), HOSTILE)
def test_hostile_runs_are_refused(where, value, said, segmentor, tmp_path):
  trained(tmp_path, changed(ABOUT, where, value), (1, segmentor[1], 0.5))
  refused(said, load_weights, tmp_path)


def test_every_source_is_the_same(run, pth, mmseg, run_script, tmp_path):
  """A run's, converted or not, and a published checkpoint's."""
  out = tmp_path / 'pth'
  assert run_script(*COMMAND, run, '--out', out, '--to', 'mmseg').stderr == ''
  weights = load_weights(out)
  assert weights.provenance['from']['step'] == 9
  assert (weights.classes, weights.palette) == (CLASSES, PALETTE)
  assert weights.image_scale == [99, 66]
  meta = torch.load(out / 'model.pth', weights_only=True)['meta']
  both = {'classes': CLASSES, 'palette': PALETTE}
  capitals = {name.upper(): value for name, value in both.items()}
  assert meta == {'dataset_meta': both, **capitals}
  assert_same_bits(weights.state_dict, mmseg)

  converted(run, tmp_path / 'ours')
  model, variables, _ = rj.load_pretrained(run)
  for source in (out, tmp_path / 'ours', pth):
    same, others, _ = rj.load_pretrained(source)
    assert same == model
    jax.tree.map(np.testing.assert_array_equal, others, variables)
  backbone, _, about = rj.load_pretrained(run, drop=HEADS, dtype='bfloat16')
  assert about['task'] == 'backbone'
  assert backbone == model.backbone.clone(dtype=jnp.bfloat16)


OF_TWO = [('run', 'timm'), ('pth', 'official')]


@pytest.mark.parametrize(('source', 'kind'), OF_TWO)
def test_backbone_of_a_segmentor(source, kind, request, mmseg, tmp_path):
  source, out = request.getfixturevalue(source), tmp_path / 'backbone'
  said = r'no place .*--drop decode_head aux'
  refused(said, converted, source, out, '--to', kind)
  exported = converted(source, out, '--to', kind, '--drop', *HEADS)
  assert exported.description.task == 'backbone'
  assert exported.palette == PALETTE
  names = ('conv1.0.weight', 'bn1.running_var', 'layer4.0.conv2.fc1.bias')
  theirs = ('stem.0.weight', 'stem.7.running_var', 'layer4.0.conv2.fc1.bias')
  found = [exported.state_dict[name] for name in names]
  expected = [mmseg[f'backbone.{name}'] for name in theirs]
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_encoding_there_and_back(encoding, tmp_path, capsys):
  path = saved(tmp_path / 'theirs.pth', encoding)
  ours, back = tmp_path / 'ours', tmp_path / 'back'
  converted(path, ours)
  said = capsys.readouterr().out
  assert ' with encoding_deeplabv3, 7 classes, dilation rule official, ' in said
  assert f"read with PyTorch-Encoding's names: {len(encoding)} tensors" in said
  weights = converted(ours, back, '--to', 'encoding')
  assert "with PyTorch-Encoding's names" in capsys.readouterr().out
  assert_same_bits(weights.state_dict, encoding)
  assert weights.image_scale == [520, 520]
  # What its class loads.
  content = torch.load(back / 'model.pth', weights_only=True)
  assert content['state_dict'].keys() == encoding.keys()
  said = r'mmsegm.* of encoding_deeplabv3\. Leave .*\(--to encoding\)'
  refused(said, converted, ours, tmp_path / 'x', '--to', 'mmseg')
  bare = converted(path, tmp_path / 'bare', '--drop', 'auxlayer')
  assert bare.description.config['aux_channels'] is None


def test_best_checkpoint_of_a_run(run, tmp_path):
  best = ['--checkpoint', 'best']
  weights = converted(run, tmp_path / 'x', *best)
  assert weights.provenance['from']['step'] == 7
  assert not weights.state_dict['params/backbone/stem_conv1/kernel'].any()
  said = r"x is not the workdir .* 'best'"
  refused(said, converted, tmp_path / 'x', tmp_path / 'y', *best)


def test_weights_that_are_not_finite_write_nothing(mmseg, tmp_path):
  bad = {'decode_head.conv_seg.bias': np.full(7, np.nan, 'f')}
  path = saved(tmp_path / 'bad.pth', mmseg | bad)
  said = r'1 of \d+ .*: decode_head\.conv_seg\.'
  refused(said, converted, path, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_assumed_backbone_is_said_and_can_be_named(tmp_path, capsys):
  """Of two backbones with one shape, through a file of ours."""
  named = 'resnest50_fast_2s1x64d'
  model = rj.create_classifier(named, 4)
  path = written(tmp_path / 'theirs', (model, variables_of(model)), 'timm')
  guessed = converted(path, tmp_path / 'guessed')
  again = converted(tmp_path / 'guessed', tmp_path / 'again')
  sure = converted(tmp_path / 'again', tmp_path / 'sure', '--backbone', named)
  known = [x.provenance['backbone_known'] for x in (guessed, again, sure)]
  assert known == [False, False, True]
  lines = capsys.readouterr().out.splitlines()
  first, second, third = (x for x in lines if x.startswith('classifier'))
  assumed = f'resnest50 (assumed from shapes; {named} has the same: --backbone'
  assert first.startswith(f'classifier: {assumed}')
  assert second == first
  assert third.startswith(f'classifier: {named}, 4 classes')
  other = ('--backbone', 'resnest50')
  said = r'known to be of .*_2s1x64d, not of res'
  refused(said, converted, tmp_path / 'sure', tmp_path / 'x', *other)


def test_segmentor_without_an_auxiliary_head(pth, mmseg, tmp_path, capsys):
  """As mmsegmentation trains it with auxiliary_head=None."""
  kept = {k: v for k, v in mmseg.items() if k[:10] != 'auxiliary_'}
  path = saved(tmp_path / 'theirs.pth', kept)
  weights = converted(path, tmp_path / 'ours')
  assert 'pspnet and no auxiliary head, 7 ' in capsys.readouterr().out
  assert_same_bits(rj.export_state_dict(*weights.create(), 'mmseg'), kept)
  # Dropping it gives the same.
  converted(pth, tmp_path / 'whole')
  for source in (pth, tmp_path / 'whole'):
    dropped = load_weights(source, drop=HEADS[1:])
    assert dropped.description.create() == weights.description.create()


def test_python_of_the_docs(run, official, tmp_path, monkeypatch):
  """Its blocks run as printed, on a small classifier and a small run."""
  blocks = blocks_of('weights.md')
  path = saved(tmp_path / 'x.safetensors', official)
  converted(path, tmp_path / 'weights' / 'resnest50')
  (tmp_path / 'runs').symlink_to(run.parent)
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(blocks[0], names)
  assert names['logits'].shape == (1, 10)
  exec(blocks[1], names)
  assert names['label_map'].shape == (1, 8, 8)
  assert names['about']['classes'] == CLASSES
  assert names['about']['provenance']['step'] == 7
  exec(blocks[2], names)
  assert_same_bits(names['state_dict'], official)
  exec(blocks[3], names)
  rows = {name: x.shape[1] for name, x in names['features'].items()}
  assert rows == {'c2': 16, 'c3': 8, 'c4': 8, 'c5': 8}
