"""Times every way to write a layer, at the shapes that the network has.

    python benchmarks/conv_forms.py
    python benchmarks/conv_forms.py --batch_size 16 --size 512 --dtype bfloat16

Layers are those of ResNeSt-D8 and its heads. Ways are those of
`models.implementations` and of `plain_layers`; the split attention's grouped
convolution is compared with jax-resnet's as well, which is `flax.linen.Conv`
with `feature_group_count=2`. Forward, and forward with
backward, by turns; medians, and how many times as long as the way that is
chosen on this machine. `--kinds grouped pyramid` measures these alone,
`--smoke` one tiny layer of each kind. (The kind `blocks` is of whole networks:
train_step.py with `--blocks unrolled`.) Needs jax and flax; with matplotlib
`--out` draws.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import plain_layers
from benchmarks.flags import DTYPES, SMOKE, add_out, add_smoke, positive
from benchmarks.report import (
  describe_machine,
  draw_bars,
  print_table,
  write_result,
)
from benchmarks.timing import add_flags, interleaved, medians
from resnest_jax import runtime
from resnest_jax.errors import run
from resnest_jax.models import implementations, normalization, pooling
from resnest_jax.models.convolution import convolve, depthwise
from resnest_jax.models.pyramid import convolve_merged, upsampled

# Kinds that the network writes in one way on every platform, and its name.
OURS = {
  'grouped': 'split',
  'dilated': 'spaced_taps',
  'pointwise': 'dot',
  'pyramid': 'low_rank',
  'norm': 'custom_vjp',
}
KINDS = (*OURS, *implementations.LAYERS)


class Layer(NamedTuple):
  """A layer of the network.

  Attributes:
    kind: one of `KINDS`.
    name: for the table.
    function: of arrays.
    shapes: of these; the first is the input.
    others: the same function in ways that the network does not take.
  """

  kind: str
  name: str
  function: Callable
  shapes: tuple[tuple[int, ...], ...]
  others: Mapping[str, Callable] = MappingProxyType({})


def chosen(kind: str) -> str:
  """The way in which the network has layers of a kind, at this moment."""
  return OURS.get(kind) or implementations.chosen(kind)


def peer_conv(x, kernel, dilation=1):
  """jax-resnet's; it has no dilation, which `nn.Conv` could do as well."""
  conv = nn.Conv(
    kernel.shape[-1],
    (3, 3),
    padding=((dilation, dilation),) * 2,
    kernel_dilation=(dilation, dilation),
    feature_group_count=2,
    use_bias=False,
    dtype=x.dtype,
  )
  return jnp.split(conv.apply({'params': {'kernel': kernel}}, x), 2, -1)


def psp_bottleneck(merge, x, kernel, *levels):
  canvas = x.shape[1:3]
  inputs = [x, *(upsampled(level, canvas, None) for level in levels)]
  return merge(inputs, kernel)


def aspp_bottleneck(merge, x, kernel, pooled):
  return merge([upsampled(pooled, x.shape[1:3], None), x], kernel)


def batch_norm(normalize, x, scale, bias):
  return normalize(x, scale, bias, 1e-5, True)[0]


def layers(batch: int, size: int, thin: int) -> Iterator[Layer]:
  """The network's, at a crop of size x size; channels are divided by `thin`."""

  def shape(channels: int, stride: int) -> tuple[int, ...]:
    return (batch, size // stride, size // stride, channels // thin)

  def kernel(k: int, inputs: int, outputs: int) -> tuple[int, ...]:
    return (k, k, max(inputs // thin, 1), outputs // thin)

  for channels, stride, d in (
    (64, 4, 1),
    (128, 8, 1),
    (256, 8, 2),
    (512, 8, 4),
  ):
    yield Layer(
      'grouped',
      f'{channels} to {2 * channels}, /{stride}, dilation {d}',
      # As the two halves that follow are used.
      partial(convolve, groups=2, parts=2, dilation=d),
      (shape(channels, stride), kernel(3, channels // 2, 2 * channels)),
      {
        'grouped': partial(
          plain_layers.convolve, groups=2, parts=2, dilation=d
        ),
        'block_diagonal': partial(
          plain_layers.block_diagonal, groups=2, parts=2, dilation=d
        ),
        'jax-resnet': partial(peer_conv, dilation=d),
      },
    )
  for channels, d in ((256, 2), (512, 4)):
    yield Layer(
      'dilated',
      f'{channels // 2} to {channels}, /8, dilation {d}',
      partial(convolve, dilation=d),
      (shape(channels // 2, 8), kernel(3, channels // 2, channels)),
      {'space_to_batch': partial(plain_layers.space_to_batch, dilation=d)},
    )
  for inputs, outputs, stride, d in (
    (32, 64, 2, 1),
    (128, 256, 8, 2),
    (256, 512, 8, 4),
  ):
    yield Layer(
      'kernel_gradient',
      f'{inputs} to {outputs}, /{stride}, dilation {d}',
      partial(convolve, dilation=d),
      (shape(inputs, stride), kernel(3, inputs, outputs)),
    )
  yield Layer(
    'wide',
    '2048 to 512, /8',
    convolve,
    (shape(2048, 8), kernel(3, 2048, 512)),
  )
  for channels, stride, d in ((2048, 8, 12), (2048, 8, 24), (560, 4, 1)):
    yield Layer(
      'depthwise',
      f'{channels}, /{stride}, dilation {d}',
      lambda x, k, d=d: depthwise(x, k, d),
      (shape(channels, stride), (3, 3, 1, channels // thin)),
    )
  for inputs, outputs, stride in ((256, 64, 4), (1024, 256, 8), (256, 1024, 8)):
    yield Layer(
      'pointwise',
      f'{inputs} to {outputs}, /{stride}',
      convolve,
      (shape(inputs, stride), kernel(1, inputs, outputs)),
      {'convolution': plain_layers.convolve},
    )
  width = 512 // thin
  yield Layer(
    'pyramid',
    'PSP bottleneck, 4096 to 512, /8',
    partial(psp_bottleneck, convolve_merged),
    (
      shape(2048, 8),
      (3, 3, 8 * width, width),
      *((batch, bins, bins, width) for bins in (1, 2, 3, 6)),
    ),
    {'concatenated': partial(psp_bottleneck, plain_layers.convolve_merged)},
  )
  yield Layer(
    'pyramid',
    'ASPP bottleneck, 2560 to 512, /8',
    partial(aspp_bottleneck, convolve_merged),
    (shape(2048, 8), (3, 3, 5 * width, width), (batch, 1, 1, width)),
    {'concatenated': partial(aspp_bottleneck, plain_layers.convolve_merged)},
  )
  for name, pool, channels, stride in (
    ('maximum 3x3', lambda x: pooling.max_pool(jnp.abs(x), None), 128, 2),
    ('average 3x3', lambda x: pooling.average_pool(x, 2, None), 128, 4),
    ('average 2x2', lambda x: pooling.shortcut_pool(x, 2, None), 256, 4),
  ):
    yield Layer(
      'pooling',
      f'{name}, {channels}, /{stride}',
      pool,
      (shape(channels, stride),),
    )
  for channels, stride in ((128, 2), (256, 8), (1024, 8)):
    yield Layer(
      'norm',
      f'{channels} and ReLU, /{stride}',
      partial(batch_norm, normalization.normalize),
      (shape(channels, stride), (channels // thin,), (channels // thin,)),
      {'autodiff': partial(batch_norm, plain_layers.normalize)},
    )


def lowered(
  layer: Layer, arguments: Sequence[Any], platform: str | None = None
) -> dict[str, dict[str, jax.stages.Lowered]]:
  """Programs of a layer, forward and with backward, by how it is written.

  Args:
    layer: of `layers`.
    arguments: of its function; arrays, or their shapes.
    platform: whose implementations its parts take; None: this machine's.
  """
  programs: dict[str, dict[str, Any]] = {'forward': {}, 'with backward': {}}

  def add(name: str, function: Callable) -> None:
    def both(*arguments):
      # The gradient that a layer gets from the next one is a full array.
      outputs, pull_back = jax.vjp(function, *arguments)
      return outputs, pull_back(outputs)

    for way, program in (('forward', function), ('with backward', both)):
      # A function of its own: compiled programs go by identity.
      program = jax.jit(lambda *a, f=program: f(*a))
      programs[way][name] = program.lower(*arguments)

  with implementations.use(platform):
    if layer.kind in OURS:
      add(OURS[layer.kind], layer.function)
    for name in implementations.IMPLEMENTATIONS.get(layer.kind, ()):
      with implementations.use(**{layer.kind: name}):
        add(name, layer.function)
    for name, function in layer.others.items():
      add(name, function)
  return programs


def timed(
  layer: Layer, dtype: Any, rounds: int, clock: str, least: float
) -> dict:
  """Milliseconds of all implementations: forward, and forward with backward."""
  rng = np.random.default_rng(0)
  arguments = [
    jnp.asarray(0.05 * rng.standard_normal(shape, np.float32), dtype)
    for shape in layer.shapes
  ]

  def call(program: jax.stages.Lowered) -> Callable:
    return partial(program.compile(), *arguments)

  ways = {
    way: {name: call(program) for name, program in programs.items()}
    for way, programs in lowered(layer, arguments).items()
  }
  return {
    way: {
      name: 1e3 * s
      for name, s in medians(interleaved(f, rounds, clock, least)).items()
    }
    for way, f in ways.items()
  }


def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
  """A record of each layer: milliseconds, and ratios to the chosen one."""
  found, seen = [], set()
  for layer in layers(flags.batch_size, flags.size, 16 if flags.smoke else 1):
    if layer.kind not in flags.kinds or (flags.smoke and layer.kind in seen):
      continue
    seen.add(layer.kind)
    milliseconds = timed(
      layer, flags.dtype, flags.rounds, flags.clock, 0 if flags.smoke else 0.05
    )
    best = chosen(layer.kind)
    ratio = {
      way: {name: x / times[best] for name, x in times.items()}
      for way, times in milliseconds.items()
    }
    found.append(
      {
        'kind': layer.kind,
        'layer': layer.name,
        'chosen': best,
        'milliseconds': milliseconds,
        'ratio': ratio,
      }
    )
    print(f'{layer.kind}: {layer.name}', file=sys.stderr, flush=True)
  return found


def rows_of(record: dict[str, Any]) -> Iterator[list[str]]:
  """Lines of the table."""
  forward, both = record['milliseconds'].values()
  for name in forward:
    yield [
      f'{record["kind"]}: {record["layer"]}',
      name + (' *' if name == record['chosen'] else ''),
      *(f'{x[name]:.2f}' for x in (forward, both)),
      *(f'{x[name]:.2f}' for x in record['ratio'].values()),
    ]


def main() -> None:
  """Reads the command line, measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--batch_size', type=positive, default=2)
  parser.add_argument('--size', type=positive, default=256, help='of the crop')
  parser.add_argument('--dtype', default='float32', choices=DTYPES)
  add_flags(parser, 7)
  parser.add_argument('--kinds', nargs='+', choices=KINDS, default=list(KINDS))
  add_smoke(parser)
  add_out(parser, 'JSON and picture')
  flags = parser.parse_args()
  if flags.smoke:
    flags.batch_size, flags.size, flags.rounds = 1, 32, 1
  records = measure(flags)
  print_table(
    [
      'layer',
      'implementation',
      'forward, ms',
      'and backward',
      'times *',
      'times *',
    ],
    [row for record in records for row in rows_of(record)],
  )
  print('* is chosen on this machine; times *: how many times as long, of both')
  if flags.smoke:
    print(SMOKE)
  if flags.out:
    result = describe_machine() | {
      'devices': runtime.describe_devices(),
      'batch_size': flags.batch_size,
      'size': flags.size,
      'dtype': flags.dtype,
      'rounds': flags.rounds,
      'clock': flags.clock,
      'layers': records,
    }
    path = write_result(flags.out, 'conv_forms', result, flags.smoke)
    draw_bars(
      path.with_suffix('.png'),
      {
        f'{record["kind"]}\n{record["layer"]}': record['ratio']['with backward']
        for record in records
      },
      'time, forward and backward, over that of the chosen implementation',
      f'{result["devices"]}, batch {flags.batch_size}, {flags.size} px, '
      f'{flags.dtype}',
      log=True,
    )


if __name__ == '__main__':
  run(main)
