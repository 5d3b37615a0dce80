"""The evaluation script, on a checkpoint of a tiny network."""

import hashlib
import json
import re

import cv2
import numpy as np
import pytest
import torch
from evaluation.runs import OVERRIDES, STEP, write_run
from golden import reference
from small import MINI, small_config, small_flags

from resnest_jax import drawing
from resnest_jax.data.datasets import open_split
from resnest_jax.errors import UserError
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.boundary import boundary_counts
from resnest_jax.labels import ADE20K
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights import convert
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes

BACKBONE = ('--drop', 'decode_head', 'auxiliary_head')


@pytest.fixture(scope='module')
def split(mini_data_dir):
  return open_split('ade20k_mini', mini_data_dir, 'validation')


@pytest.fixture(scope='module')
def command(mini_data_dir):
  flags = small_flags(OVERRIDES | {'data.data_dir': mini_data_dir})
  return 'eval.py', '--config', MINI, *flags


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def out(workdir):
  return workdir / 'eval' / f'{STEP}-validation'


@pytest.fixture(scope='module')
def console(workdir, command, run_script):
  """Output of the evaluation of the run into `out`."""
  return run_script(*command, '--workdir', workdir).stdout


@pytest.fixture(scope='module')
def result(console, out):
  return read(out)


def read(folder):
  return json.loads((folder / 'metrics.json').read_text('utf-8'))


def test_results_are_complete_and_consistent(
  result, console, out, workdir, split
):
  expected = {
    'images': 8,
    'step': STEP,
    'checkpoint': f'{workdir}/checkpoints/{STEP}',
    'data': {'name': 'ade20k_mini', 'split': 'validation'},
    'protocol': {'name': 'whole', 'image_scale': [64, 64]},
    'bucket': 64,
    'dtype': 'float32',
    'boundary': None,
    'report': 'report.html',
  }
  assert {key: result[key] for key in expected} == expected
  assert len(split) == 8
  assert result['model']['dilation_rule'] == 'mmseg'
  assert result['versions']['jax']
  # The ground truth's pixels do not depend on the network.
  labels = np.concatenate([sample['label'].ravel() for sample in split])
  pixels = [entry['pixels'] for entry in result['per_class']]
  counted = np.bincount(labels, minlength=256)[:150]
  np.testing.assert_array_equal(pixels, counted)
  # An untrained network; the mean is that of the rows.
  ious = [entry['IoU'] for entry in result['per_class']]
  known = [iou for iou in ious if iou is not None]
  assert result['mIoU'] == pytest.approx(np.mean(known))
  assert result['mIoU'] < 0.1
  assert result['classes_averaged'] == len(known)
  interval = result['mIoU_interval']
  assert 0 <= interval['low'] < interval['high'] < 0.1
  assert (interval['resamples'], interval['level']) == (1000, 0.95)
  assert 'BoundaryIoU' not in result['per_class'][0]
  for words in (
    f'mIoU {100 * result["mIoU"]:.2f}',
    f' {100 * interval["low"]:.2f} to ',
    f'report: {out}/report.html',
    # The first of the classes that are nowhere in the ground truth.
    result['classes_absent'][0],
    'sky',
  ):
    assert words in console


def test_report_holds_the_scores(result, out):
  text = (out / 'report.html').read_text('utf-8')
  assert f'<dt>mIoU</dt><dd>{100 * result["mIoU"]:.2f}</dd>' in text
  assert text.count('data:image/jpeg') == 4
  # `:mini` is no longer the network that its backbone's name stands for.
  assert 'pspnet on a ResNeSt of (1, 1, 1, 1) blocks ·' in text
  shown = [*result['report_images']['worst'], *result['report_images']['best']]
  headings = re.findall(r'<strong>\d\. (.*?)</strong>', text)
  assert headings == [image['name'] for image in shown]


def test_overlays_show_the_images_in_the_palettes_colours(result, out, split):
  drawn = [f'overlays/{split[index]["name"]}.png' for index in (0, 3, 7)]
  assert result['overlays'] == drawn
  files = sorted(path.name for path in (out / 'overlays').iterdir())
  assert sorted(drawn) == [f'overlays/{name}' for name in files]
  # Each pixel is half the image's and half some class' colour.
  picture = cv2.imread(str(out / drawn[0]), cv2.IMREAD_COLOR_RGB)
  image = split[0]['image']
  factor = picture.shape[0] // image.shape[0]  # Small ones are enlarged.
  assert max(picture.shape) > 200
  assert picture.shape == (*(factor * n for n in image.shape[:2]), 3)
  maps = np.arange(150, dtype=np.uint8)[:, None, None]
  maps = np.broadcast_to(maps, (150, *image.shape[:2]))
  palette = split.labels.palette
  candidates = [drawing.overlay(image, each, palette) for each in maps]
  found = np.equal(candidates, picture[::factor, ::factor])
  assert found.all(-1).any(0).all()
  assert cv2.imread(str(out / 'contact_sheet.png')).shape[0] > 3 * 100


def test_the_same_checkpoint_replaces_its_own_results(
  result, out, workdir, command, call_script
):
  (out / 'overlays' / 'notes.txt').write_text('kept')
  call_script(*command, '--workdir', workdir, '--config.eval.overlays=1')
  after = read(out)
  for key in ('per_class', 'mIoU_interval', 'report_images'):
    assert after[key] == result[key]
  assert after['overlays'] == result['overlays'][:1]
  files = {f'overlays/{path.name}' for path in (out / 'overlays').iterdir()}
  assert files == {'overlays/notes.txt', *after['overlays']}
  date = after['date'].replace('T', ' ')[:16]
  assert date in (out / 'report.html').read_text('utf-8')


def test_boundary_iou_and_beta_on_demand(
  result, workdir, command, call_script, split, monkeypatch, tmp_path, capsys
):
  before, seen = result, []
  # All pictures are drawn, so that all predictions are at hand.
  monkeypatch.setattr(
    drawing, 'overlay', lambda image, p, _: seen.append(p) or image
  )
  call_script(
    *(*command, '--workdir', workdir, '--out', tmp_path / 'out'),
    *('--config.eval.boundary_iou=true', '--config.eval.overlays=8'),
    '--config.eval.fscore_beta=2',
  )
  result = read(tmp_path / 'out')
  pairs = [(p, s['label']) for p, s in zip(seen, split, strict=True)]
  shared, either = sum(boundary_counts(*pair, 150) for pair in pairs)
  expected = shared[either > 0] / either[either > 0]
  found = [x['BoundaryIoU'] for x in result['per_class']]
  assert [x for x in found if x is not None] == expected.tolist()
  assert [x is not None for x in found] == (either > 0).tolist()
  assert result['boundary'] == {
    'mIoU': pytest.approx(expected.mean()),
    'dilation_ratio': 0.02,
  }
  assert 'Boundary' in capsys.readouterr().out
  # The report has those with the lowest and the highest scores of their own.
  own = [
    metrics.scores(metrics.confusion_matrix(*pair, 150)).mIoU for pair in pairs
  ]
  ranked = [
    {'name': split[i]['name'], 'mIoU': pytest.approx(own[i])}
    for i in np.argsort(own)
  ]
  assert result['report_images'] == {
    'worst': ranked[:2],
    'best': ranked[:-3:-1],
  }
  # The column next to precision and recall is F2, not F1.
  assert result['fscore_beta'] == 2
  entry = next(x for x in result['per_class'] if x['Fscore'])
  precision, recall = entry['Precision'], entry['Recall']
  f2 = 5 * precision * recall / (4 * precision + recall)
  assert entry['Fscore'] == pytest.approx(f2)
  assert entry['Fscore'] not in [x['Fscore'] for x in before['per_class']]


def test_another_protocol_is_named_and_has_a_folder_of_its_own(
  result, workdir, command, call_script
):
  call_script(
    *(*command, '--workdir', workdir, '--config.eval.protocol=slide'),
    *('--config.eval.slide_crop=48,48', '--config.eval.overlays=0'),
  )
  found = read(workdir / 'eval' / f'{STEP}-validation-slide')
  assert found['protocol'] == {
    'name': 'slide',
    'image_scale': [64, 64],
    'crop': [48, 48],
    'stride': [32, 32],
  }
  for key in ('per_class', 'mIoU'):
    assert found[key] != result[key]
  assert found['images'] == result['images']


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """The checkpoint's weights as `convert` writes them, and their backbone."""
  model = create_segmentor(small_config().model)
  variables = reference.filled_variables(variable_shapes(model))
  theirs = export_state_dict(model, variables, 'mmseg')
  folder = tmp_path_factory.mktemp('weights')
  path = folder / 'theirs.pth'
  torch.save({name: torch.tensor(x) for name, x in theirs.items()}, path)
  convert.main([str(path), '--out', f'{folder}/theirs'])
  convert.main([str(path), '--out', f'{folder}/backbone', *BACKBONE])
  return folder / 'theirs'


def test_weights_give_the_checkpoints_scores(
  result, weights, command, call_script, tmp_path
):
  call_script(*command, '--weights', weights, '--out', tmp_path / 'out')
  after = read(tmp_path / 'out')
  digits = hashlib.sha256((weights / after['file']).read_bytes()).hexdigest()
  expected = {
    'per_class': result['per_class'],
    'checkpoint': str(weights),
    'sha256': digits,
  }
  assert {key: after[key] for key in expected} == expected
  assert after['model']['width'] == 8
  assert after['model']['dilation_rule'] == 'mmseg'
  assert len(list((tmp_path / 'out' / 'overlays').iterdir())) == 3


def test_run_as_weights_gives_its_scores(
  result, workdir, command, call_script, tmp_path
):
  """The network comes from the run, whatever the configuration says."""
  flags = ('--weights', workdir, '--config.model.width=16')
  call_script(*command, *flags, '--out', tmp_path / 'out')
  after = read(tmp_path / 'out')
  assert after['per_class'] == result['per_class']
  assert (after['checkpoint'], after['step']) == (str(workdir), STEP)


def test_run_without_colours_has_those_of_its_data_set(workdir):
  weights = load_weights(workdir)
  assert weights.palette == ADE20K.palette.tolist()
  assert weights.image_scale == [64, 64]


# --- Refusals ----------------------------------------------------------------

RUN = '--workdir={run} '
NEW = '--out={new} --weights='
REFUSED = {
  '--workdir={old}': 'Train first',
  RUN + '--checkpoint=3': "no checkpoint '3'; .* 7",
  RUN + '--config.model.width=16': 'of another network',
  RUN + '--config.model.dilation_rule=timm': 'dilation_rule=mmseg',
  RUN + '--config.model.num_classes=19': 'is 19, but .* has 150 classes',
  RUN + '--split=test': "no split 'test'",
  RUN + '--config.data.data_dir={old}': r'data\.prepare ade20k_mini',
  RUN + '--weights={weights}': 'either --workdir',
  '': 'either --workdir',
  '--weights={weights}': 'needs --out',
  # No classifiers are suggested.
  NEW + 'ade20k_psp': r'\A(?!.*resnest50).*Did you mean ade20k_pspnet',
  NEW + 'resnest50': 'resnest50 is a classifier',
  NEW + '{weights}/../backbone': 'is a backbone, which gives no label',
  NEW + '{run} --checkpoint=3': "no checkpoint '3'; .* 7",
  # Nothing is overwritten: neither other files nor results of another kind.
  RUN + '--out={old}/eval': r'report\.html is there and is not of',
  RUN + '--out={old}': 'not the result of an evaluation',
  RUN + '--out={old}/train': 'nothing was evaluated',
  RUN + '--config.data.image_scale=(128,64)': (
    r'protocol.image_scale: \[64, 64\] there, \[128, 64\] now'
  ),
  RUN + '--config.eval.protocol=ms_flip_1x --out={run}/eval/7-validation': (
    'name: whole there, ms_flip_1x now'
  ),
}


@pytest.mark.parametrize('flags', REFUSED)
def test_mistakes_are_told_and_nothing_is_written(
  flags, result, out, weights, workdir, command, call_script, tmp_path
):
  before = (out / 'metrics.json').read_bytes()
  (tmp_path / 'thesis.txt').write_text('all of it')
  # The first is of a version without reports, though one is there.
  unreported = {key: result[key] for key in result if key != 'report'}
  for name, other in (('eval', unreported), ('train', {'data': 'train'})):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'metrics.json').write_text(json.dumps(other))
    (tmp_path / name / 'report.html').write_text('mine')
  there = sorted(tmp_path.rglob('*'))
  folders = {'run': workdir, 'weights': weights, 'old': tmp_path}
  given = flags.format(**folders, new=tmp_path / 'new').split()
  with pytest.raises(UserError, match=f'(?s){REFUSED[flags]}'):
    call_script(*command, *given)
  assert sorted(tmp_path.rglob('*')) == there
  assert read(tmp_path / 'train') == other
  assert (out / 'metrics.json').read_bytes() == before


def test_an_error_is_one_line_and_a_status(
  run_script, workdir, command, tmp_path
):
  flags = ('--workdir', workdir, f'--config.data.data_dir={tmp_path}')
  process = run_script(*command, *flags, status=1)
  assert process.stderr.startswith('error: ade20k_mini is not prepared')
  assert 'Traceback' not in process.stderr
