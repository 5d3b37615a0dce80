"""Micro-batches that are normalised by the statistics of the whole batch.

The network is cut into parts: the stem, every block, every head. Between them
the features of the whole batch are kept; inside, there is only one micro-batch
at a time. A part goes over the micro-batches several times:

- Forward, for its statistics. A normalisation's statistics depend on those of
  the ones before it, so each of its levels (a block has four) takes a pass,
  which computes the part up to there. Moments of micro-batches are merged by
  Chan's formula.
- Forward, for its result.
- Backward, for the gradients with respect to the statistics, by level from the
  last one on: each is a sum over all images, and flows on into all of them.
- Backward, for the gradients of parameters and inputs.

Loss, gradients and running statistics are those of the whole batch but for
rounding. It costs several times the operations of the plain step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from resnest_jax.jax_private import dce_jaxpr
from resnest_jax.models.heads import place_variables
from resnest_jax.models.layers import Array
from resnest_jax.models.normalization import COUNTS, MOMENTS, running
from resnest_jax.models.remat import STATISTICS, in_groups
from resnest_jax.models.resnest import Bottleneck, Stem
from resnest_jax.models.segmentor import Segmentor, SegmentorOutput
from resnest_jax.training.accumulation import Gradients, Score, deal
from resnest_jax.training.freezing import without_gradient

# (path of a normalisation) -> {'mean', 'var'}.
Statistics = dict[tuple[str, ...], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of the network, which is alike for alike pieces.

  Attributes:
    module: its normalisations take the statistics they are given.
    run: (module, inputs) -> outputs.
    frozen: the statistics are the running ones.
  """

  module: nn.Module
  run: Callable
  frozen: bool

  def __call__(
    self, params: Any, statistics: Statistics, part: tuple, key: Array
  ) -> tuple[Any, Statistics, dict[tuple[str, ...], Array]]:
    """Outputs, moments and counts of one micro-batch.

    Args:
      params: of the module.
      statistics: to normalise by.
      part: inputs, and the places of the images.
      key: for the dropout.
    """
    inputs, places = part
    variables = {'params': params, 'batch_stats': _nested(statistics)}
    outputs, changed = self.module.apply(
      variables | place_variables(places),
      inputs,
      mutable=[MOMENTS, COUNTS],
      rngs={'dropout': key},
      method=self.run,
    )
    counts = flatten_dict(changed.get(COUNTS, {}))
    counts = {path[:-1]: value for path, value in counts.items()}
    return outputs, _by_norm(changed.get(MOMENTS, {})), counts


def _by_norm(tree: Mapping[str, Any]) -> Statistics:
  flat: Statistics = {}
  for path, value in flatten_dict(tree).items():
    flat.setdefault(path[:-1], {})[path[-1]] = value
  return flat


def _nested(statistics: Statistics) -> dict[str, Any]:
  return unflatten_dict(
    {
      (*path, name): value
      for path, both in statistics.items()
      for name, value in both.items()
    }
  )


def run_stem(module: Stem, inputs: Array) -> Array:
  return module(inputs, None)[0]


def run_block(module: Bottleneck, inputs: Array) -> Array:
  return module(inputs, None)


def run_decode_head(module: Segmentor, inputs: dict[int, Array]) -> Array:
  return module.decode_head(inputs, train=True, sizes=(None,) * 4)


def run_auxiliary_head(module: Segmentor, inputs: dict[int, Array]) -> Array:
  return module.auxiliary_head(inputs, train=True, sizes=(None,) * 4)


HEADS = {
  'decode_head': run_decode_head,
  'auxiliary_head': run_auxiliary_head,
}


def alone(name: str, head: nn.Module) -> Segmentor:
  """A segmentor of nothing but one head."""
  parts = dict.fromkeys(('backbone', *HEADS))
  return Segmentor(**parts | {name: head})


def _levels(
  part: Part, params: Any, statistics: Statistics, xs: tuple, key: Array
) -> list[list[tuple[str, ...]]]:
  """The normalisations, in sets that depend on earlier sets alone."""
  if part.frozen:
    return []
  names = list(statistics)

  def moments(values, params, one, key):
    known = {
      name: {'mean': mean, 'var': var}
      for name, (mean, var) in zip(names, values, strict=True)
    }
    found = part(params, known, one, key)[1]
    return [[found[name]['mean'], found[name]['var']] for name in names]

  values = [[both['mean'], both['var']] for both in statistics.values()]
  one = jax.tree.map(lambda x: x[0], xs)
  jaxpr = jax.make_jaxpr(moments)(values, params, one, key).jaxpr
  depth: dict[int, int] = {}

  def depth_of(index: int) -> int:
    if index not in depth:
      wanted = [i // 2 == index for i in range(2 * len(names))]
      used = dce_jaxpr(jaxpr, wanted)[1][: 2 * len(names)]
      before = {i // 2 for i, is_used in enumerate(used) if is_used}
      depth[index] = 1 + max(map(depth_of, before), default=-1)
    return depth[index]

  levels: list[list] = []
  for index in sorted(range(len(names)), key=depth_of):
    if depth_of(index) == len(levels):
      levels.append([])
    levels[-1].append(names[index])
  return levels


def _merged(moments: dict[str, Array]) -> dict[str, Array]:
  """Statistics of all from those of equally large sets, stacked in front."""
  mean = jnp.mean(moments['mean'], 0)
  spread = jnp.mean(jnp.square(moments['mean'] - mean), 0)
  return {'mean': mean, 'var': jnp.mean(moments['var'], 0) + spread}


@partial(jax.jit, static_argnums=0)
def find_statistics(
  part: Part, params: Any, statistics: Statistics, xs: tuple, key: Array
) -> tuple[Statistics, dict[tuple[str, ...], Array]]:
  """Statistics of the whole batch, without gradient.

  Args:
    part: of the network.
    params: its parameters.
    statistics: running ones, as a frozen part takes them.
    xs: inputs and places, each with the micro-batches in front.
    key: for the dropout.

  Returns:
    Means and biased variances, and the values of a channel in the batch.
  """
  counts: dict = {}
  for level in _levels(part, params, statistics, xs, key):

    def measure(_, one, level=level, known=statistics):
      _, found, values = part(params, known, one, key)
      return None, ({n: found[n] for n in level}, {n: values[n] for n in level})

    _, (found, values) = lax.scan(measure, None, xs)
    counts |= {name: jnp.sum(value) for name, value in values.items()}
    statistics = statistics | {name: _merged(found[name]) for name in level}
  return statistics, counts


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalised(
  part: Part, params: Any, statistics: Statistics, xs: tuple, key: Array
) -> Any:
  """The part's outputs, stacked like `xs`, by statistics that were found.

  To differentiation the statistics are what they are, functions of the
  parameters and the inputs; there is no gradient with respect to the argument.
  """
  return _forward(part, params, statistics, xs, key)


@partial(jax.jit, static_argnums=0)
def _forward(part, params, statistics, xs, key):
  def one(_, x):
    return None, part(params, statistics, x, key)[0]

  return lax.scan(one, None, xs)[1]


def _normalised_forward(part, params, statistics, xs, key):
  saved = (params, statistics, xs, key)
  return _forward(part, params, statistics, xs, key), saved


@partial(jax.jit, static_argnums=0)
def _backward(part, saved, cotangents):
  params, statistics, (inputs, places), key = saved
  levels = _levels(part, params, statistics, (inputs, places), key)
  pulls: Statistics = {}  # The loss's gradients with respect to statistics.

  def weights(found: Statistics) -> Statistics:
    """Those with respect to a micro-batch's own moments."""
    share = 1 / len(places)
    return {
      name: {
        'mean': share
        * (
          pull['mean']
          + 2 * pull['var'] * (found[name]['mean'] - statistics[name]['mean'])
        ),
        'var': share * pull['var'],
      }
      for name, pull in pulls.items()
    }

  for level in reversed(levels):

    def sweep(total, one, level=level, above=tuple(pulls)):
      x, place, cotangent = one

      def outputs(chosen):
        y, found, _ = part(params, statistics | chosen, (x, place), key)
        return y, {name: found[name] for name in above}

      chosen = {name: statistics[name] for name in level}
      (_, found), pull_back = jax.vjp(outputs, chosen)
      (change,) = pull_back((cotangent, weights(found)))
      return jax.tree.map(jnp.add, total, change), None

    zeros = {
      name: jax.tree.map(jnp.zeros_like, statistics[name]) for name in level
    }
    pulls |= lax.scan(sweep, zeros, (inputs, places, cotangents))[0]

  def last(total, one):
    x, place, cotangent = one

    def outputs(params, x):
      y, found, _ = part(params, statistics, (x, place), key)
      return y, {name: found[name] for name in pulls}

    (_, found), pull_back = jax.vjp(outputs, params, x)
    change, dx = pull_back((cotangent, weights(found)))
    return jax.tree.map(jnp.add, total, change), dx

  zeros = jax.tree.map(jnp.zeros_like, params)
  return lax.scan(last, zeros, (inputs, places, cotangents))


def _normalised_backward(part, saved, cotangents):
  dparams, dinputs = _backward(part, saved, cotangents)
  return dparams, None, (dinputs, None), None


normalised.defvjp(_normalised_forward, _normalised_backward)


def exact_gradients(
  model: Segmentor,
  score: Score,
  variables: Mapping[str, Any],
  images: Array,
  labels: Array,
  key: Array,
  plan: Any,
) -> Gradients:
  """Gradients of the loss of the whole batch, by micro-batches.

  Takes and returns what `accumulation.whole_gradients` does.
  """
  frozen = plan.frozen(variables['params'])
  kept = variables['batch_stats']
  places = deal(jnp.arange(len(images)), plan.micro_batches)
  images = deal(images, plan.micro_batches)

  def loss_fn(params):
    if frozen is not None:
      params = without_gradient(params, frozen)
    walk = _Walk(places, key)
    features = _backbone(walk, model.backbone, params, kept, images, plan)
    logits = [
      _together(walk.head(model, name, params, kept, features))
      for name in HEADS
    ]
    scalars = score(SegmentorOutput(*logits), labels)
    return scalars['loss'], (scalars, unflatten_dict(walk.running))

  grads, (scalars, batch_stats) = jax.grad(loss_fn, has_aux=True)(
    variables['params']
  )
  return grads, scalars, batch_stats


def _together(x: Array) -> Array:
  """Undoes `deal`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


class _Walk:
  """The way of a batch through the network, and the new running statistics."""

  def __init__(self, places: Array, key: Array):
    self.places, self.key = places, key
    self.running: dict[tuple[str, ...], Any] = {}

  def through(
    self, part: Part, params: Any, kept: Any, inputs: Any
  ) -> tuple[Any, Any]:
    """Outputs of a part, and its running statistics after the batch."""
    before = _by_norm(kept)
    xs = (inputs, self.places)
    statistics, counts = find_statistics(
      part, *lax.stop_gradient((params, before, xs)), self.key
    )
    mark = partial(checkpoint_name, name=STATISTICS)
    statistics = jax.tree.map(mark, statistics)
    outputs = normalised(part, params, statistics, xs, self.key)
    after = dict(before)
    for name, count in counts.items():
      unbiased = statistics[name]['var'] * (count / (count - 1))
      after[name] = {
        'mean': running(before[name]['mean'], statistics[name]['mean']),
        'var': running(before[name]['var'], unbiased),
      }
    return outputs, _nested(after)

  def head(self, model, name, params, kept, features) -> Array:
    """Logits of a head, with the micro-batches in front."""
    head = getattr(model, name)
    logits, after = self.through(
      Part(
        alone(name, head.clone(frozen_bn=True)), HEADS[name], head.frozen_bn
      ),
      {name: params[name]},
      {name: kept[name]},
      {stage: features[stage] for stage in head.stages},
    )
    self.running[name,] = after[name]
    return logits


def _backbone(walk, backbone, params, kept, images, plan) -> list[Array]:
  """The features of the stages, with the micro-batches in front."""
  params, kept = params['backbone'], kept['backbone']
  stem = Part(
    Stem(backbone.stem_width, False, backbone.dtype),
    run_stem,
    backbone.frozen > 0,
  )
  names = [name for name in params if name.startswith('stem')]
  x, after = walk.through(
    stem,
    {name: params[name] for name in names},
    {name: kept[name] for name in names if name in kept},
    images,
  )
  for name, values in after.items():
    walk.running['backbone', name] = values
  features = []
  for blocks in backbone.blocks(train=True):
    size = 1 if not plan.groups else None
    for group in in_groups(list(blocks), size):

      def run(params, x, group=group, blocks=blocks):
        statistics = {}
        for name in group:
          fields = blocks[name]
          part = Part(
            Bottleneck(**fields | {'train': False}),
            run_block,
            not fields['train'],
          )
          x, statistics[name] = walk.through(part, params[name], kept[name], x)
        return x, statistics

      if len(group) > 1:
        policy = jax.checkpoint_policies.save_only_these_names(STATISTICS)
        run = jax.checkpoint(run, policy=policy)
      x, after = run({name: params[name] for name in group}, x)
      for name, values in after.items():
        walk.running['backbone', name] = values
    features.append(x)
  return features
