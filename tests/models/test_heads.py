"""The heads alone: true sizes in a padded canvas, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import (
  QUICK,
  TINY,
  filled_variables,
  quick_jit,
  relative_error,
)

from resnest_jax.models.segmentor import HEADS, create_segmentor
from resnest_jax.sharding import batch_sharding, make_mesh, replicated

# Of the four stages at output stride 8: an image of 41 x 57 and of 33 x 64.
SIZES = [
  np.array([[11, 15], [9, 16]]),
  np.array([[6, 8], [5, 8]]),
  np.array([[6, 8], [5, 8]]),
  np.array([[6, 8], [5, 8]]),
]
CANVASES = [(12, 16), (6, 8), (6, 8), (6, 8)]
CHANNELS = [32, 64, 128, 256]


def head_of(name, dtype):
  return create_segmentor(TINY | {'head': name, 'dtype': dtype}).decode_head


def variables_of(head):
  features = [jnp.zeros((1, 4, 4, channels)) for channels in CHANNELS]
  return filled_variables(
    jax.eval_shape(
      lambda: head.init(
        jax.random.key(0), features, train=False, sizes=[None] * 4
      )
    )
  )


@pytest.mark.parametrize('name', HEADS)
def test_logits_in_a_padded_canvas_are_those_of_the_image_alone(name):
  with jax.enable_x64(True):
    head = head_of(name, 'float64')
    variables = variables_of(head)
    apply = quick_jit(lambda v, x, s: head.apply(v, x, train=False, sizes=s))
    rng = np.random.default_rng(0)
    features = [
      np.zeros((2, *canvas, channels))
      for canvas, channels in zip(CANVASES, CHANNELS, strict=True)
    ]
    alone = [[], []]
    for stage, sizes in zip(features, SIZES, strict=True):
      for index, (rows, columns) in enumerate(sizes):
        values = rng.standard_normal((1, rows, columns, stage.shape[-1]))
        stage[index, :rows, :columns] = values[0]
        alone[index].append(values)
    padded = apply(variables, features, SIZES)
    for index in range(2):
      expected = apply(variables, alone[index], [None] * 4)
      rows, columns = SIZES[0 if name == 'deeplabv3plus' else 3][index]
      assert expected.shape == (1, rows, columns, 7)
      ours = padded[index : index + 1, :rows, :columns]
      assert relative_error(ours, expected) < 1e-12


@pytest.mark.parametrize('name', HEADS)
def test_no_device_gathers_the_batch(name):
  head = head_of(name, 'float32')
  variables = variables_of(head)
  features = [
    jax.ShapeDtypeStruct((8, *canvas, channels), jnp.float32)
    for canvas, channels in zip(CANVASES, CHANNELS, strict=True)
  ]

  def loss(params, stats, features, key):
    logits, _ = head.apply(
      {'params': params, 'batch_stats': stats},
      features,
      train=True,
      sizes=[None] * 4,
      mutable='batch_stats',
      rngs={'dropout': key},
    )
    return jnp.sum(logits**2)

  mesh = make_mesh()
  whole, split = replicated(mesh), batch_sharding(mesh)
  step = jax.jit(
    jax.grad(loss, (0, 2)),
    in_shardings=(whole, whole, split, whole),
    out_shardings=(whole, split),
  )
  text = (
    step.lower(
      variables['params'], variables['batch_stats'], features, jax.random.key(0)
    )
    .compile(QUICK)
    .as_text()
  )
  assert 'all-reduce' in text
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text
