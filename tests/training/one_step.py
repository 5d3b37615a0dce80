"""One training step of a tiny network, to be compared across meshes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from golden.reference import QUICK, TINY, filled_variables

from resnest_jax.checkpoints.state import TrainState, abstract_state
from resnest_jax.config import load_config
from resnest_jax.models.segmentor import SegmentorOutput, create_segmentor
from resnest_jax.sharding import host_share, replicate, shard_batch
from resnest_jax.training.objective import create_loss
from resnest_jax.training.optimizer import create_optimizer
from resnest_jax.training.step import make_train_step

CONFIG = load_config('configs/ade20k_pspnet.py')
BATCH, HEIGHT, WIDTH = 4, 64, 24


class AllHeads(nn.Module):
  """The four heads on one backbone, so that it is compiled once."""

  backbone: Any
  fcn: Any
  pspnet: Any
  deeplabv3: Any
  deeplabv3plus: Any

  def __call__(self, images, *, train, size=None):
    features, sizes = self.backbone(images, train=train, size=size)
    heads = (self.fcn, self.pspnet, self.deeplabv3, self.deeplabv3plus)
    *logits, finer = (
      head(features, train=train, sizes=sizes) for head in heads
    )
    # As if the three had 21 classes together, of which 7 occur.
    return SegmentorOutput(jnp.concatenate(logits, -1), finer)


def create_model():
  heads = ('fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus')
  models = {head: create_segmentor(TINY | {'head': head}) for head in heads}
  return AllHeads(
    backbone=models['fcn'].backbone,
    **{head: model.decode_head for head, model in models.items()},
  )


def training_batch():
  """What the pipeline yields, with padding and ignored pixels."""
  rng = np.random.default_rng(0)
  shape = (BATCH, HEIGHT, WIDTH)
  size = np.tile(np.int32([HEIGHT, WIDTH]), (BATCH, 1))
  size[1], size[2] = (40, WIDTH), (HEIGHT, 17)
  labels = rng.integers(0, 7, shape).astype(np.uint8)
  labels[rng.random(shape) < 0.2] = 255
  photometric = np.tile(np.float32([0, 1, 1, 0, 1]), (BATCH, 1))
  photometric[3] = [20, 1.2, 0.8, 5, 1]
  return {
    'image': rng.integers(0, 256, (*shape, 3)).astype(np.uint8),
    'label': labels,
    'size': size,
    'photometric': photometric,
  }


def step_on(mesh):
  """The scalars, the state after a step by name, and the program's text.

  After the first step the momentum is the gradient and the decay.
  """
  model = create_model()
  optimizer = create_optimizer(CONFIG.optimizer, 10)
  step = make_train_step(
    model,
    optimizer,
    mesh,
    seed=0,
    loss=create_loss(CONFIG.loss, 7),
    aux_weight=0.4,
  )
  run, runs = host_share(mesh)
  mine = slice(run * BATCH // runs, (run + 1) * BATCH // runs)
  batch = {key: value[mine] for key, value in training_batch().items()}
  batch = shard_batch(batch, mesh)
  abstract = abstract_state(model, optimizer, mesh)
  compiled = step.lower(abstract, batch).compile(QUICK)
  variables = filled_variables(
    {'params': abstract.params, 'batch_stats': abstract.batch_stats}
  )
  state = TrainState(
    step=np.zeros((), np.int32),
    opt_state=optimizer.init(variables['params']),
    **variables,
  )
  state = replicate(jax.tree.map(np.asarray, state), mesh)
  after, scalars = compiled(state, batch)
  arrays = {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path((after, scalars))
  }
  return arrays, compiled.as_text()


def assert_close(arrays, expected):
  """Equal up to the rounding of float64."""
  assert arrays.keys() == expected.keys()
  assert len(arrays) > 100
  for name, value in expected.items():
    scale = max(abs(value).max(), 1e-6)
    assert abs(arrays[name] - value).max() / scale < 1e-10, name
