"""The final stage against plain resizing, one image at a time, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.plain import (
  CANVAS,
  CLASSES,
  LABEL_CANVAS,
  LABEL_SIZES,
  SIZES,
  plain_map,
)

from resnest_jax.data.resize import padded_size
from resnest_jax.evaluation import final_stage, metrics
from resnest_jax.evaluation.multiscale import scaled_sizes
from resnest_jax.evaluation.protocols import Protocol, make_views


def whole(logits, size, canvas, label_size, label_canvas, tile_bytes):
  view = final_stage.resized_view(
    logits, size, canvas, label_size, label_canvas
  )
  return final_stage.label_maps([view], label_size, tile_bytes)


@pytest.mark.parametrize('tile_bytes', [1, 200_000, final_stage.TILE_BYTES])
def test_label_maps_equal_two_plain_resizes(tile_bytes):
  with jax.enable_x64(True):
    size = np.array(SIZES)
    logits = np.random.default_rng(0).standard_normal((5, 8, 12, CLASSES))
    # What stands in the padding must not matter.
    maps = jax.jit(whole, static_argnums=(2, 4, 5))(
      logits, size, CANVAS, np.array(LABEL_SIZES), LABEL_CANVAS, tile_bytes
    )
    assert maps.dtype == np.uint8
    assert maps.shape == (5, *LABEL_CANVAS)
    for i, (h, w) in enumerate(LABEL_SIZES):
      valid = [-(-n // 8) for n in SIZES[i]]
      expected = plain_map(logits[i, : valid[0], : valid[1]], SIZES[i], (h, w))
      np.testing.assert_array_equal(maps[i, :h, :w], expected)
      outside = np.asarray(maps[i]).copy()
      outside[:h, :w] = 255
      assert (outside == 255).all()


@pytest.mark.parametrize(
  ('stride', 'logits_canvas'), [(4, (16, 24)), (8, (8, 12)), (32, (2, 3))]
)
def test_logits_size_follows_the_stride(stride, logits_canvas):
  size = np.array([[64, 96], [1, 33]])
  np.testing.assert_array_equal(
    final_stage.logits_size(size, CANVAS, logits_canvas), -(-size // stride)
  )
  with pytest.raises(ValueError, match='no stride'):
    final_stage.logits_size(size, CANVAS, (9, 12))


@pytest.mark.parametrize('views', [1, 4])
def test_tiles_bound_the_memory(views):
  shapes = (
    jax.ShapeDtypeStruct((1, 16, 16, 150), jnp.float32),
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
  )

  def temporary_bytes(tile_bytes):
    def stage(logits, size):
      seen = [
        final_stage.resized_view(
          logits + i, size, (128, 128), 4 * size, (512, 512)
        )
        for i in range(views)
      ]
      return final_stage.label_maps(seen, 4 * size, tile_bytes)

    compiled = jax.jit(stage).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  plain = 512 * 512 * 150 * 4
  assert temporary_bytes(2 * (views + 2) * plain) > plain
  assert temporary_bytes(2**21) < 2**23


def test_counts_are_exact_and_nothing_invalid_is_counted():
  rng = np.random.default_rng(1)
  label = rng.integers(0, CLASSES, (3, 20, 30)).astype(np.uint8)
  prediction = rng.integers(0, CLASSES, (3, 20, 30)).astype(np.uint8)
  label[rng.random(label.shape) < 0.3] = 255
  expected = np.stack(
    [
      metrics.confusion_matrix(p, t, CLASSES)
      for p, t in zip(prediction, label, strict=True)
    ]
  )
  count = jax.jit(final_stage.count_confusion, static_argnums=2)
  np.testing.assert_array_equal(count(prediction, label, CLASSES), expected)
  # Neither a label nor a prediction beyond the classes wraps into another bin.
  label[0, 0, :2], prediction[0, 0, :2] = [CLASSES, 1], [0, CLASSES]
  label[0, 1:] = 255
  assert count(prediction, label, CLASSES)[0].sum() == np.count_nonzero(
    label[0, 0, 2:] != 255
  )


@pytest.mark.parametrize('name', ['whole', 'ms_flip_1x'])
def test_a_large_image_of_many_classes_takes_little_memory(name):
  """Twelve megapixels; one copy of the scores of all classes has 7.2 GB."""
  protocol, size = Protocol(name), np.array([[3000, 4000]])
  canvases = [(512, 704)]
  if name != 'whole':
    scaled = (scaled_sizes(size, ratio, None) for ratio in protocol.scales)
    canvases = [padded_size(x[0].tolist(), 64) for x in scaled]
  sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  logits = [
    jax.ShapeDtypeStruct((1, height // 8, width // 8, 150), jnp.float32)
    for height, width in canvases
  ]
  if name == 'whole':
    layout, arrays = canvases[0], (logits[0], sizes)
  else:
    layout, arrays = canvases, [(2 * [x], sizes) for x in logits]
  _, build = make_views(protocol, None, None, None)

  def finish(arrays, label_size, label):
    views = build(layout, arrays, label_size, label.shape[1:3])
    maps = final_stage.label_maps(views, label_size)
    return maps, final_stage.count_confusion(maps, label, 150)

  label = jax.ShapeDtypeStruct((1, 3008, 4032), jnp.uint8)
  compiled = jax.jit(finish).lower(arrays, sizes, label).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 400e6
  # What the network has given comes on top: at 1.75 times the size it is much.
  given = {'whole': 16e6, 'ms_flip_1x': 2e9}[name]
  assert memory.argument_size_in_bytes == pytest.approx(given, rel=0.05)
