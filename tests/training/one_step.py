"""One training step of a tiny network, to be compared across meshes.

Or by several processes, of which the first one writes what came out:
python tests/training/one_step.py OUT.npz --coordinator ...
"""

import argparse
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from golden import reference
from golden.reference import QUICK, TINY

from resnest_jax.checkpoints.state import abstract_state, start_state
from resnest_jax.config import load_config
from resnest_jax.distributed import join, messages
from resnest_jax.losses.objective import create_loss
from resnest_jax.models import segmentor
from resnest_jax.models.segmentor import HEADS, create_segmentor
from resnest_jax.sharding import host_share, make_mesh, replicate, shard_batch
from resnest_jax.training.optimizer import create_optimizer
from resnest_jax.training.step import make_train_step

CONFIG = load_config('configs/ade20k_pspnet.py')
BATCH = 4
# Equal up to the rounding of float64.
assert_close = partial(reference.assert_close, limit=1e-10, least=1e-6)


class AllHeads(nn.Module):
  """All heads on one backbone, so that it is compiled once."""

  backbone: Any
  heads: Any

  def __call__(self, images, *, train, size=None):
    features, sizes = self.backbone(images, train=train, size=size)
    finer, *logits = [x(features, train=train, sizes=sizes) for x in self.heads]
    # As if the others had 42 classes together, of which 7 occur.
    return segmentor.SegmentorOutput(jnp.concatenate(logits, -1), finer)


def training_batch(batch=BATCH, height=64, width=24):
  """What the pipeline yields, with padding and ignored pixels."""
  rng = np.random.default_rng(0)
  shape = (batch, height, width)
  size = np.tile(np.int32([height, width]), (batch, 1))
  size[1, 0], size[-2, 1] = height * 5 // 8, width * 2 // 3
  labels = rng.integers(0, 7, shape).astype(np.uint8)
  labels[rng.random(shape) < 0.2] = 255
  change = np.tile(np.float32([0, 1, 1, 0, 1]), (batch, 1))
  change[3] = [20, 1.2, 0.8, 5, 1]
  image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
  return {'image': image, 'label': labels, 'size': size, 'photometric': change}


def objective(config=CONFIG, classes=7, align_corners=False):
  """What a step minimises, as `update` and `make_train_step` take it."""
  loss = create_loss(config.loss, classes, align_corners)
  return {'loss': loss, 'aux_weight': config.loss.aux_weight}


def compiled_step(model, mesh, batch, **options):
  """The step, a state of random weights, and the batch on the devices."""
  optimizer = create_optimizer(CONFIG.optimizer, 10)
  options |= objective()
  step = make_train_step(model, optimizer, mesh, seed=0, **options)
  run, runs = host_share(mesh)
  mine = {key: np.split(values, runs)[run] for key, values in batch.items()}
  batch = shard_batch(mine, mesh)
  abstract = abstract_state(model, optimizer, mesh)
  variables = reference.filled_variables(abstract.variables())
  state = start_state(optimizer, variables)
  program = step.lower(abstract, batch).compile(QUICK)
  return program, jax.tree.map(np.asarray, state), batch


def step_on(mesh):
  """The scalars and the state after a step by name, and the program's text."""
  heads = sorted(HEADS, key='deeplabv3plus'.__ne__)
  models = [create_segmentor(TINY | {'head': head}) for head in heads]
  heads = tuple(model.decode_head for model in models)
  model = AllHeads(models[0].backbone, heads)
  program, state, batch = compiled_step(model, mesh, training_batch())
  results = program(replicate(state, mesh), batch)
  arrays = {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(results)
  }
  return arrays, program.as_text()


if __name__ == '__main__':
  parser = join.add_flags(argparse.ArgumentParser())
  parser.add_argument('out')
  flags = parser.parse_args()
  jax.config.update('jax_enable_x64', True)
  with join.joined(flags, {}):
    arrays, _ = step_on(make_mesh(spatial=4))
    if messages.is_first():
      np.savez(flags.out, **arrays)
