"""The network inside of an NNX program, as docs/architecture.md has it."""

import jax.numpy as jnp
import numpy as np
from evaluation.runs import OVERRIDES, write_run
from flax import nnx
from golden.reference import evaluate, random
from pages import blocks_of


def test_network_inside_of_nnx(tmp_path, monkeypatch):
  (block,) = blocks_of('architecture.md')
  small = OVERRIDES | {'model.head': 'fcn', 'model.radix': 1}
  write_run(tmp_path / 'runs' / 'pspnet', small)
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(block, names)
  assert names['logits'].shape == (2, 8, 8, 150)

  network, model = names['network'], names['model']
  images = random(2, 64, 64, 3).astype(np.float32)
  trained = evaluate(model, names['variables'], images).logits
  assert np.abs(trained).max() > 0.1

  # A loss of (logits / T)^2 falls by twice its value at T = 1.
  gradient = nnx.jit(nnx.grad(lambda net, x: jnp.sum(net(x) ** 2)))
  slope = gradient(network, images)['temperature'][...]
  np.testing.assert_allclose(slope, -2 * np.sum(trained**2.0), rtol=1e-4)
  network.temperature[...] = jnp.array(2.0)
  halved = names['predict'](network, images)
  np.testing.assert_allclose(2 * halved, trained, rtol=1e-4, atol=1e-5)
