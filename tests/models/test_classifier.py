"""Classifiers against the authors' code and timm, and what they refuse."""

import numpy as np
import pytest
from golden import reference
from golden.reference import evaluate, relative_error
from lengths import others_long

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.layers import zero_outside
from resnest_jax.weights.state_dict import import_state_dict

pytestmark = pytest.mark.usefixtures('float64')

FAST = 'official/resnest50_fast_2s2x40d'
TIMM = 'resnest14d', 'resnest50d', 'resnest50d_1s4x24d', 'resnest101e'
GOLDEN = ['official/resnest50', FAST, *(f'timm/{name}' for name in TIMM)]


@pytest.mark.parametrize('name', others_long(GOLDEN, FAST))
def test_logits_are_the_references(name):
  golden = reference.load(f'classify_{name.replace("/", "_")}')
  model = create_classifier(reference.backbone_of(name), dtype='float64')
  state_dict = reference.filled(reference.manifest(name))
  x = reference.images(int(golden['seed']), 2, *golden['hw'])
  logits = evaluate(model, import_state_dict(model, state_dict), x)
  assert logits.shape == (2, 1000)
  assert relative_error(logits, golden['logits']) < 1e-8


def test_logits_in_a_padded_canvas_are_those_of_the_image_alone():
  model = create_classifier('resnest14', 5, width=8, dtype='float64')
  variables, size = reference.variables_of(model), np.array([[41, 57]])
  padded = zero_outside(reference.images(0, 1, 64, 64), size)
  ours = evaluate(model, variables, padded, size)
  alone = evaluate(model, variables, padded[:, :41, :57])
  assert relative_error(ours, alone) < 1e-9


def test_unknown_keyword_lists_the_accepted():
  with pytest.raises(UserError, match=r'not know depth; accepted .*radix'):
    create_classifier('resnest50', depth=50)
