"""Evaluation against the plain way, one image at a time."""

import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.progress
from evaluation.plain import (
  CLASSES,
  LABEL_SIZES,
  SIZES,
  Upsampler,
  make_mesh,
  plain_map,
  random_batch,
  variables,
)
from golden import reference

from resnest_jax import sharding
from resnest_jax.data import device
from resnest_jax.errors import UserError
from resnest_jax.evaluation import evaluate, inference, metrics
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import import_state_dict


def fill_slot(batch, slot):
  """Turns a slot into the filler that the pipeline uses."""
  batch['image'][slot] = 0
  batch['size'][slot] = batch['label_size'][slot] = 1
  batch['label'][slot] = 255
  batch['index'][slot] = -1
  batch['name'][slot] = ''


def plain_evaluation(batch):
  """The same protocol with neither buckets nor batches nor tiles."""
  maps, confusion = [], np.zeros((CLASSES, CLASSES), np.int64)
  for i, (h, w) in enumerate(batch['size']):
    hl, wl = batch['label_size'][i]
    image = device.preprocess(
      batch['image'][i : i + 1, :h, :w], batch['size'][i : i + 1]
    )
    logits = image[0, ::8, ::8] @ variables()['kernel']
    maps.append(plain_map(logits, (h, w), (hl, wl)))
    confusion += metrics.confusion_matrix(
      maps[-1], batch['label'][i, :hl, :wl], CLASSES
    )
  return maps, confusion


def test_evaluate_equals_the_plain_way_and_gives_pictures():
  batch = random_batch(0, SIZES, LABEL_SIZES)
  maps, confusion = plain_evaluation(batch)
  second = random_batch(0, SIZES, LABEL_SIZES)
  for slot in range(5):
    fill_slot(batch if slot >= 3 else second, slot)
  results = {}
  with rich.progress.Progress(disable=True) as progress:
    evaluation = evaluate.evaluate(
      inference.make_eval_step(Upsampler(), CLASSES),
      variables(),
      [batch, second],
      tuple('abcdefg'),
      5,
      progress=progress,
      on_image=lambda result: results.setdefault(result.index, result),
    )
    assert [task.completed for task in progress.tasks] == [5]
  np.testing.assert_array_equal(evaluation.confusion, confusion)
  assert evaluation.confusion.dtype == np.int64
  assert evaluation.scores.mIoU == metrics.scores(confusion).mIoU
  assert sorted(results) == [0, 1, 2, 3, 4]
  for index, result in results.items():
    assert result.name == f'image_{index}'
    np.testing.assert_array_equal(result.prediction, maps[index])
    np.testing.assert_array_equal(
      result.confusion,
      metrics.confusion_matrix(result.prediction, result.label, CLASSES),
    )
    np.testing.assert_array_equal(
      evaluation.image_counts[index],
      metrics.intersection_and_union(result.confusion),
    )
  np.testing.assert_array_equal(
    sum(result.confusion for result in results.values()), confusion
  )


def test_a_padded_shape_compiles_once():
  model = Upsampler()
  # Same padded images, other padded labels: the network is not compiled again.
  wide = random_batch(2, SIZES[:2], LABEL_SIZES[:2], first_index=4)
  padding = ((0, 0), (0, 16), (0, 32))
  wide['label'] = np.pad(wide['label'], padding, constant_values=255)
  evaluate.evaluate(
    inference.make_eval_step(model, CLASSES),
    variables(),
    [
      random_batch(0, SIZES[:2], LABEL_SIZES[:2]),
      random_batch(1, SIZES[2:4], LABEL_SIZES[2:4], first_index=2),
      wide,
    ],
    tuple('abcdefg'),
    6,
  )
  assert model.traces == 1


@pytest.mark.parametrize('indices', [[0, 0], [0, -1]])
def test_every_image_has_to_come_once(indices):
  batch = random_batch(0, SIZES[:2], LABEL_SIZES[:2])
  batch['index'] = np.array(indices)
  eval_step = inference.make_eval_step(Upsampler(), CLASSES)
  message = (
    'came twice' if indices[1] == 0 else 'gave 1 images, the split has 2'
  )
  with pytest.raises(RuntimeError, match=message):
    evaluate.evaluate(eval_step, variables(), [batch], tuple('abcdefg'), 2)


def test_labels_that_are_no_class_are_an_error():
  batch = random_batch(0, SIZES[:1], LABEL_SIZES[:1])
  batch['label'][0, 0, :3] = [CLASSES, 200, 255]
  eval_step = inference.make_eval_step(Upsampler(), CLASSES)
  with pytest.raises(UserError, match=r'2 of \d+ labelled pixels of image_0'):
    evaluate.evaluate(eval_step, variables(), [batch], tuple('abcdefg'), 1)


def test_a_model_of_other_classes_is_refused():
  eval_step = inference.make_eval_step(Upsampler(CLASSES - 1), CLASSES)
  with pytest.raises(ValueError, match='the model has 6 classes, the labels 7'):
    eval_step(variables(), random_batch(0, SIZES[:1], LABEL_SIZES[:1]))
  with pytest.raises(ValueError, match='at most 255 classes'):
    inference.make_eval_step(Upsampler(), 256)


def test_devices_do_not_change_maps_and_counts():
  batch = random_batch(4, SIZES[:4], LABEL_SIZES[:4])
  fill_slot(batch, 1)
  (maps, counts), (sharded_maps, sharded_counts) = (
    inference.make_eval_step(Upsampler(), CLASSES, mesh=mesh)(
      variables(), batch
    )
    for mesh in (None, make_mesh(4))
  )
  assert len(sharded_maps.sharding.device_set) == 4
  np.testing.assert_array_equal(sharded_maps, maps)
  np.testing.assert_array_equal(sharded_counts, counts)
  np.testing.assert_array_equal(
    counts.sum((1, 2)), (batch['label'] != 255).sum((1, 2))
  )


def test_whole_protocol_equals_mmsegmentation():
  golden = reference.load('infer_whole')
  shapes = reference.manifest('mmseg/cityscapes_pspnet')
  first_blocks = {  # Depth 14: one block a stage.
    name: shape
    for name, shape in shapes.items()
    if not re.search(r'layer\d\.[1-9]', name)
  }
  model = create_segmentor(reference.CONFIG | {'stage_sizes': (1, 1, 1, 1)})
  width, height = golden['scale']
  label_height, label_width = golden['pred'].shape
  # Padded, beside a filler, and each of the two on its own device.
  batch = {
    'image': np.zeros((2, 192, 256, 3), np.uint8),
    'size': np.array([[1, 1], [height, width]], np.int32),
    'label': np.full((2, 128, 128), 255, np.uint8),
    'label_size': np.array([[1, 1], golden['pred'].shape], np.int32),
  }
  batch['image'][1, :height, :width] = cv2.resize(
    golden['image'], (width, height), interpolation=cv2.INTER_LINEAR
  )
  batch['label'][1, :label_height, :label_width] = golden['pred']
  with jax.enable_x64(True):
    weights = import_state_dict(model, reference.filled(first_blocks))
    step = inference.make_eval_step(
      model, 19, mesh=make_mesh(2), dtype=jnp.float64
    )
    maps, counts = step(weights, batch)
  np.testing.assert_array_equal(
    maps[1, :label_height, :label_width], golden['pred']
  )
  assert np.trace(counts[1]) == golden['pred'].size


def test_a_batch_has_to_be_divisible_by_the_devices():
  mesh = make_mesh(4)
  assert sharding.divisible_batch_size(5, mesh) == 8
  assert sharding.divisible_batch_size(8, mesh) == 8
  assert sharding.divisible_batch_size(5, None) == 5
  eval_step = inference.make_eval_step(Upsampler(), CLASSES, mesh=mesh)
  with pytest.raises(UserError, match='5 images cannot be split over 4'):
    eval_step(variables(), random_batch(0, SIZES, LABEL_SIZES))
