"""The evaluation script, on a checkpoint of a tiny network."""

import hashlib
import json
import re
import shutil

import cv2
import numpy as np
import pytest
from evaluation.runs import OVERRIDES, STEP, write_run
from small import MINI, small_flags
from trouble import small_files

from resnest_jax import drawing, files
from resnest_jax.config import config_to_json, load_config
from resnest_jax.data.datasets import open_split
from resnest_jax.errors import UserError
from resnest_jax.evaluation.boundary import boundary_counts
from resnest_jax.evaluation.evaluate_split import draw_overlay, noting
from resnest_jax.labels import ADE20K
from resnest_jax.weights import convert

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


def test_results_are_complete_and_reported(
  result, console, out, workdir, split
):
  expected = {
    'images': 8,
    'step': STEP,
    'checkpoint': f'{workdir}/checkpoints/{STEP}',
    'data': {'name': 'ade20k_mini', 'split': 'validation'},
    'protocol': {'name': 'whole', 'image_scale': [64, 64]},
  }
  assert {key: result[key] for key in expected} == expected
  # The ground truth's pixels do not depend on the network.
  labels = np.concatenate([sample['label'].ravel() for sample in split])
  pixels = [entry['pixels'] for entry in result['per_class']]
  counted = np.bincount(labels, minlength=256)[:150]
  np.testing.assert_array_equal(pixels, counted)
  # An untrained network; the mean is that of the rows.
  ious = [entry['IoU'] for entry in result['per_class']]
  known = [iou for iou in ious if iou is not None]
  assert result['mIoU'] == pytest.approx(np.mean(known))
  assert result['classes_averaged'] == len(known)
  assert result['boundary'] is None  # Only on demand.
  interval = result['mIoU_interval']
  assert (interval['level'], interval['resamples']) == (0.95, 1000)
  assert 0 <= interval['low'] < interval['high'] < 0.1
  assert f'mIoU {100 * result["mIoU"]:.2f}' in console
  assert f'report: {out}/report.html' in console
  text = (out / 'report.html').read_text('utf-8')
  assert f'<dt>mIoU</dt><dd>{100 * result["mIoU"]:.2f}</dd>' in text
  # `:mini` is no longer the network that its backbone's name stands for.
  assert 'pspnet on a ResNeSt of (1, 1, 1, 1) blocks ·' in text
  shown = [*result['report_images']['worst'], *result['report_images']['best']]
  headings = re.findall(r'<strong>\d\. (.*?)</strong>', text)
  assert headings == [image['name'] for image in shown]


def test_overlays_show_the_images_in_the_palettes_colours(result, out, split):
  drawn = [f'overlays/{split[index]["name"]}.png' for index in (0, 3, 7)]
  assert result['overlays'] == drawn
  assert len(list((out / 'overlays').iterdir())) == 3
  # Each pixel is half the image's and half some class' colour.
  picture = cv2.imread(str(out / drawn[0]), cv2.IMREAD_COLOR_RGB)
  image = split[0]['image']
  factor = picture.shape[0] // image.shape[0]  # Small ones are enlarged.
  assert max(picture.shape) > 200
  half = image / 2 + ADE20K.palette[:, None, None] / 2
  found = np.abs(half - picture[::factor, ::factor]) <= 0.5
  assert found.all(-1).any(0).all()
  assert cv2.imread(str(out / 'contact_sheet.png')).shape[0] > 3 * 100


def test_the_same_checkpoint_replaces_its_own_results(
  result, out, workdir, command, call_script
):
  (out / 'overlays' / 'notes.txt').write_text('kept')
  # What metrics.json says is no order to remove it.
  theirs = [
    out / 'notes.txt',
    workdir / 'notes.txt',
    out / 'overlays' / 'a.png',
  ]
  for path in theirs:
    path.write_text('kept')
  names = ['notes.txt', '../../notes.txt', str(theirs[1]), 'overlays/a.png']
  names += ['overlays/notes.txt', 'overlays/../notes.txt', 7, None, ['a'], '']
  listed = result | {'overlays': [*names, *result['overlays']]}
  (out / 'metrics.json').write_text(json.dumps(listed))
  # A link is replaced, too.
  (out / 'contact_sheet.png').unlink()
  (out / 'contact_sheet.png').symlink_to(theirs[0])
  # As a process that was killed leaves it.
  (out / files.temporary_path(workdir / 'elsewhere' / 'a.json').name).touch()
  call_script(*command, '--workdir', workdir, '--config.eval.overlays=1')
  after = read(out)
  assert after['per_class'] == result['per_class']
  assert after['overlays'] == result['overlays'][:1]
  assert {path.read_text() for path in theirs} == {'kept'}
  there = {f'overlays/{path.name}' for path in (out / 'overlays').iterdir()}
  kept = {'overlays/notes.txt', 'overlays/a.png'}
  assert there == {*kept, *after['overlays']}
  assert not [path for path in out.iterdir() if path.name.startswith('.')]
  date = after['date'].replace('T', ' ')[:16]
  assert date in (out / 'report.html').read_text('utf-8')


def test_a_picture_that_cannot_be_made_keeps_none_from_the_others(
  result, workdir, command, call_script, tmp_path, capsys
):
  first, *others = result['overlays']
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'metrics.json').write_text(json.dumps(result))
  (out / first / 'a').mkdir(parents=True)
  given = *command, '--workdir', workdir, '--out', out
  with pytest.raises(UserError) as raised:
    call_script(*given)
  told = rf'scores are in {out}/metrics.json; 1 picture could .*:\n.*{first}'
  assert raised.match(f'(?s){told}')
  assert read(out)['per_class'] == result['per_class']
  assert all((out / name).is_file() for name in others)
  assert (out / 'report.html').is_file()
  assert f'mIoU {100 * result["mIoU"]:.2f}' in capsys.readouterr().out
  # The remedy.
  shutil.rmtree(out / first)
  call_script(*given)
  assert (out / first).is_file()


class Split(list):
  labels = ADE20K


@pytest.mark.parametrize('name', ['../../x', '{mine}/x', 'link/x'])
def test_names_of_images_lead_nowhere_else(name, tmp_path):
  mine, out = tmp_path / 'mine', tmp_path / 'out'
  mine.mkdir()
  (out / 'overlays').mkdir(parents=True)
  (out / 'overlays' / 'link').symlink_to(mine)
  label = np.zeros((4, 6), np.uint8)
  sample = {'image': np.zeros((4, 6, 3), np.uint8), 'label': label}
  for given, told in ((name.format(mine=mine), 1), ('deep/../deeper/x', 0)):
    missing = []
    with noting(missing):
      draw_overlay(out, Split([sample | {'name': given}]), 0, label)
    assert len(missing) == told
    assert all('outside of' in why for why in missing)
  written = [x.relative_to(out).as_posix() for x in out.rglob('*.png')]
  assert written == ['overlays/deeper/x.png']
  assert list(mine.iterdir()) == []


def test_scores_are_printed_where_the_disk_is_full_in_the_end(
  result, workdir, command, call_script, tmp_path, capsys
):
  # Enough for the attempt before the evaluation, and for no result.
  with (
    small_files(),
    pytest.raises(UserError, match=r'cannot write .*File too large.*json'),
  ):
    call_script(*command, '--workdir', workdir, '--out', tmp_path / 'out')
  assert f'mIoU {100 * result["mIoU"]:.2f}' in capsys.readouterr().out
  assert list((tmp_path / 'out').iterdir()) == []


def test_boundary_iou_and_beta_on_demand(
  workdir, command, call_script, split, monkeypatch, tmp_path, capsys
):
  seen = []
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
  assert result['boundary']['mIoU'] == pytest.approx(expected.mean())
  assert 'Boundary' in capsys.readouterr().out
  # The column next to precision and recall is F2, not F1.
  entry = next(x for x in result['per_class'] if x['Fscore'])
  precision, recall = entry['Precision'], entry['Recall']
  f2 = 5 * precision * recall / (4 * precision + recall)
  assert entry['Fscore'] == pytest.approx(f2)


def test_another_protocol_is_named_and_has_a_folder_of_its_own(
  result, workdir, command, call_script
):
  call_script(
    *(*command, '--workdir', workdir, '--config.eval.protocol=slide'),
    *('--config.eval.slide_crop=48,48', '--config.eval.overlays=0'),
  )
  found = read(workdir / 'eval' / f'{STEP}-validation-slide')
  assert found['protocol']['crop'] == [48, 48]
  assert found['per_class'] != result['per_class']


@pytest.fixture(scope='module')
def weights(workdir, tmp_path_factory):
  """The checkpoint's weights as `convert` writes them, and their backbone."""
  folder = tmp_path_factory.mktemp('weights')
  for name, dropped in (('all', ()), ('backbone', BACKBONE)):
    convert.main([str(workdir), '--out', f'{folder}/{name}', *dropped])
  return folder / 'all'


def test_weights_and_the_run_as_weights_give_the_same_scores(
  result, weights, workdir, command, call_script, tmp_path
):
  """The network comes from the run, whatever the configuration says."""
  for source in (weights, workdir):
    out = tmp_path / source.name
    flags = ('--weights', source, '--out', out, '--config.model.width=16')
    call_script(*command, *flags)
    after = read(out)
    assert after['per_class'] == result['per_class']
    assert after['checkpoint'] == str(source)
    if source == weights:
      file = (weights / after['file']).read_bytes()
      assert after['sha256'] == hashlib.sha256(file).hexdigest()
  assert after['step'] == STEP


VARYING = ('date', 'seconds', 'overlays')


def run_of(workdir, folder, values):
  """The run with the configuration that training leaves."""
  folder.mkdir()
  (folder / 'checkpoints').symlink_to(workdir / 'checkpoints')
  config = load_config(MINI, OVERRIDES | {k: str(v) for k, v in values.items()})
  (folder / 'config.json').write_text(config_to_json(config))
  return folder


def test_the_run_alone_gives_the_same_scores(
  result, workdir, mini_data_dir, call_script, tmp_path
):
  run = run_of(workdir, tmp_path / 'run', {'data.data_dir': mini_data_dir})
  call_script('eval.py', '--workdir', run)
  assert read(run / 'eval' / f'{STEP}-validation') == result | {
    'checkpoint': result['checkpoint'],
    **{key: read(run / 'eval' / f'{STEP}-validation')[key] for key in VARYING},
  }
  out = tmp_path / 'out'
  flags = '--config.eval.overlays=0', '--config.eval.report_images=0'
  call_script('eval.py', '--weights', run, '--out', out, *flags)
  assert read(out)['per_class'] == result['per_class']


def test_classes_that_changed_are_named_before_arrays(
  workdir, call_script, tmp_path
):
  for name, shape in (('images', (8, 8, 3)), ('masks', (8, 8))):
    (tmp_path / name).mkdir()
    drawing.write_image(tmp_path / name / 'a.png', np.zeros(shape, np.uint8))
  (tmp_path / 'classes.txt').write_text('soil\nleaf\n')
  values = {'data.name': 'folder', 'data.data_dir': tmp_path}
  values |= {'data.folder.images': '{split}s', 'data.eval_split': 'image'}
  run = run_of(workdir, tmp_path / 'run', values)
  with pytest.raises(UserError, match=r'other classes \(wall there, soil now'):
    call_script('eval.py', '--workdir', run)


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
  '--weights={weights}': 'needs --out',
  # No classifiers are suggested.
  NEW + 'ade20k_psp': r'\A(?!.*resnest50).*Did you mean ade20k_pspnet',
  NEW + '{weights}/../backbone': 'is a backbone, which gives no label',
  # Nothing is overwritten: neither other files nor results of another kind.
  RUN + '--out={old}/eval': r'report\.html is there and is not of',
  RUN + '--out={old}': 'not the result of an evaluation',
  RUN + '--out={old}/eval/report.html/a': 'cannot write .*Not a directory',
  RUN + '--out={old}/linked': r'linked/overlays/x would lie outside of',
  RUN + '--out={old}/' + 'a' * 256: 'cannot write .*File name too long',
  RUN + '--config.data.image_scale=(128,64)': (
    r'protocol.image_scale: \[64, 64\] there, \[128, 64\] now'
  ),
}


@pytest.mark.parametrize('flags', REFUSED)
def test_mistakes_are_told_and_nothing_is_written(
  flags, result, out, weights, workdir, command, call_script, tmp_path
):
  before = (out / 'metrics.json').read_bytes()
  # Of a version without reports, though one is there.
  unreported = {key: result[key] for key in result if key != 'report'}
  (tmp_path / 'eval').mkdir()
  (tmp_path / 'eval' / 'metrics.json').write_text(json.dumps(unreported))
  (tmp_path / 'eval' / 'report.html').write_text('mine')
  (tmp_path / 'linked').mkdir()
  (tmp_path / 'linked' / 'metrics.json').write_text(json.dumps(result))
  (tmp_path / 'linked' / 'overlays').symlink_to(tmp_path)
  there = sorted(tmp_path.rglob('*'))
  folders = {'run': workdir, 'weights': weights, 'old': tmp_path}
  given = flags.format(**folders, new=tmp_path / 'new').split()
  with pytest.raises(UserError, match=f'(?s){REFUSED[flags]}'):
    call_script(*command, *given)
  assert sorted(tmp_path.rglob('*')) == there
  assert (out / 'metrics.json').read_bytes() == before


def test_an_error_is_one_line_and_a_status(
  run_script, workdir, command, tmp_path
):
  flags = ('--workdir', workdir, f'--config.data.data_dir={tmp_path}')
  process = run_script(*command, *flags, status=1)
  assert process.stderr.startswith('error: ade20k_mini is not prepared')
  assert 'Traceback' not in process.stderr
