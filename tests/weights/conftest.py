"""Small networks whose weights are written, read and converted."""

import pytest
from golden.reference import variables_of
from weights.built import NETWORK, encoding_network

from resnest_jax import create_classifier, create_segmentor, export_state_dict


@pytest.fixture(scope='session')
def segmentor():
  """A segmentor and its variables."""
  model = create_segmentor(NETWORK)
  return model, variables_of(model)


@pytest.fixture(scope='session')
def mmseg(segmentor):
  """Its state dict in mmsegmentation's names."""
  return export_state_dict(*segmentor, 'mmseg')


@pytest.fixture(scope='session')
def classifier():
  """A classifier of 10 classes and its variables."""
  model = create_classifier('resnest14', 10, stem_width=8, width=8)
  return model, variables_of(model)


@pytest.fixture(scope='session')
def encoding():
  """The state dict of PyTorch-Encoding's DeepLabV3, as its class has it."""
  return export_state_dict(*encoding_network(), 'encoding')
