"""The final stage against plain resizing, one image at a time, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import plain
from evaluation.plain import CANVAS, CLASSES, LABEL_CANVAS, LABEL_SIZES, SIZES

from resnest_jax.data.resize import padded_size
from resnest_jax.evaluation import metrics
from resnest_jax.inference import label_maps
from resnest_jax.inference.multiscale import scaled_sizes
from resnest_jax.inference.protocols import Protocol, make_views

floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def whole(logits, size, canvas, label_size, label_canvas, tile_bytes):
  canvases = size, canvas, label_size, label_canvas
  view = label_maps.resized_view(logits, *canvases)
  return label_maps.label_maps([view], label_size, tile_bytes)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('tile_bytes', [1, 200_000, label_maps.TILE_BYTES])
def test_label_maps_equal_two_plain_resizes(tile_bytes):
  logits = np.random.default_rng(0).standard_normal((5, 8, 12, CLASSES))
  # The padding must not matter.
  maps = jax.jit(whole, static_argnums=(2, 4, 5))(
    *(logits, np.array(SIZES), CANVAS),
    *(np.array(LABEL_SIZES), LABEL_CANVAS, tile_bytes),
  )
  assert maps.dtype == np.uint8
  for i, (h, w) in enumerate(LABEL_SIZES):
    valid = logits[i, : -(-SIZES[i][0] // 8), : -(-SIZES[i][1] // 8)]
    expected = np.full(LABEL_CANVAS, 255)
    scores = plain.resized(plain.resized(valid, SIZES[i]), (h, w))
    expected[:h, :w] = scores.argmax(-1)
    np.testing.assert_array_equal(maps[i], expected)


def test_logits_size_follows_the_stride():
  size = np.array([[64, 96], [1, 33]])
  found = label_maps.logits_size(size, CANVAS, (2, 3))
  np.testing.assert_array_equal(found, -(-size // 32))
  with pytest.raises(ValueError, match='no stride'):
    label_maps.logits_size(size, CANVAS, (9, 12))


def test_counts_are_exact_and_nothing_invalid_is_counted():
  rng = np.random.default_rng(1)
  label, prediction = rng.integers(0, CLASSES, (2, 3, 20, 30), np.uint8)
  label[rng.random(label.shape) < 0.3] = 255
  expected = [
    metrics.confusion_matrix(*pair, CLASSES)
    for pair in zip(prediction, label, strict=True)
  ]
  count = jax.jit(label_maps.count_confusion, static_argnums=2)
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
  protocol, sizes = Protocol(name), integers((1, 2))
  if name == 'whole':
    layout, arrays = (512, 704), (floats((1, 64, 88, 150)), sizes)
  else:
    size = np.array([[3000, 4000]])
    scaled = (scaled_sizes(size, ratio, None) for ratio in protocol.scales)
    layout = [padded_size(x[0].tolist(), 64) for x in scaled]
    logits = (floats((1, h // 8, w // 8, 150)) for h, w in layout)
    arrays = [(2 * [x], sizes) for x in logits]
  _, build = make_views(protocol, None, None, None)

  def finish(arrays, label_size, label):
    views = build(layout, arrays, label_size, label.shape[1:3])
    maps = label_maps.label_maps(views, label_size)
    return maps, label_maps.count_confusion(maps, label, 150)

  label = jax.ShapeDtypeStruct((1, 3008, 4032), jnp.uint8)
  compiled = jax.jit(finish).lower(arrays, sizes, label).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 400e6
