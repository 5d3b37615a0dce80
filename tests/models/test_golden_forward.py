"""The full-size rows against mmsegmentation's stored logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden import reference
from golden.reference import MMSEG_HEADS, evaluate, relative_error
from lengths import others_long

from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.layers import resize
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import import_state_dict

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('float64')]


def images(golden):
  return reference.images(int(golden['seed']), 2, *golden['hw'])


def run(head, dtype):
  """Golden numbers and our output of both rows of a head."""
  # Weights are filled by name, so the rows differ in the classifiers alone: one
  # network with the classes of both, ADE20K's first, computes both.
  rows = [f'ade20k_{head}', f'cityscapes_{head}']
  goldens = [reference.load(f'forward_{row}') for row in rows]
  shapes = [reference.manifest(f'mmseg/{row}') for row in rows]
  state_dict, other = map(reference.filled, shapes)
  for name in state_dict:
    if '.conv_seg.' in name:
      state_dict[name] = np.concatenate([state_dict[name], other[name]])
  changes = {'head': head, 'num_classes': 169, 'dtype': dtype}
  model = create_segmentor(reference.CONFIG | changes)
  x = np.concatenate([*map(images, goldens)])
  output = evaluate(model, import_state_dict(model, state_dict), x)
  yield goldens[0], [x[:2, ..., :150] for x in output]
  yield goldens[1], [x[2:, ..., 150:] for x in output]


@pytest.mark.parametrize(
  'head', others_long(MMSEG_HEADS, 'pspnet', 'deeplabv3plus')
)
def test_logits_are_mmsegmentations(head):
  for golden, output in run(head, 'float64'):
    for name, ours in zip(('logits', 'aux_logits'), output, strict=True):
      ours = ours.transpose(0, 3, 1, 2)
      assert ours.shape == golden[name].shape
      assert relative_error(ours, golden[name]) < 1e-8


def test_float32_labels_are_mmsegmentations():
  for golden, (ours, _) in run('pspnet', 'float32'):
    assert ours.dtype == jnp.float32
    expected = jnp.asarray(golden['logits'].transpose(0, 2, 3, 1))
    size = tuple(golden['hw'])
    labels = [resize(x, size).argmax(-1) for x in (ours, expected)]
    assert np.mean(labels[0] == labels[1]) >= 0.999


@pytest.mark.parametrize('rule', ['official', 'timm'])
def test_dilated_stages_are_those_of_the_rules_source(rule):
  """The authors' `dilated=True` and timm's `output_stride=8`."""
  golden = reference.load(f'dilated_{rule}_resnest26')
  options = {'output_stride': 8, 'dilation_rule': rule, 'dtype': 'float64'}
  model = create_classifier('resnest26', **options).backbone
  state_dict = reference.filled(reference.manifest('timm/resnest26d'))
  variables = import_state_dict(model, state_dict, drop=('fc',))
  features, _ = evaluate(model, variables, images(golden))
  for stage in (3, 4):
    ours = features[stage - 1].transpose(0, 3, 1, 2)
    assert ours.shape[2:] == (8, 12)
    every = ours.ravel()[:: int(golden['every'])]
    assert relative_error(every, golden[f'stage{stage}']) < 1e-8
