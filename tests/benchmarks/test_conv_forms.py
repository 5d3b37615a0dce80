"""The ways that `benchmarks/conv_forms.py` compares are one function."""

import jax
import numpy as np
import pytest
from golden.reference import quick_jit, relative_error

from benchmarks import conv_forms


def gradients(function, arguments):
  def run(*arguments):
    outputs, pull_back = jax.vjp(function, *arguments)
    return outputs, pull_back(outputs)

  return jax.tree.leaves(quick_jit(run)(*arguments))


@pytest.mark.parametrize(
  'layer',
  [layer for layer in conv_forms.layers(2, 32, 16) if layer.others],
  ids=lambda layer: f'{layer.kind}: {layer.name}',
)
def test_other_ways_are_the_same_function(layer):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    arguments = [rng.standard_normal(shape) for shape in layer.shapes]
    expected = gradients(layer.function, arguments)
    for name, function in layer.others.items():
      found = gradients(function, arguments)
      for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-10, name
