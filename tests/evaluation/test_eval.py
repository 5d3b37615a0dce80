"""The evaluation script, on a checkpoint of a tiny network."""

import hashlib
import json
import re
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from evaluation.runs import OVERRIDES, STEP, write_run
from golden import reference

from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_split
from resnest_jax.data.labels import ADE20K
from resnest_jax.errors import UserError
from resnest_jax.evaluation import evaluate_split as results
from resnest_jax.evaluation import metrics, visualize
from resnest_jax.evaluation.boundary import boundary_counts
from resnest_jax.evaluation.report import page
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights import convert
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import (
  export_state_dict,
  variable_shapes,
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run's folder with one checkpoint, of random weights."""
  return write_run(tmp_path_factory.mktemp('run'))


def flags(workdir, data_dir, *others):
  return [
    *('--config', 'configs/ade20k_pspnet.py:mini'),
    *(('--workdir', str(workdir)) if workdir else ()),
    f'--config.data.data_dir={data_dir}',
    *(f'--config.{key}={value}' for key, value in OVERRIDES.items()),
    *others,
  ]


@pytest.fixture(scope='module')
def evaluated(workdir, mini_data_dir, run_script):
  """The folder of results, and what stood on the console."""
  console = run_script('eval.py', *flags(workdir, mini_data_dir)).stdout
  return workdir / 'eval' / f'{STEP}-validation', console


@pytest.fixture
def evaluate_here(monkeypatch, root, workdir, mini_data_dir):
  """Runs the script's `main` in this process, where errors can be caught."""

  def run(*others, data_dir=mini_data_dir, workdir=workdir):
    monkeypatch.chdir(root)
    arguments = ['eval.py', *flags(workdir, data_dir, *others)]
    monkeypatch.setattr(sys, 'argv', arguments)
    runpy.run_path('eval.py')['main']()

  return run


def test_results_are_complete_and_consistent(evaluated, workdir, mini_data_dir):
  folder, console = evaluated
  result = json.loads((folder / 'metrics.json').read_text('utf-8'))
  split = open_split('ade20k_mini', mini_data_dir, 'validation')
  assert result['images'] == len(split) == 8
  assert result['step'] == STEP
  assert result['checkpoint'] == f'{workdir}/checkpoints/{STEP}'
  assert result['data'] == {'name': 'ade20k_mini', 'split': 'validation'}
  assert result['protocol'] == {
    'name': 'whole',
    'image_scale': [64, 64],
  }
  assert result['bucket'] == 64
  assert result['model']['dilation_rule'] == 'mmseg'
  assert result['dtype'] == 'float32'
  assert result['versions']['jax']
  # The ground truth's pixels do not depend on the network.
  labels = np.concatenate([sample['label'].ravel() for sample in split])
  pixels = [entry['pixels'] for entry in result['per_class']]
  np.testing.assert_array_equal(
    pixels, np.bincount(labels, minlength=256)[:150]
  )
  # An untrained network; the mean is that of the rows.
  ious = [entry['IoU'] for entry in result['per_class']]
  known = [iou for iou in ious if iou is not None]
  assert result['mIoU'] == pytest.approx(np.mean(known))
  assert result['mIoU'] < 0.1
  assert result['classes_averaged'] == len(known)
  assert f'mIoU {100 * result["mIoU"]:.2f}' in console
  interval = result['mIoU_interval']
  assert 0 <= interval['low'] < interval['high'] < 0.1
  assert (interval['resamples'], interval['level']) == (1000, 0.95)
  assert f' {100 * interval["low"]:.2f} to ' in console
  assert result['boundary'] is None
  assert 'BoundaryIoU' not in result['per_class'][0]
  # Of classes that are nowhere in the ground truth the first are named.
  assert result['classes_absent'][0] in console
  assert 'sky' in console


def test_report_is_named_and_holds_the_scores(evaluated):
  folder, console = evaluated
  result = json.loads((folder / 'metrics.json').read_text('utf-8'))
  assert result['report'] == 'report.html'
  assert f'report: {folder}/report.html' in console
  text = (folder / 'report.html').read_text('utf-8')
  assert f'<dt>mIoU</dt><dd>{100 * result["mIoU"]:.2f}</dd>' in text
  assert text.count('data:image/jpeg') == 4
  # `:mini` is no longer the network that its backbone's name stands for.
  assert 'pspnet on a ResNeSt of (1, 1, 1, 1) blocks ·' in text
  shown = [*result['report_images']['worst'], *result['report_images']['best']]
  headings = re.findall(r'<strong>\d\. (.*?)</strong>', text)
  assert headings == [image['name'] for image in shown]


def test_overlays_show_the_images_in_the_palettes_colours(
  evaluated, mini_data_dir
):
  folder, _ = evaluated
  split = open_split('ade20k_mini', mini_data_dir, 'validation')
  result = json.loads((folder / 'metrics.json').read_text('utf-8'))
  drawn = [f'overlays/{split[index]["name"]}.png' for index in (0, 3, 7)]
  assert result['overlays'] == drawn
  assert sorted(drawn) == [
    f'overlays/{path.name}' for path in sorted((folder / 'overlays').iterdir())
  ]
  # Each pixel is half the image's and half some class' colour.
  picture = cv2.imread(str(folder / drawn[0]), cv2.IMREAD_COLOR_RGB)
  image = split[0]['image']
  factor = picture.shape[0] // image.shape[0]  # Small ones are enlarged.
  assert max(picture.shape) > 200
  assert picture.shape == (*(factor * n for n in image.shape[:2]), 3)
  picture = picture[::factor, ::factor]
  candidates = np.stack(
    [
      visualize.overlay(image, np.full_like(image[..., 0], i), colours)
      for i, colours in ((c, split.labels.palette) for c in range(150))
    ]
  )
  assert (candidates == picture).all(-1).any(0).all()
  sheet = cv2.imread(str(folder / 'contact_sheet.png'))
  assert sheet.shape[0] > 3 * 100


def test_the_same_checkpoint_replaces_its_own_results(
  evaluated, evaluate_here, mini_data_dir
):
  folder, _ = evaluated
  before = json.loads((folder / 'metrics.json').read_text('utf-8'))
  foreign = folder / 'overlays' / 'notes.txt'
  foreign.write_text('kept')
  evaluate_here('--config.eval.overlays=1')
  after = json.loads((folder / 'metrics.json').read_text('utf-8'))
  assert after['per_class'] == before['per_class']
  assert after['mIoU_interval'] == before['mIoU_interval']
  assert after['overlays'] == before['overlays'][:1]
  assert {path.name for path in (folder / 'overlays').iterdir()} == {
    'notes.txt',
    before['overlays'][0].removeprefix('overlays/'),
  }
  assert after['report_images'] == before['report_images']
  assert after['date'].replace('T', ' ')[:16] in (
    folder / 'report.html'
  ).read_text('utf-8')


def test_results_of_another_scale_are_kept_and_named(evaluated, evaluate_here):
  folder, _ = evaluated
  before = (folder / 'metrics.json').read_bytes()
  found = r'protocol.image_scale: \[64, 64\] there, \[128, 64\] now'
  with pytest.raises(UserError, match=found):
    evaluate_here('--config.data.image_scale=(128,64)')
  assert (folder / 'metrics.json').read_bytes() == before


def test_boundary_iou_and_beta_on_demand(
  evaluated, evaluate_here, mini_data_dir, monkeypatch, tmp_path, capsys
):
  # All pictures are drawn, so that all predictions are at hand.
  seen = []
  monkeypatch.setattr(
    visualize, 'overlay', lambda image, p, _: seen.append(p) or image
  )
  evaluate_here(
    *('--out', str(tmp_path / 'out')),
    *('--config.eval.boundary_iou=true', '--config.eval.overlays=8'),
    '--config.eval.fscore_beta=2',
  )
  result = json.loads((tmp_path / 'out/metrics.json').read_text('utf-8'))
  split = open_split('ade20k_mini', mini_data_dir, 'validation')
  labels = [sample['label'] for sample in split]
  counts = sum(
    boundary_counts(*pair, 150) for pair in zip(seen, labels, strict=True)
  )
  known = counts[1] > 0
  expected = counts[0][known] / counts[1][known]
  found = [x['BoundaryIoU'] for x in result['per_class']]
  assert [x for x in found if x is not None] == expected.tolist()
  assert [x is not None for x in found] == known.tolist()
  assert result['boundary'] == {
    'mIoU': pytest.approx(expected.mean()),
    'dilation_ratio': 0.02,
  }
  assert 'Boundary' in capsys.readouterr().out
  # The report has those with the lowest and the highest scores of their own.
  own = {
    sample['name']: metrics.scores(
      metrics.confusion_matrix(prediction, sample['label'], 150)
    ).mIoU
    for prediction, sample in zip(seen, split, strict=True)
  }
  ranked = sorted(own.items(), key=lambda item: item[1])
  ranked = [{'name': name, 'mIoU': pytest.approx(x)} for name, x in ranked]
  assert result['report_images'] == {
    'worst': ranked[:2],
    'best': ranked[:-3:-1],
  }
  # What stands for F2 beside precision and recall is F2, not F1.
  assert result['fscore_beta'] == 2
  precision, recall, fscore = (
    next(x[key] for x in result['per_class'] if x['Fscore'])
    for key in ('Precision', 'Recall', 'Fscore')
  )
  f2 = 5 * precision * recall / (4 * precision + recall)
  assert fscore == pytest.approx(f2)
  before = json.loads((evaluated[0] / 'metrics.json').read_text('utf-8'))
  assert fscore not in [x['Fscore'] for x in before['per_class']]


def test_another_protocol_is_named_and_has_a_folder_of_its_own(
  evaluated, evaluate_here, workdir
):
  evaluate_here(
    '--config.eval.protocol=slide',
    '--config.eval.slide_crop=48,48',
    '--config.eval.overlays=0',
  )
  folder = workdir / 'eval' / f'{STEP}-validation-slide'
  result = json.loads((folder / 'metrics.json').read_text('utf-8'))
  assert result['protocol'] == {
    'name': 'slide',
    'image_scale': [64, 64],
    'crop': [48, 48],
    'stride': [32, 32],
  }
  whole = json.loads((evaluated[0] / 'metrics.json').read_text('utf-8'))
  for key in ('per_class', 'mIoU'):
    assert result[key] != whole[key]
  assert result['images'] == whole['images']
  with pytest.raises(UserError, match='name: slide there, ms_flip_1x now'):
    evaluate_here('--config.eval.protocol=ms_flip_1x', '--out', str(folder))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """The checkpoint's weights as `convert` writes them."""
  config = load_config('configs/ade20k_pspnet.py:mini', OVERRIDES).model
  model = create_segmentor(config)
  variables = reference.filled_variables(variable_shapes(model))
  theirs = export_state_dict(model, variables, 'mmseg')
  folder = tmp_path_factory.mktemp('weights') / 'theirs'
  path = folder.with_suffix('.pth')
  torch.save({name: torch.tensor(x) for name, x in theirs.items()}, path)
  convert.main([str(path), '--out', str(folder)])
  return folder


def test_weights_give_the_checkpoints_scores(
  evaluated, evaluate_here, weights, tmp_path
):
  before = json.loads((evaluated[0] / 'metrics.json').read_text('utf-8'))
  out = tmp_path / 'results'
  evaluate_here('--weights', str(weights), '--out', str(out), workdir=None)
  after = json.loads((out / 'metrics.json').read_text('utf-8'))
  assert after['per_class'] == before['per_class']
  assert after['checkpoint'] == str(weights)
  digits = hashlib.sha256((weights / after['file']).read_bytes()).hexdigest()
  assert after['sha256'] == digits
  assert after['model']['width'] == 8
  assert after['model']['dilation_rule'] == 'mmseg'
  assert len(list((out / 'overlays').iterdir())) == 3


def test_run_as_weights_gives_its_scores(
  evaluated, evaluate_here, workdir, tmp_path
):
  """The network comes from the run, whatever the configuration says."""
  before = json.loads((evaluated[0] / 'metrics.json').read_text('utf-8'))
  out = ('--out', str(tmp_path / 'results'))
  source = ('--weights', str(workdir))
  evaluate_here(*source, *out, '--config.model.width=16', workdir=None)
  after = json.loads((tmp_path / 'results/metrics.json').read_text('utf-8'))
  assert after['per_class'] == before['per_class']
  assert (after['checkpoint'], after['step']) == (str(workdir), STEP)
  with pytest.raises(UserError, match=f"no checkpoint '3'; .* {STEP}"):
    evaluate_here(*source, *out, '--checkpoint', '3', workdir=None)


def test_run_without_colours_has_those_of_its_data_set(workdir):
  weights = load_weights(workdir)
  assert weights.palette == ADE20K.palette.tolist()
  assert weights.image_scale == [64, 64]


def test_weights_that_cannot_be_evaluated(evaluate_here, weights, tmp_path):
  with pytest.raises(UserError, match='either --workdir'):
    evaluate_here('--weights', str(weights))
  with pytest.raises(UserError, match='either --workdir'):
    evaluate_here(workdir=None)
  with pytest.raises(UserError, match='needs --out'):
    evaluate_here('--weights', str(weights), workdir=None)
  out = ('--out', str(tmp_path / 'results'))
  with pytest.raises(UserError, match='Did you mean ade20k_pspnet') as caught:
    evaluate_here('--weights', 'ade20k_psp', *out, workdir=None)
  assert 'resnest50' not in str(caught.value)
  with pytest.raises(UserError, match='resnest50 is a classifier'):
    evaluate_here('--weights', 'resnest50', *out, workdir=None)
  backbone = tmp_path / 'backbone'
  heads = ('decode_head', 'auxiliary_head')
  convert.main([str(weights), '--out', str(backbone), '--drop', *heads])
  with pytest.raises(UserError, match='is a backbone, which gives no label'):
    evaluate_here('--weights', str(backbone), *out, workdir=None)
  assert not (tmp_path / 'results').exists()


def test_what_is_there_is_not_overwritten(evaluate_here, tmp_path):
  (tmp_path / 'thesis.txt').write_text('all of it')
  with pytest.raises(UserError, match='not the result of an evaluation'):
    evaluate_here('--out', str(tmp_path))
  # Nor the results of another split.
  other = {'config': 'ade20k_pspnet_mini', 'data': {'split': 'train'}}
  (tmp_path / 'metrics.json').write_text(json.dumps(other))
  with pytest.raises(UserError, match='nothing was evaluated'):
    evaluate_here('--out', str(tmp_path))
  assert len(list(tmp_path.iterdir())) == 2


def test_foreign_report_is_not_written_over(tmp_path):
  asked = {
    'checkpoint': '7',
    'data': {'split': 'val'},
    'protocol': {'name': 'whole'},
  }
  ours = {**asked, 'overlays': ['overlays/a.png']}
  results.write_json(tmp_path / 'metrics.json', ours)
  replaced = results.previous_pictures(tmp_path, asked)
  assert replaced == [tmp_path / 'overlays/a.png']
  (tmp_path / page.NAME).write_text('mine')
  with pytest.raises(UserError, match=r'report\.html is there and is not of'):
    results.previous_pictures(tmp_path, asked)
  results.write_json(tmp_path / 'metrics.json', {**ours, 'report': page.NAME})
  assert results.previous_pictures(tmp_path, asked) == replaced


def test_errors_say_what_to_do(evaluate_here, tmp_path):
  with pytest.raises(UserError, match='train first'):
    evaluate_here(workdir=tmp_path)
  with pytest.raises(UserError, match=f"no checkpoint '3'; .* {STEP}"):
    evaluate_here('--checkpoint', '3')
  with pytest.raises(UserError, match='of another network'):
    evaluate_here('--config.model.width=16')
  with pytest.raises(UserError, match='dilation_rule=mmseg'):
    evaluate_here('--config.model.dilation_rule=timm')
  with pytest.raises(UserError, match=r'is 19, but .* has 150 classes'):
    evaluate_here('--config.model.num_classes=19')
  with pytest.raises(UserError, match="no split 'test'"):
    evaluate_here('--split', 'test')
  with pytest.raises(UserError, match=r'data\.prepare ade20k_mini'):
    evaluate_here(data_dir=tmp_path)
  assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_and_a_status(run_script, workdir, tmp_path):
  process = run_script('eval.py', *flags(workdir, tmp_path), status=1)
  assert process.stderr.startswith('error: ade20k_mini is not prepared')
  assert 'Traceback' not in process.stderr
