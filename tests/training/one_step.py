"""One training step of a tiny network, to be compared across meshes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from golden.reference import QUICK, TINY, filled_variables

from resnest_jax.checkpoints.state import abstract_state, start_state
from resnest_jax.config import load_config
from resnest_jax.losses.objective import create_loss
from resnest_jax.models import segmentor
from resnest_jax.sharding import host_share, replicate, shard_batch
from resnest_jax.training.optimizer import create_optimizer
from resnest_jax.training.step import make_train_step

CONFIG = load_config('configs/ade20k_pspnet.py')
BATCH = 4


class AllHeads(nn.Module):
  """The four heads on one backbone, so that it is compiled once."""

  backbone: Any
  heads: Any

  def __call__(self, images, *, train, size=None):
    features, sizes = self.backbone(images, train=train, size=size)
    *logits, finer = (
      head(features, train=train, sizes=sizes) for head in self.heads
    )
    # As if the three had 21 classes together, of which 7 occur.
    return segmentor.SegmentorOutput(jnp.concatenate(logits, -1), finer)


def create_model():
  models = [
    segmentor.create_segmentor(TINY | {'head': head})
    for head in segmentor.HEADS
  ]
  return AllHeads(models[0].backbone, tuple(x.decode_head for x in models))


def training_batch(batch=BATCH, height=64, width=24):
  """What the pipeline yields, with padding and ignored pixels."""
  rng = np.random.default_rng(0)
  shape = (batch, height, width)
  size = np.tile(np.int32([height, width]), (batch, 1))
  size[1, 0], size[-2, 1] = height * 5 // 8, width * 2 // 3
  labels = rng.integers(0, 7, shape).astype(np.uint8)
  labels[rng.random(shape) < 0.2] = 255
  photometric = np.tile(np.float32([0, 1, 1, 0, 1]), (batch, 1))
  photometric[3] = [20, 1.2, 0.8, 5, 1]
  return {
    'image': rng.integers(0, 256, (*shape, 3)).astype(np.uint8),
    'label': labels,
    'size': size,
    'photometric': photometric,
  }


def compiled_step(model, mesh, batch, **options):
  """The step, a state of random weights, and the batch on the devices."""
  optimizer = create_optimizer(CONFIG.optimizer, 10)
  loss = create_loss(CONFIG.loss, 7)
  step = make_train_step(
    model, optimizer, mesh, seed=0, loss=loss, aux_weight=0.4, **options
  )
  run, runs = host_share(mesh)
  share = len(batch['size']) // runs
  mine = slice(run * share, (run + 1) * share)
  batch = shard_batch({k: v[mine] for k, v in batch.items()}, mesh)
  abstract = abstract_state(model, optimizer, mesh)
  state = start_state(optimizer, filled_variables(abstract.variables()))
  program = step.lower(abstract, batch).compile(QUICK)
  return program, jax.tree.map(np.asarray, state), batch


def step_on(mesh):
  """The scalars and the state after a step by name, and the program's text.

  After the first step the momentum is the gradient and the decay.
  """
  program, state, batch = compiled_step(create_model(), mesh, training_batch())
  results = program(replicate(state, mesh), batch)
  arrays = {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(results)
  }
  return arrays, program.as_text()


def assert_close(results, expected):
  """Equal up to the rounding of float64."""
  assert jax.tree.structure(results) == jax.tree.structure(expected)
  leaves = map(jax.tree.leaves_with_path, (results, expected))
  for (path, ours), (_, value) in zip(*leaves, strict=True):
    scale = max(np.abs(value).max(), 1e-6)
    assert np.abs(np.asarray(ours) - value).max() / scale < 1e-10, path
