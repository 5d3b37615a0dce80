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

from resnest_jax.evaluation import final_stage, metrics


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
