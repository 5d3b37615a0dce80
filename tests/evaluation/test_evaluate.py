"""Evaluation against the plain way, one image at a time."""

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import rich.progress
from evaluation import plain
from golden import reference
from scipy.special import log_softmax

from resnest_jax import sharding
from resnest_jax.errors import UserError
from resnest_jax.evaluation import evaluate, metrics, segmentation
from resnest_jax.inference import steps


def run(*batches, number, step=None, **options):
  task = segmentation.Segmentation(plain.NAMES)
  given = plain.VARIABLES, batches, task, number
  return evaluate.evaluate(step or plain.make_step(), *given, **options)


def plain_logits(batch, slot):
  height, width = plain.SIZES[slot]
  logits = plain.network(batch['image'][slot, :height, :width])
  return plain.resized(logits, plain.LABEL_SIZES[slot])


def test_evaluate_equals_the_plain_way_and_gives_pictures():
  equal, results = np.testing.assert_array_equal, {}
  batch, second = plain.batch_of(), plain.batch_of()
  maps = [plain_logits(batch, slot).argmax(-1) for slot in range(5)]
  for slot in range(5):
    plain.fill_slot(batch if slot >= 3 else second, slot)
  options = {'on_image': lambda image: results.setdefault(image.index, image)}
  with rich.progress.Progress(disable=True) as progress:
    options |= {'progress': progress, 'number': 5}
    evaluation = run(batch, second, **options)
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
  batch, losses = plain.batch_of(), []
  plain.fill_slot(batch, 3)
  for slot in (0, 1, 2, 4):
    logs = log_softmax(plain_logits(batch, slot), -1)
    label = batch['label'][slot, : logs.shape[0], : logs.shape[1]]
    at = np.nonzero(label != 255)
    losses.append(-logs[(*at, label[at])])
  # Tiles of a few rows, the last of which is cut off.
  for options in ({}, {'tile_bytes': 30_000}):
    step = plain.make_step(with_loss=True, **options)
    found = run(batch, number=4, step=step)
    assert found.loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
  without = run(batch, number=4)
  assert without.loss == 0
  np.testing.assert_array_equal(without.confusion, found.confusion)


def test_every_image_has_to_come_once_with_classes():
  batch = plain.batch_of(plain.SIZES[:2], plain.LABEL_SIZES[:2])
  for indices, values, error, message in (
    ([0, 0], [0, 0], RuntimeError, 'came twice'),
    ([0, -1], [0, 0], RuntimeError, 'gave 1 images, the split has 2'),
    ([0, 1], [7, 200], UserError, r'2 of \d+ labelled pixels of image_0'),
  ):
    batch['index'] = np.array(indices)
    batch['label'][0, 0, :3] = [*values, 255]
    with pytest.raises(error, match=message):
      run(batch, number=2)


def test_models_and_batches_that_do_not_fit_are_refused():
  batch = plain.batch_of()
  wrong = steps.make_eval_step(plain.UPSAMPLER, 6)
  with pytest.raises(ValueError, match='the model has 7 classes, the labels 6'):
    wrong(plain.VARIABLES, batch)
  with pytest.raises(ValueError, match='at most 255 classes'):
    steps.make_eval_step(plain.UPSAMPLER, 256)
  assert sharding.divisible_batch_size(5, None) == 5


@pytest.mark.usefixtures('float64')
def test_whole_protocol_equals_mmsegmentation():
  golden = reference.load('infer_whole')
  shape = golden['pred'].shape
  image = cv2.resize(golden['image'], golden['scale'])
  # Padded, next to a filler, and each of the two on its own device.
  sizes = [(1, 1), image.shape[:2]], [(1, 1), shape]
  batch = plain.batch_of(*sizes, ((192, 256), (128, 128)))
  batch['image'][1, : image.shape[0], : image.shape[1]] = image
  batch['label'][1, : shape[0], : shape[1]] = golden['pred']
  plain.fill_slot(batch, 0)
  model, weights = plain.golden_model('cityscapes_pspnet')
  options = {'mesh': plain.make_mesh(2), 'dtype': jnp.float64}
  maps, counts = steps.make_eval_step(model, 19, **options)(weights, batch)
  np.testing.assert_array_equal(maps[1, : shape[0], : shape[1]], golden['pred'])
  assert np.trace(counts[1]) == golden['pred'].size
