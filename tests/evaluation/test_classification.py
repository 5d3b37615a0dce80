"""Scores of classifiers against NumPy, on any number of devices; eval.py."""

import json
import math

import browser
import numpy as np
import pytest
from browser import every, one
from evaluation import class_runs, plain
from scipy.special import softmax
from scipy.stats import norm

from resnest_jax import sharding
from resnest_jax.data import crops
from resnest_jax.data.datasets import open_data
from resnest_jax.data.preprocess import MEAN, STD
from resnest_jax.errors import UserError
from resnest_jax.evaluation import classification, evaluate, evaluate_split
from resnest_jax.weights import pretrained

CLASSES = len(class_runs.NAMES)


def evaluated_on(split, monkeypatch, batch_size=4, devices=1):
  config, mesh = class_runs.config_of('.'), plain.make_mesh(devices)
  config.eval.batch_size = batch_size
  monkeypatch.setattr(sharding, 'local_mesh', lambda: mesh)
  model, variables = class_runs.COLOURS, class_runs.LAYER
  return evaluate.Evaluator(config, model, split)(variables)


def test_counts_equal_numpys_on_any_devices(monkeypatch):
  split = class_runs.stand_in(23)
  labels = np.array([x['label'] for x in split])
  colours = np.stack([x['image'][0, 0] for x in split])
  kernel = class_runs.LAYER['kernel']
  probabilities = softmax((colours - np.array(MEAN)) / STD @ kernel, -1)
  order = np.argsort(-probabilities, -1)[:, :5]
  right = order == labels[:, None]
  losses = -np.log(probabilities[np.arange(23), labels])
  summary = {'top1': right[:, 0].sum() / 23, 'top5': right.sum() / 23}
  assert 0 < summary['top1'] < summary['top5'] < 1
  per_class = [right[labels == k, 0].mean() for k in range(CLASSES - 1)]
  pairs = list(zip(labels.tolist(), order[:, 0].tolist(), strict=True))
  counts = [[pairs.count((r, c)) for c in range(6)] for r in range(6)]
  mistakes = [i for i in range(23) if not right[i, 0]]
  mistakes.sort(key=lambda i: -probabilities[i].max())
  for devices, batch_size in ((1, 1), (1, 7), (2, 4), (4, 8)):
    found = evaluated_on(split, monkeypatch, batch_size, devices)
    np.testing.assert_array_equal(found.best, order)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(
      found.probabilities, np.take_along_axis(probabilities, order, 1), 1e-4
    )
    assert found.names == [f'image_{i}' for i in range(23)]
    assert found.scores.summary() == summary
    assert found.loss == pytest.approx(losses.mean(), rel=1e-4)
    np.testing.assert_array_equal(found.scores.per_class, [*per_class, np.nan])
    assert found.scores.images.sum() == 23
    assert found.mistakes().tolist() == mistakes
    np.testing.assert_array_equal(found.confusion, counts)


@pytest.mark.parametrize('label', [6, -1])
def test_every_image_has_to_have_a_class(label, monkeypatch):
  split = class_runs.stand_in(6)
  split[2]['label'] = label
  told = rf'image_2 has the class number {label}; accepted are 0\.\.5'
  with pytest.raises(UserError, match=told):
    evaluated_on(split, monkeypatch)


def test_wilson_interval_is_where_the_share_is_just_probable():
  # Its ends are the shares from which the one found is 1.96 deviations away.
  for right, number in ((81, 100), (0, 30), (30, 30)):
    interval = classification.wilson_interval(right, number)
    assert (interval['level'], interval['method']) == (0.95, 'wilson')
    for end in (interval['low'], interval['high']):
      deviation = math.sqrt(end * (1 - end) / number)
      distance = abs(right / number - end)
      assert distance == pytest.approx(norm.ppf(0.975) * deviation, abs=1e-12)
  assert 0.72 < classification.wilson_interval(81, 100)['low'] < 0.73


# eval.py


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """A run, the flags of its evaluation, its split and metrics.json."""
  root = tmp_path_factory.mktemp('classes')
  data = class_runs.write_pictures(root / 'data')
  run = class_runs.write_class_run(root / 'run', data)
  config = class_runs.config_of(data)
  evaluate_split.evaluate_split(config, workdir=run)
  return run, config, run / 'eval' / f'{class_runs.STEP}-val'


def read(folder):
  return json.loads((folder / 'metrics.json').read_text('utf-8'))


def test_results_are_those_of_the_network_on_center_crops(evaluated):
  run, config, out = evaluated
  split, edge = open_data(config.data, 'val'), class_runs.EDGE
  images = [crops.center_crop(x['image'], edge, 'encoding') for x in split]
  probabilities = softmax(
    class_runs.logits_of(*class_runs.network(), np.stack(images)), 1
  )
  labels = np.array([x['label'] for x in split])
  order, number = np.argsort(-probabilities, 1), len(split)
  hits = order == labels[:, None]
  right, result = hits[:, 0], read(out)
  expected = {
    'images': 21,
    'step': class_runs.STEP,
    'checkpoint': f'{run}/checkpoints/{class_runs.STEP}',
    'protocol': {'name': 'center_crop', 'size': edge, 'rule': 'encoding'},
    'top1': right.sum() / number,
    'top5': hits[:, :5].sum() / number,
    'top1_interval': classification.wilson_interval(right.sum(), number),
    'per_class': [
      {'class': name, 'top1': right[labels == k].mean(), 'images': 4 - k % 2}
      for k, name in enumerate(class_runs.NAMES)
    ],
    'classes_absent': [],
    'report': 'report.html',
  }
  assert {key: result[key] for key in expected} == expected
  assert 0 < expected['top1'] < expected['top5'] < 1
  best = probabilities.max(1)
  surest = sorted(np.flatnonzero(~right), key=lambda i: -best[i])[:3]
  worst = result['report_images']['worst']
  assert [x['name'] for x in worst] == [split[i]['name'] for i in surest]
  (name, probability), *_ = worst[0]['best']
  assert name == class_runs.NAMES[order[surest[0], 0]]
  assert probability == pytest.approx(best[surest[0]], abs=1e-5)
  assert worst[0]['class'] == class_runs.NAMES[labels[surest[0]]]


def test_same_evaluation_replaces_its_results_and_others_do_not(
  evaluated, capsys
):
  run, config, out = evaluated
  before = read(out)
  evaluate_split.evaluate_split(config, workdir=run, checkpoint='best')
  after = read(out)
  for key in ('seconds', 'date'):
    before.pop(key), after.pop(key)
  assert after == before
  said = capsys.readouterr().out
  assert f'top1 {100 * after["top1"]:.2f}  top5 ' in said
  for name, value, message in (
    ('data.center_crop', 'gluon', "rule: 'encoding' there, 'gluon' now"),
    ('eval.protocol', 'slide', 'which is for segmentors'),
    ('data.name', 'folder', 'the data set folder has masks, and'),
  ):
    with config.unlocked():
      config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
      evaluate_split.evaluate_split(config, workdir=run)
  with pytest.raises(UserError, match='is a classifier, which gives no label'):
    pretrained.load_trained(run, tasks=['segmentor'])


def test_report_shows_scores_confusions_and_mistakes(evaluated, tmp_path):
  _, _, out = evaluated
  result = read(out)
  with browser.open_browser(tmp_path) as driver:
    driver.get((out / 'report.html').as_uri())
    shown = one(driver, 'main').text
    assert f'{100 * result["top1"]:.2f}' in one(driver, '.cards').text
    names = every(driver, '#class-table tbody th')
    assert [x.text for x in names] == class_runs.NAMES
    confusions = every(driver, '.confusions b')
    assert {x.text for x in confusions} >= {'1 image', '2 images'}
    every(driver, '.confusions button')[-1].click()
    assert one(driver, '#tip').text.splitlines()[-1].startswith('1 image, ')
    articles = every(driver, 'article')
    for article, mistake in zip(
      articles, result['report_images']['worst'], strict=True
    ):
      assert f'{100 * mistake["best"][0][1]:.1f} %' in article.text
      taken_for = f'{mistake["class"]}, taken for {mistake["best"][0][0]}'
      assert taken_for in article.text
    assert browser.decoded(one(driver, 'article img')).shape[1] == 640
    assert 'nan' not in shown.lower()
    assert driver.get_log('browser') == []


def test_five_of_five_classes_are_no_score():
  shares = np.ones(5)
  for number, names in (5, {'top1'}), (6, {'top1', 'top5'}):
    images = np.ones(number, int)
    scores = classification.ClassScores(0.5, 1.0, shares, images)
    assert {*scores.summary()} == names
