"""Reports of made-up evaluations, with names that are hard to show."""

import types

import numpy as np

from resnest_jax.config import load_config
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.bootstrap import miou_interval
from resnest_jax.evaluation.boundary import BoundaryIoU
from resnest_jax.evaluation.evaluate import Evaluation, ImageResult
from resnest_jax.evaluation.evaluate_split import summarize
from resnest_jax.evaluation.ranked_images import RankedImages
from resnest_jax.evaluation.report import page
from resnest_jax.evaluation.report.images import make_picture
from resnest_jax.labels import ADE20K

EVIL = '<script>alert(1)</script>'
QUOTED = 'a & "b" \'c\' $d </td>'
# 'nowhere' is neither labelled nor predicted, 'Sky' is predicted only.
NAMES = ('wall', EVIL, 'tree 10', 'nowhere', QUOTED, 'Sky', 'tree 9')
PALETTE = ADE20K.palette[: len(NAMES)]


def make_samples(number, seed=0):
  """Images with labels and predictions; the later, the more is right."""
  rng = np.random.default_rng(seed)
  samples = []
  for i in range(number):
    label = rng.choice([0, 1, 2, 4, 6, 255], (18, 24)).astype(np.uint8)
    other = rng.choice([0, 1, 2, 4, 5, 6], label.shape).astype(np.uint8)
    wrong = (rng.random(label.shape) > i / number) | (label == 255)
    samples.append(
      {
        'image': rng.integers(0, 256, (*label.shape, 3), np.uint8),
        'label': label,
        'prediction': np.where(wrong, other, label),
        'name': f'folder/"{i}" <b>',
      }
    )
  return samples


def write_report(path, samples, names=NAMES, palette=PALETTE, confusion=None):
  """What `evaluate_split` writes of them. Returns the contents of the JSON."""
  config = load_config(
    'configs/ade20k_pspnet.py', {'name': EVIL, 'eval.fscore_beta': 2.0}
  )
  ranked = RankedImages(2)
  counts = []
  total = np.zeros((len(names), len(names)), np.int64)
  with BoundaryIoU(len(names)) as boundary:
    for i, sample in enumerate(samples):
      pair = sample['prediction'], sample['label']
      own = metrics.confusion_matrix(*pair, len(names))
      counts.append(metrics.intersection_and_union(own))
      image = ImageResult(i, sample['name'], *pair, own)
      ranked.add(image)
      boundary.add(image)
      total += own
    outlines = boundary.scores()
  total = total if confusion is None else confusion
  counts = np.reshape(counts, (len(samples), 2, len(names))).astype(np.int64)
  scores = metrics.scores(total, names, 2.0)
  evaluation = Evaluation(total, scores, len(samples), 1.5, counts)
  result = {
    'config': config.name,
    'checkpoint': '/runs/"<i>&\'/checkpoints/7',
    'model': config.model.to_dict(),
    'data': {'name': 'folder', 'split': 'val'},
    'protocol': {'name': 'slide', 'crop': [48, 64], 'stride': [32, 42]},
  }
  interval = miou_interval(counts, resamples=20)
  labels = types.SimpleNamespace(classes=names, palette=palette)
  split = types.SimpleNamespace(labels=labels)
  result |= summarize(config, evaluation, interval, outlines, 8, split)
  pictures = {
    kind: [make_picture(x, samples[x.index], labels) for x in shown]
    for kind, shown in ranked.both().items()
  }
  page.write(path, result, evaluation, pictures, palette)
  return result, total
