"""Times our network against PyTorch's, training step and inference.

    python benchmarks/against_torch.py
    python benchmarks/against_torch.py --batch_size 16 --size 512 --amp

ResNeSt-50-D8 with the PSP head and the auxiliary one, of the same weights:

- `ours`;
- `plain forms`: ours with the layers as jax-resnet and Flax write them (grouped
  convolutions, convolutions for 1x1, window reductions, differentiated batch
  norm, a concatenated pyramid);
- `torch`: as mmsegmentation writes it (`torch_network.py`), eager, or by
  `torch.compile` with `--compile`.

All take turns, round by round, and medians are compared. A training step is
forward, backward and SGD with momentum and decay; inference ends with the
logits. `--smoke` does it with a tiny network. Needs jax, flax, optax, NumPy
and PyTorch; with matplotlib `--out` draws.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

# PyTorch needs some of the memory, too.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flags import SMOKE, TINY, add_out, add_smoke, positive
from benchmarks.plain_layers import plain_network
from benchmarks.report import (
  describe_machine,
  draw_bars,
  print_table,
  write_result,
)
from benchmarks.timing import add_flags, interleaved, medians
from resnest_jax import runtime
from resnest_jax.checkpoints.state import start_state
from resnest_jax.errors import UserError, run
from resnest_jax.losses.pixels import segmentation_loss
from resnest_jax.models import implementations
from resnest_jax.models.initial import initial_variables
from resnest_jax.models.segmentor import create_segmentor, scanned
from resnest_jax.models.stacking import stack
from resnest_jax.training.step import update
from resnest_jax.weights.state_dict import export_state_dict

NETWORK = {
  'backbone': 'resnest50',
  'stage_sizes': (3, 4, 6, 3),
  'stem_width': 32,
  'width': 64,
  'output_stride': 8,
  'dilation_rule': 'mmseg',
  'head': 'pspnet',
  'head_channels': 512,
  'aux_channels': 256,
  'num_classes': 150,
  'dropout': 0.1,
  'dtype': 'float32',
}
# Of a smoke run; without dropout, so that the steps are the same.
QUICK = TINY | {'num_classes': 5, 'dropout': 0.0}
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4


def sgd() -> optax.GradientTransformation:
  """PyTorch's SGD."""
  return optax.chain(
    optax.add_decayed_weights(DECAY), optax.sgd(RATE, MOMENTUM)
  )


class Ours:
  """Our training step and inference, compiled."""

  def __init__(self, config: dict, variables: Any, images, labels):
    model, optimizer = create_segmentor(config), sgd()
    if implementations.chosen('blocks') == 'scanned':
      model = scanned(model)
    self._images = jnp.asarray(images)
    self._labels = jnp.asarray(labels, jnp.int32)
    self._state = jax.jit(partial(start_state, optimizer))(
      stack(variables, model.backbone.stacked())
    )
    step = jax.jit(
      partial(_train_step, model=model, optimizer=optimizer),
      donate_argnums=0,
    )
    self._step = step.lower(self._state, self._images, self._labels).compile()
    # For predictions the auxiliary head is left out.
    decoder = create_segmentor(config | {'aux_channels': None})
    self._variables = {
      kind: {
        name: jax.tree.map(jnp.asarray, part)
        for name, part in parts.items()
        if name != 'auxiliary_head'
      }
      for kind, parts in variables.items()
    }
    infer = jax.jit(
      lambda variables, images: (
        decoder.apply(variables, images, train=False).logits
      )
    )
    self._infer = infer.lower(self._variables, self._images).compile()

  def train(self) -> float:
    """One step; the loss before it."""
    self._state, loss = self._step(self._state, self._images, self._labels)
    jax.block_until_ready(self._state)
    return float(loss)

  def infer(self) -> np.ndarray:
    """Logits (B, h, w, classes)."""
    return np.asarray(self._infer(self._variables, self._images))


def _train_step(state, images, labels, *, model, optimizer):
  def loss(logits, labels):
    return *segmentation_loss(logits, labels, avg_non_ignore=False), {}

  state, scalars, _ = update(
    state,
    images,
    labels,
    jax.random.fold_in(jax.random.key(0), state.step),
    model=model,
    optimizer=optimizer,
    loss=loss,
    aux_weight=0.4,
  )
  return state, scalars['loss']


class Theirs:
  """PyTorch's, on its GPU where it has one."""

  def __init__(self, config, state_dict, images, labels, flags):
    import torch

    from benchmarks import torch_network

    self._torch, self._loss = torch, torch_network.loss_of
    self._device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self._amp = flags.amp
    layout = torch.contiguous_format
    if flags.channels_last:
      layout = torch.channels_last
    if self._device == 'cuda':
      torch.backends.cudnn.benchmark = True
    weights = {name: torch.tensor(x) for name, x in state_dict.items()}
    model = torch_network.Segmentor(config)
    model.load_state_dict(weights, strict=False)
    model = model.to(self._device, memory_format=layout)
    images = torch.tensor(images).permute(0, 3, 1, 2)
    self._images = images.to(self._device).contiguous(memory_format=layout)
    self._labels = torch.tensor(labels).long().to(self._device)
    self._optimizer = torch.optim.SGD(
      model.parameters(), RATE, MOMENTUM, weight_decay=DECAY
    )
    # The running statistics of training are not those of the weights.
    self._fixed = torch_network.Segmentor(config).eval()
    self._fixed.load_state_dict(weights, strict=False)
    self._fixed = self._fixed.to(self._device, memory_format=layout)
    self._model = model.train()
    if flags.compile:
      self._model = torch.compile(self._model)
      self._fixed = torch.compile(self._fixed)

  def _autocast(self):
    return self._torch.autocast(
      self._device, self._torch.bfloat16, enabled=self._amp
    )

  def train(self) -> float:
    """One step; the loss before it."""
    self._optimizer.zero_grad(set_to_none=True)
    with self._autocast():
      loss = self._loss(self._model(self._images), self._labels)
    loss.backward()
    self._optimizer.step()
    return loss.item()  # Waits for the device.

  def infer(self) -> np.ndarray:
    """Logits (B, h, w, classes)."""
    with self._torch.inference_mode(), self._autocast():
      logits = self._fixed(self._images)
    return logits.permute(0, 2, 3, 1).float().cpu().numpy()


def compare(config: dict, flags: argparse.Namespace) -> dict[str, Any]:
  """Milliseconds of all ways, and how many times as long others take."""
  rng = np.random.default_rng(0)
  shape = (flags.batch_size, flags.size, flags.size)
  images = rng.standard_normal((*shape, 3), np.float32)
  labels = rng.integers(0, config['num_classes'], shape, np.uint8)
  variables = initial_variables(create_segmentor(config), 0)
  ways = {'ours': Ours(config, variables, images, labels)}
  if not flags.without_plain:
    with plain_network():
      ways['plain forms'] = Ours(config, variables, images, labels)
  state_dict = export_state_dict(create_segmentor(config), variables, 'mmseg')
  ways['torch'] = Theirs(config, state_dict, images, labels, flags)
  expected = ways['torch'].infer()
  differences = {
    name: float(np.abs(way.infer() - expected).max() / np.abs(expected).max())
    for name, way in ways.items()
  }
  losses = {name: [way.train(), way.train()] for name, way in ways.items()}
  milliseconds = {}
  for task in ('train', 'infer'):
    seconds = interleaved(
      {name: getattr(way, task) for name, way in ways.items()},
      flags.rounds,
      flags.clock,
    )
    milliseconds[task] = {n: 1e3 * s for n, s in medians(seconds).items()}
  return {
    'milliseconds': milliseconds,
    'ratio': {
      task: {name: x / found['ours'] for name, x in found.items()}
      for task, found in milliseconds.items()
    },
    'logits_differ_by': differences,
    'losses': losses,
  }


def main() -> None:
  """Reads the command line, measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--batch_size', type=positive, default=2)
  parser.add_argument('--size', type=positive, default=256, help='of the crop')
  add_flags(parser, 10)
  parser.add_argument(
    '--amp', action='store_true', help='bfloat16: ours, and autocast'
  )
  parser.add_argument(
    '--channels_last', action='store_true', help="PyTorch's NHWC"
  )
  parser.add_argument(
    '--compile', action='store_true', help='torch.compile, not eager'
  )
  parser.add_argument(
    '--without_plain', action='store_true', help='no `plain forms`'
  )
  add_smoke(parser)
  add_out(parser, 'JSON and picture')
  flags = parser.parse_args()
  try:
    import torch
  except ImportError as error:
    raise UserError(
      'PyTorch is not installed; pip install torch, or let it be: the other '
      'benchmarks do without.'
    ) from error
  config = NETWORK | {'dtype': 'bfloat16' if flags.amp else 'float32'}
  if flags.smoke:
    config |= QUICK
    flags.size, flags.rounds = 32, 2
  result = describe_machine() | {
    'devices': runtime.describe_devices(),
    'torch': torch.__version__,
    'torch_threads': torch.get_num_threads(),
    'network': config,
    'batch_size': flags.batch_size,
    'size': flags.size,
    'rounds': flags.rounds,
    'clock': flags.clock,
    'amp': flags.amp,
    'channels_last': flags.channels_last,
    'compiled': flags.compile,
    **compare(config, flags),
  }
  print_table(
    ['', 'train, ms', 'times ours', 'infer, ms', 'times ours'],
    [
      [
        name,
        *(
          f'{result[kind][task][name]:.2f}'
          for task in ('train', 'infer')
          for kind in ('milliseconds', 'ratio')
        ),
      ]
      for name in result['milliseconds']['train']
    ],
  )
  if flags.smoke:
    print(SMOKE)
  if flags.out:
    variant = [
      name
      for name in ('amp', 'channels_last', 'compile')
      if getattr(flags, name)
    ]
    path = write_result(
      flags.out, '-'.join(['against_torch', *variant]), result, flags.smoke
    )
    draw_bars(
      path.with_suffix('.png'),
      result['milliseconds'],
      'ms',
      f'{result["devices"]}, batch {flags.batch_size}, {flags.size} px, '
      f'{flags.clock} time',
    )


if __name__ == '__main__':
  run(main)
