"""Small networks whose weights are written, read and converted."""

import pytest
from golden.reference import TINY, variables_of

from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import create_segmentor


@pytest.fixture(scope='session')
def segmentor():
  """A segmentor and its variables."""
  model = create_segmentor(TINY | {'dtype': 'float32'})
  return model, variables_of(model)


@pytest.fixture(scope='session')
def classifier():
  """A classifier of 10 classes and its variables."""
  model = create_classifier('resnest14', 10, stem_width=8, width=8)
  return model, variables_of(model)
