"""The evaluation script, on a checkpoint of a tiny network."""

import hashlib
import json
import re
import shutil
import types

import cv2
import numpy as np
import pytest
from evaluation.plain import Split
from evaluation.runs import OVERRIDES, STEP, write_run
from small import MINI, small_config, small_flags
from trouble import small_files

from resnest_jax import drawing, files
from resnest_jax.config import config_to_json
from resnest_jax.data.datasets import PreparedSplit
from resnest_jax.errors import UserError
from resnest_jax.evaluation import boundary, evaluate_split, results
from resnest_jax.labels import ADE20K
from resnest_jax.weights import convert


def read(folder):
  return json.loads((folder / 'metrics.json').read_text('utf-8'))


def write(folder, result):
  folder.mkdir(exist_ok=True)
  (folder / 'metrics.json').write_text(json.dumps(result))


@pytest.fixture(scope='module')
def run(tmp_path_factory, mini_data_dir, run_script):
  # A run that the script has evaluated: what it read, wrote and printed.
  run = types.SimpleNamespace(folder=write_run(tmp_path_factory.mktemp('run')))
  flags = small_flags(OVERRIDES | {'data.data_dir': mini_data_dir})
  run.command = ('eval.py', '--config', MINI, *flags)
  run.console = run_script(*run.command, '--workdir', run.folder).stdout
  run.out = run.folder / 'eval' / f'{STEP}-validation'
  run.result = read(run.out)
  run.split = PreparedSplit('ade20k_mini', mini_data_dir, 'validation')
  return run


@pytest.fixture
def evaluate(run, call_script):
  # `evaluate('--workdir', ...)`: the same command, in this process.
  return lambda *flags: call_script(*run.command, *flags)


def test_results_are_complete_and_reported(run):
  result, text = run.result, (run.out / 'report.html').read_text('utf-8')
  ious = [x['IoU'] for x in result['per_class'] if x['IoU'] is not None]
  expected = {
    'images': 8,
    'step': STEP,
    'checkpoint': f'{run.folder}/checkpoints/{STEP}',
    'data': {'name': 'ade20k_mini', 'split': 'validation'},
    'protocol': {'name': 'whole', 'image_scale': [64, 64]},
    'boundary': None,  # Only on demand.
    # An untrained network; the mean is that of the rows.
    'mIoU': pytest.approx(np.mean(ious)),
    'classes_averaged': len(ious),
  }
  assert {key: result[key] for key in expected} == expected
  # The ground truth's pixels do not depend on the network.
  labels = np.concatenate([sample['label'].ravel() for sample in run.split])
  pixels = [entry['pixels'] for entry in result['per_class']]
  assert pixels == np.bincount(labels, minlength=256)[:150].tolist()
  interval = result['mIoU_interval']
  assert (interval['level'], interval['resamples']) == (0.95, 1000)
  assert 0 <= interval['low'] < interval['high'] < 0.1
  assert f'mIoU {100 * result["mIoU"]:.2f}' in run.console
  assert f'report: {run.out}/report.html' in run.console
  assert f'<dt>mIoU</dt><dd>{100 * result["mIoU"]:.2f}</dd>' in text
  # `:mini` is no longer the network that its backbone's name stands for.
  assert 'pspnet on a ResNeSt of (1, 1, 1, 1) blocks ·' in text
  shown = [*result['report_images']['worst'], *result['report_images']['best']]
  headings = re.findall(r'<strong>\d\. (.*?)</strong>', text)
  assert headings == [image['name'] for image in shown]


def test_overlays_show_the_images_in_the_palettes_colours(run):
  drawn = [f'overlays/{run.split[i]["name"]}.png' for i in (0, 3, 7)]
  assert run.result['overlays'] == drawn
  assert len(list((run.out / 'overlays').iterdir())) == 3
  # Each pixel is half the image's and half some class' colour.
  picture = cv2.imread(str(run.out / drawn[0]), cv2.IMREAD_COLOR_RGB)
  image = run.split[0]['image']
  factor = picture.shape[0] // image.shape[0]  # Small ones are enlarged.
  assert max(picture.shape) > 200
  half = image / 2 + ADE20K.palette[:, None, None] / 2
  found = np.abs(half - picture[::factor, ::factor]) <= 0.5
  assert found.all(-1).any(0).all()
  assert cv2.imread(str(run.out / 'contact_sheet.png')).shape[0] > 3 * 100


def test_the_same_checkpoint_replaces_its_own_results(run, evaluate):
  overlays, listed = run.out / 'overlays', run.result['overlays']
  # What metrics.json says is no order to remove it.
  theirs = [x / 'notes.txt' for x in (run.out, run.folder, overlays)]
  for path in (*theirs, overlays / 'a.png'):
    path.write_text('kept')
  names = ['notes.txt', '../../notes.txt', str(theirs[1]), 'overlays/a.png']
  names += ['overlays/notes.txt', 'overlays/../notes.txt', 7, None, ['a'], '']
  write(run.out, run.result | {'overlays': names + listed})
  # A link is replaced, too.
  (run.out / 'contact_sheet.png').unlink()
  (run.out / 'contact_sheet.png').symlink_to(theirs[0])
  # As a process that was killed leaves it.
  (run.out / files.temporary_path(run.folder / 'x' / 'a.json').name).touch()
  evaluate('--workdir', run.folder, '--config.eval.overlays=1')
  after = read(run.out)
  assert after['per_class'] == run.result['per_class']
  assert after['overlays'] == listed[:1]
  kept = [*theirs, overlays / 'a.png']
  assert {path.read_text() for path in kept} == {'kept'}
  assert set(overlays.iterdir()) == {*kept[2:], run.out / listed[0]}
  assert not [path for path in run.out.iterdir() if path.name.startswith('.')]
  date = after['date'].replace('T', ' ')[:16]
  assert date in (run.out / 'report.html').read_text('utf-8')


def test_pictures_outlive_one_that_fails(run, evaluate, tmp_path, capsys):
  out, (first, *others) = tmp_path / 'out', run.result['overlays']
  write(out, run.result)
  (out / first / 'a').mkdir(parents=True)
  told = rf'scores are in {out}/metrics.json; 1 file could .*:\n.*{first}'
  with pytest.raises(UserError, match=f'(?s){told}'):
    evaluate('--workdir', run.folder, '--out', out)
  assert read(out)['per_class'] == run.result['per_class']
  assert all((out / name).is_file() for name in (*others, 'report.html'))
  assert f'mIoU {100 * run.result["mIoU"]:.2f}' in capsys.readouterr().out
  # The remedy.
  shutil.rmtree(out / first)
  evaluate('--workdir', run.folder, '--out', out)
  assert (out / first).is_file()


def test_names_of_images_lead_nowhere_else(tmp_path):
  mine, out, missing = tmp_path / 'mine', tmp_path / 'out', []
  mine.mkdir()
  (out / 'overlays').mkdir(parents=True)
  (out / 'overlays' / 'link').symlink_to(mine)
  label, image = np.zeros((4, 6), np.uint8), np.zeros((4, 6, 3), np.uint8)
  names = '../../x', f'{mine}/x', 'link/x', 'deep/../deeper/x'
  split = Split({'image': image, 'label': label, 'name': x} for x in names)
  for index in range(4):
    with results.noting(missing):
      evaluate_split.draw_overlay(out, split, index, label)
  for name, why in zip(names[:3], missing, strict=True):
    assert f'{name}.png would lie outside of' in why
  written = [x.relative_to(out).as_posix() for x in out.rglob('*.png')]
  assert written == ['overlays/deeper/x.png']
  assert list(mine.iterdir()) == []


def test_a_full_disk_lets_scores_be_printed(run, evaluate, tmp_path, capsys):
  # Enough for the attempt before the evaluation, and for no result.
  told = r'cannot write .*File too large.*json'
  with small_files(), pytest.raises(UserError, match=told):
    evaluate('--workdir', run.folder, '--out', tmp_path / 'out')
  assert f'mIoU {100 * run.result["mIoU"]:.2f}' in capsys.readouterr().out
  assert list((tmp_path / 'out').iterdir()) == []


def test_boundary_iou_and_beta(run, evaluate, monkeypatch, tmp_path, capsys):
  seen = []
  # All pictures are drawn, so that all predictions are at hand.
  monkeypatch.setattr(drawing, 'overlay', lambda x, p, _: seen.append(p) or x)
  flags = '--config.eval.boundary_iou=true', '--config.eval.overlays=8'
  flags += '--config.eval.fscore_beta=2', '--out', tmp_path / 'out'
  evaluate('--workdir', run.folder, *flags)
  result = read(tmp_path / 'out')
  pairs = [(p, s['label']) for p, s in zip(seen, run.split, strict=True)]
  shared, either = sum(boundary.boundary_counts(*pair, 150) for pair in pairs)
  expected = shared[either > 0] / either[either > 0]
  found = [x['BoundaryIoU'] for x in result['per_class']]
  assert [x for x in found if x is not None] == expected.tolist()
  assert result['boundary']['mIoU'] == pytest.approx(expected.mean())
  assert 'Boundary' in capsys.readouterr().out
  # The column next to precision and recall is F2, not F1.
  entry = next(x for x in result['per_class'] if x['Fscore'])
  precision, recall = entry['Precision'], entry['Recall']
  f2 = 5 * precision * recall / (4 * precision + recall)
  assert entry['Fscore'] == pytest.approx(f2)


def test_the_authors_protocol_has_their_mean_and_a_folder_of_its_own(
  run, evaluate, capsys
):
  flags = '--config.eval.slide_crop=48,48', '--config.eval.scales=0.5,1.0'
  evaluate('--workdir', run.folder, '--config.eval.protocol=encoding', *flags)
  out = run.folder / 'eval' / f'{STEP}-validation-encoding'
  found, printed = read(out), capsys.readouterr().out
  assert found['protocol'] == {
    'name': 'encoding',
    'image_scale': [64, 64],
    'crop': [48, 48],
    'stride': [32, 32],
    'scales': [0.5, 1.0],
    'flip': True,
  }
  ious = [x['IoU'] for x in found['per_class']]
  mean = sum(x or 0 for x in ious) / 150
  assert None in ious
  assert found['mIoU_all_classes'] == pytest.approx(mean)
  assert found['mIoU'] == pytest.approx(150 * mean / found['classes_averaged'])
  assert found['per_class'] != run.result['per_class']
  assert f'mIoU_all_classes {100 * mean:.2f}' in printed
  page = (out / 'report.html').read_text('utf-8')
  assert f'<dt>mIoU of all classes</dt><dd>{100 * mean:.2f}</dd>' in page
  assert 'mIoU_all_classes' not in run.result


@pytest.fixture(scope='module')
def weights(run, tmp_path_factory):
  # The checkpoint's weights as `convert` writes them, and their backbone.
  folder = tmp_path_factory.mktemp('weights')
  backbone = '--drop', 'decode_head', 'auxiliary_head'
  for name, dropped in (('all', ()), ('backbone', backbone)):
    convert.main([str(run.folder), '--out', f'{folder}/{name}', *dropped])
  return folder / 'all'


def test_weights_give_the_same_scores(run, weights, evaluate, tmp_path):
  # The network comes from the run, whatever the configuration says.
  for source in (weights, run.folder):
    out = tmp_path / source.name
    evaluate('--weights', source, '--out', out, '--config.model.width=16')
    after = read(out)
    assert after['per_class'] == run.result['per_class']
    assert after['checkpoint'] == str(source)
    if source == weights:
      file = (weights / after['file']).read_bytes()
      assert after['sha256'] == hashlib.sha256(file).hexdigest()
  assert after['step'] == STEP


def trained(run, folder, values):
  # The run with the configuration that training leaves.
  folder.mkdir()
  (folder / 'checkpoints').symlink_to(run.folder / 'checkpoints')
  config = small_config(**OVERRIDES, **{k: str(v) for k, v in values.items()})
  (folder / 'config.json').write_text(config_to_json(config))
  return folder


def test_the_run_alone_is_enough(run, mini_data_dir, call_script, tmp_path):
  folder = trained(run, tmp_path / 'run', {'data.data_dir': mini_data_dir})
  # Moved, with a result that names the former place.
  out = shutil.copytree(run.out, folder / 'eval' / run.out.name)
  write(out, run.result | {'checkpoint': f'/former/checkpoints/{STEP}'})
  call_script('eval.py', '--workdir', folder)
  found = read(folder / 'eval' / f'{STEP}-validation')
  varying = {key: found[key] for key in ('date', 'seconds', 'overlays')}
  assert found == run.result | varying
  out = tmp_path / 'out'
  flags = '--config.eval.overlays=0', '--config.eval.report_images=0'
  call_script('eval.py', '--weights', folder, '--out', out, *flags)
  assert read(out)['per_class'] == run.result['per_class']


def test_classes_are_named_before_arrays(run, call_script, tmp_path):
  for name, shape in (('images', (8, 8, 3)), ('masks', (8, 8))):
    (tmp_path / name).mkdir()
    drawing.write_image(tmp_path / name / 'a.png', np.zeros(shape, np.uint8))
  (tmp_path / 'classes.txt').write_text('soil\nleaf\n')
  values = {'data.name': 'folder', 'data.data_dir': tmp_path}
  values |= {'data.folder.images': '{split}s', 'data.eval_split': 'image'}
  folder = trained(run, tmp_path / 'run', values)
  with pytest.raises(UserError, match=r'wall, .* 147 more; new: soil, leaf'):
    call_script('eval.py', '--workdir', folder)


# --- Refusals ----------------------------------------------------------------

RUN = '--workdir={run} '
NEW = '--out={new} --weights='
REFUSED = {
  '--workdir={old}': 'Train first',
  RUN + '--checkpoint=3': "no checkpoint '3'; .* 7",
  RUN + '--config.model.width=16': 'of another network',
  RUN + '--config.model.dilation_rule=timm': 'dilation_rule=mmseg',
  RUN + '--config.model.head=encoding_pspnet': r'head psp.*model\.head=pspnet',
  RUN + '--config.model.num_classes=19': 'is 19, but .* has 150 classes',
  RUN + '--config.data.data_dir={old}': r'\Aade20k_mini is not prepared',
  RUN + '--split=test': "no split 'test'",
  '--weights={weights}': 'needs --out',
  # No classifiers are suggested.
  NEW + 'ade20k_psp': r'\A(?!.*resnest50_d2).*Did you mean ade20k_pspnet',
  NEW + '{weights}/../backbone': 'is a backbone, which gives no label',
  # Nothing is overwritten: neither other files nor results of another kind.
  RUN + '--out={old}/eval': r'report\.html is there and is not of',
  RUN + '--out={old}': 'not the result of an evaluation',
  RUN + '--out={old}/eval/report.html/a': 'cannot write .*Not a directory',
  RUN + '--out={old}/linked': r'linked/overlays/x would lie outside of',
  RUN + '--out={old}/' + 'a' * 256: 'cannot write .*File name too long',
  RUN + '--config.data.image_scale=9,9': 'scale: .64, 64. there, .9, 9. now',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_mistakes_write_nothing(flags, run, weights, evaluate, tmp_path):
  before = read(run.out)
  # Of a version without reports, though one is there.
  unreported = {k: v for k, v in run.result.items() if k != 'report'}
  write(tmp_path / 'eval', unreported)
  (tmp_path / 'eval' / 'report.html').write_text('mine')
  write(tmp_path / 'linked', run.result)
  (tmp_path / 'linked' / 'overlays').symlink_to(tmp_path)
  there = sorted(tmp_path.rglob('*'))
  folders = {'run': run.folder, 'weights': weights, 'old': tmp_path}
  given = flags.format(**folders, new=tmp_path / 'new').split()
  with pytest.raises(UserError, match=f'(?s){REFUSED[flags]}'):
    evaluate(*given)
  assert sorted(tmp_path.rglob('*')) == there
  assert read(run.out) == before
