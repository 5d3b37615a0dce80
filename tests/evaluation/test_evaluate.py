"""Evaluation against the plain way, one image at a time."""

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import rich.progress
from evaluation import plain
from golden import reference

from resnest_jax import sharding
from resnest_jax.errors import UserError
from resnest_jax.evaluation import evaluate as evaluation
from resnest_jax.evaluation import metrics
from resnest_jax.inference import steps


def evaluate(*batches, number, step=None, **options):
  given = plain.variables(), batches, plain.NAMES, number
  return evaluation.evaluate(step or plain.make_step(), *given, **options)


def test_evaluate_equals_the_plain_way_and_gives_pictures():
  equal, results = np.testing.assert_array_equal, {}
  batch, second = (plain.batch_of(0, slice(5)) for _ in range(2))
  maps = []
  for slot, (height, width) in enumerate(plain.SIZES):
    logits = plain.network(batch['image'][slot, :height, :width])
    maps.append(plain.resized(logits, plain.LABEL_SIZES[slot]).argmax(-1))
    plain.fill_slot(batch if slot >= 3 else second, slot)
  with rich.progress.Progress(disable=True) as progress:
    evaluation = evaluate(
      batch,
      second,
      number=5,
      progress=progress,
      on_image=lambda result: results.setdefault(result.index, result),
    )
    assert [task.completed for task in progress.tasks] == [5]
  assert evaluation.confusion.dtype == np.int64
  assert evaluation.scores.mIoU == metrics.scores(evaluation.confusion).mIoU
  assert sorted(results) == [0, 1, 2, 3, 4]
  for index, result in results.items():
    assert result.name == f'image_{index}'
    equal(result.prediction, maps[index])
    pair = result.prediction, result.label
    equal(result.confusion, metrics.confusion_matrix(*pair, plain.CLASSES))
    counts = metrics.intersection_and_union(result.confusion)
    equal(evaluation.image_counts[index], counts)
  equal(sum(x.confusion for x in results.values()), evaluation.confusion)


def test_loss_is_the_mean_over_labelled_pixels_and_changes_nothing_else():
  batch, losses = plain.batch_of(0, slice(5)), []
  plain.fill_slot(batch, 3)
  for slot, size in enumerate(plain.SIZES):
    if slot == 3:
      continue
    logits = plain.network(batch['image'][slot, : size[0], : size[1]])
    height, width = plain.LABEL_SIZES[slot]
    shares = plain.softmax(plain.resized(logits, (height, width)))
    label = batch['label'][slot, :height, :width]
    own = np.take_along_axis(shares, label[..., None] % plain.CLASSES, -1)
    losses.append(-np.log(own[..., 0][label != 255]))
  # Tiles of a few rows, the last of which is cut off.
  for options in ({}, {'tile_bytes': 30_000}):
    step = plain.make_step(with_loss=True, **options)
    found = evaluate(batch, number=4, step=step)
    assert found.loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
  without = evaluate(batch, number=4)
  assert without.loss == 0
  np.testing.assert_array_equal(without.confusion, found.confusion)


def test_every_image_has_to_come_once_with_classes():
  batch = plain.batch_of(0, slice(2))
  for indices, values, error, message in (
    ([0, 0], [0, 0], RuntimeError, 'came twice'),
    ([0, -1], [0, 0], RuntimeError, 'gave 1 images, the split has 2'),
    ([0, 1], [7, 200], UserError, r'2 of \d+ labelled pixels of image_0'),
  ):
    batch['index'] = np.array(indices)
    batch['label'][0, 0, :3] = [*values, 255]
    with pytest.raises(error, match=message):
      evaluate(batch, number=2)


def test_a_model_of_other_classes_is_refused():
  eval_step = plain.make_step(plain.Upsampler(plain.CLASSES - 1))
  with pytest.raises(ValueError, match='the model has 6 classes, the labels 7'):
    eval_step(plain.variables(), plain.batch_of(0, slice(1)))
  with pytest.raises(ValueError, match='at most 255 classes'):
    steps.make_eval_step(plain.Upsampler(), 256)


@pytest.mark.usefixtures('float64')
def test_whole_protocol_equals_mmsegmentation():
  golden = reference.load('infer_whole')
  shape = golden['pred'].shape
  image = cv2.resize(golden['image'], golden['scale'])
  # Padded, next to a filler, and each of the two on its own device.
  batch = {
    'image': np.zeros((2, 192, 256, 3), np.uint8),
    'size': np.array([[1, 1], image.shape[:2]], np.int32),
    'label': np.full((2, 128, 128), 255, np.uint8),
    'label_size': np.array([[1, 1], shape], np.int32),
  }
  place = np.s_[1, : shape[0], : shape[1]]
  batch['image'][1, : image.shape[0], : image.shape[1]] = image
  batch['label'][place] = golden['pred']
  model, weights = plain.golden_model('cityscapes_pspnet')
  step = steps.make_eval_step(
    model, 19, mesh=plain.make_mesh(2), dtype=jnp.float64
  )
  maps, counts = step(weights, batch)
  np.testing.assert_array_equal(maps[place], golden['pred'])
  assert np.trace(counts[1]) == golden['pred'].size


def test_a_batch_has_to_be_divisible_by_the_devices():
  mesh = plain.make_mesh(4)
  assert sharding.divisible_batch_size(5, None) == 5
  with pytest.raises(UserError, match='5 images cannot be split over 4'):
    plain.make_step(mesh=mesh)(plain.variables(), plain.batch_of(0, slice(5)))
