"""Temperatures of logits: fitted, kept with the weights, and used by all."""

import json
import shutil
import types

import cv2
import numpy as np
import pytest
from evaluation import class_runs, plain
from evaluation.runs import save_run
from golden.reference import variables_of
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from small import RUN, small_config

import resnest_jax as rj
from resnest_jax import sharding
from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.evaluation import calibration, evaluate, evaluate_split
from resnest_jax.export.folder import FORMATS, export_model
from resnest_jax.export.onnx_file import read_onnx
from resnest_jax.export.renew import renew_exports
from resnest_jax.export.stablehlo import read_stablehlo
from resnest_jax.inference.protocols import Protocol
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.prediction.files import predict_files
from resnest_jax.weights import pretrained, temperature
from resnest_jax.weights.convert import main as convert

TEMPERATURES = 0.5, 1.7, 3.0


def drawn(logits, at, seed=0):
  """Labels (...), of whose probabilities the logits (..., C) know."""
  sums = softmax(np.float64(logits) / at, -1).cumsum(-1)
  chosen = np.random.default_rng(seed).random((*sums.shape[:-1], 1))
  return np.uint8((sums < chosen).sum(-1).clip(max=sums.shape[-1] - 1))


def nll(logits, labels, at):
  logs = log_softmax(np.float64(logits) / at, -1)
  return -np.take_along_axis(logs, labels[:, None].astype(int), 1).mean()


def twin(logits, labels, at):
  """ECE and NLL of logits (n, C), bin by bin."""
  probabilities = softmax(np.float64(logits) / at, -1)
  sure, right = probabilities.max(-1), probabilities.argmax(-1) == labels
  error = 0.0
  for i in range(15):
    inside = (sure > i / 15) & (sure <= (i + 1) / 15)
    if inside.any():
      distance = abs(sure[inside].mean() - right[inside].mean())
      error += inside.mean() * distance
  return {'ECE': error, 'NLL': nll(logits, labels, at)}


def measured(measure, logits, labels):
  """The sums of a `Measure` over (rows, columns, C) and (rows, columns)."""
  scores = np.float32(logits).swapaxes(1, 2)[None]
  found = measure(scores, scores.argmax(2).astype(np.uint8), labels[None])
  return np.asarray(found, np.float64).sum((0, 1))


@pytest.mark.parametrize('at', TEMPERATURES)
@pytest.mark.parametrize('classes', [2, 19])
def test_drawn_logits_give_their_temperature_back(at, classes):
  shape = 300, 1000, classes
  logits = 3 * np.random.default_rng(1).standard_normal(shape, 'f4')
  labels = drawn(logits, at)
  found = calibration.fit(measured(calibration.slopes, logits, labels))
  assert found == pytest.approx(at, rel=0.01)
  part = logits[:20].reshape(-1, classes), labels[:20].ravel()
  found = calibration.fit(
    measured(calibration.slopes, logits[:20], labels[:20])
  )
  best = minimize_scalar(lambda x: nll(*part, np.exp(x)), bounds=(-2, 2)).x
  assert found == pytest.approx(np.exp(best), rel=1e-3)
  bins = measured(calibration.reliability(found), logits[:20], labels[:20])
  for sums, t in zip(bins, (1, found), strict=True):
    errors = calibration._errors(sums)
    expected = twin(*part, t)
    assert {x: errors[x] for x in expected} == pytest.approx(expected, abs=1e-6)


def test_what_no_temperature_betters():
  logits = np.float32([[[1, 0, 0], [0, 2, 0]]])
  right, wrong = np.uint8([[0, 1]]), np.uint8([[1, 2]])
  for labels, end in ((right, 1 / 16), (wrong, 16)):
    found = calibration.fit(measured(calibration.slopes, logits, labels))
    assert found == end
  none = measured(calibration.slopes, logits, np.uint8([[255, 255]]))
  with pytest.raises(UserError, match='nothing in this split has a label'):
    calibration.fit(none)


def plain_logits(image):
  size = plain.fitted(*image.shape[:2], 64, 64)
  logits = plain.network(cv2.resize(image, size[::-1]))
  return plain.resized(logits, image.shape[:2])


def test_sums_of_a_split_are_the_same_on_all_devices(monkeypatch):
  split, known = plain.noise(9), []
  for index, sample in enumerate(split):
    logits = plain_logits(sample['image'])
    sample['label'] = drawn(logits, 2.0, index)
    sample['label'][:5] = 255
    known.append((logits[5:].reshape(-1, 7), sample['label'][5:].ravel()))
  logits, labels = (np.concatenate(x) for x in zip(*known, strict=True))
  best = minimize_scalar(
    lambda x: nll(logits, labels, np.exp(x)), bounds=(-2, 2)
  ).x

  def run(measure, devices, batch_size):
    mesh = plain.make_mesh(devices)
    monkeypatch.setattr(sharding, 'local_mesh', lambda: mesh)
    config = small_config(**{'eval.batch_size': batch_size})
    given = config, plain.UPSAMPLER, split
    return evaluate.Evaluator(*given, measure=measure)(plain.VARIABLES)

  alone = run(None, 1, 4)
  for devices, batch_size in ((1, 2), (2, 4)):
    found = run(calibration.slopes, devices, batch_size)
    np.testing.assert_array_equal(found.confusion, alone.confusion)
    at = calibration.fit(found.measured)
    assert at == pytest.approx(np.exp(best), rel=1e-3)
    measure = calibration.reliability(at)
    bins = run(measure, devices, batch_size).measured
    right = np.trace(alone.confusion)
    assert bins[:, :, 0].sum(1).tolist() == 2 * [len(labels)]
    assert bins[:, :, 2].sum(1).tolist() == 2 * [right]
    for sums, t in zip(bins, (1, at), strict=True):
      errors, expected = calibration._errors(sums), twin(logits, labels, t)
      errors = {x: errors[x] for x in expected}
      assert errors == pytest.approx(expected, abs=1e-5)


def test_classifiers_have_the_temperature_of_their_images(tmp_path, capsys):
  data = class_runs.write_pictures(tmp_path / 'data')
  run = class_runs.write_class_run(tmp_path / 'run', data)
  config, out = class_runs.config_of(data), run / 'eval/3-val'
  evaluate_split.evaluate_split(config, workdir=run)
  before = json.loads((out / 'metrics.json').read_text())
  evaluate_split.evaluate_split(config, workdir=run, calibrate=True)
  after = json.loads((out / 'metrics.json').read_text())
  found = after.pop('calibration')
  varying = {key: after[key] for key in ('seconds', 'date')}
  assert after == before | varying
  pictures = sorted((data / 'val').rglob('*.png'))
  raw = class_runs.write_class_run(tmp_path / 'raw', data)
  given = rj.from_checkpoint(raw).predict(pictures)
  logits = np.log([x.probabilities for x in given])
  labels = [class_runs.NAMES.index(x.parent.name) for x in pictures]
  at = found['temperature']
  for key, t in (('before', 1), ('after', at)):
    errors = {x: found[key][x] for x in ('ECE', 'NLL')}
    expected = twin(logits, np.array(labels), t)
    assert errors == pytest.approx(expected, abs=1e-4)
  now = rj.from_checkpoint(run).predict(pictures)
  given = [x.probabilities for x in now]
  np.testing.assert_allclose(given, softmax(logits / at, 1), atol=1e-5)
  assert [x.label for x in now] == logits.argmax(1).tolist()
  assert f'temperature {at:.4g}: ECE ' in capsys.readouterr().out
  evaluate_split.evaluate_split(config, workdir=run)
  again = json.loads((out / 'metrics.json').read_text())
  assert again | varying == before | varying


# A run of a segmentor, whose masks are drawn at a temperature.

AT, STEP = 0.6, 5
CONFIG = RUN | {'model.head': 'fcn', 'model.num_classes': 7}


def write_run(path, config, seed=0):
  variables = variables_of(create_segmentor(config.model), seed)
  names = plain.NAMES
  about = {'classes': names, 'palette': [[9 * i] * 3 for i in range(7)]}
  about['dilation_rule'] = config.model.dilation_rule
  return save_run(path, STEP, config, variables, about)


@pytest.fixture(scope='module')
def calibrated(tmp_path_factory, run_script):
  """A run after eval.py --calibrate, and what it was before."""
  root = tmp_path_factory.mktemp('calibrated')
  data = root / 'data'
  values = CONFIG | {'data.data_dir': str(data)}
  config = load_config('configs/folder.py:mini', values)
  run = write_run(root / 'run', config)
  for kind in ('images', 'masks'):
    (data / kind / 'val').mkdir(parents=True)
  (data / 'classes.txt').write_text('\n'.join(plain.NAMES))
  known = types.SimpleNamespace(run=run, root=root, config=config)
  known.picture = data / 'images/val/0.png'
  model = rj.from_checkpoint(run)
  assert model.temperature == 1
  for i, sample in enumerate(plain.noise(8, (48, 64), (48, 64))):
    cv2.imwrite(f'{data}/images/val/{i}.png', sample['image'])
    found = model.predict(data / f'images/val/{i}.png', probabilities=True)
    if not i:
      known.before = found
    mask = drawn(np.log(found.probabilities), AT, i)
    cv2.imwrite(f'{data}/masks/val/{i}.png', mask)
  evaluate_split.evaluate_split(config, workdir=run, out=root / 'plain')
  flags = [f'--config.{k}={v}' for k, v in values.items()]
  words = ('--config', 'configs/folder.py:mini', '--workdir', run, *flags)
  known.said = run_script('eval.py', *words, '--calibrate').stdout
  known.out = run / f'eval/{STEP}-val'
  known.result = json.loads((known.out / 'metrics.json').read_text())
  known.at = known.result['calibration']['temperature']
  return known


def test_eval_fits_and_keeps_the_temperature(calibrated):
  result = calibrated.result
  assert calibrated.at == pytest.approx(AT, rel=0.05)
  plainly = json.loads((calibrated.root / 'plain/metrics.json').read_text())
  assert 'calibration' not in plainly
  assert plainly['per_class'] == result['per_class']
  old, new = (result['calibration'][x] for x in ('before', 'after'))
  assert new['NLL'] < old['NLL']
  assert new['ECE'] < old['ECE']
  assert sum(x['count'] for x in new['bins']) == 8 * 48 * 64
  kept = calibrated.run / f'calibration/{STEP}.json'
  assert f'temperature kept in {kept}' in calibrated.said
  assert json.loads(kept.read_text())['data']['split'] == 'val'
  page = (calibrated.out / 'report.html').read_text()
  assert f'divided by the temperature {calibrated.at:.4g} ' in page
  assert page.count('aria-label="Reliability, ') == 2
  assert f'ECE {100 * new["ECE"]:.2f}, NLL {new["NLL"]:.4f}' in page


def test_probabilities_use_it_and_labels_stay(calibrated):
  before, run = calibrated.before, calibrated.run
  logits = np.log(before.probabilities)
  for protocol in ('whole', 'slide'):
    model = rj.from_checkpoint(run, protocol=protocol)
    assert model.temperature == calibrated.at
  found = rj.from_checkpoint(run).predict(
    calibrated.picture, probabilities=True
  )
  expected = softmax(logits / calibrated.at, -1)
  np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
  np.testing.assert_array_equal(found.labels, before.labels)
  assert rj.from_checkpoint(run, protocol='ms_flip_1x').temperature == 1


def test_predict_writes_how_sure_it_is(calibrated, tmp_path):
  given, out = [calibrated.picture], tmp_path / 'out'
  save = {'save': ['masks'], 'confidence': True}
  predict_files(given, calibrated.run, out, **save)
  logits = np.log(calibrated.before.probabilities) / calibrated.at
  sure = softmax(logits, -1).max(-1)
  picture = cv2.imread(f'{out}/0_confidence.png', cv2.IMREAD_UNCHANGED)
  assert picture.dtype == np.uint8
  assert np.abs(picture - 255 * sure).max() < 0.51
  about = json.loads((out / 'predictions.json').read_text())
  assert about['temperature'] == calibrated.at
  (entry,) = about['predictions']
  assert entry['confidence'] == '0_confidence.png'
  assert entry['mean_confidence'] == pytest.approx(sure.mean(), abs=1e-4)
  labels = cv2.imread(f'{out}/0.png', cv2.IMREAD_UNCHANGED)
  np.testing.assert_array_equal(labels, calibrated.before.labels)


def test_exports_use_it(calibrated, tmp_path):
  out, size = tmp_path / 'out', (48, 64)
  how = {'sizes': [size], 'probabilities': True, 'formats': FORMATS[:3]}
  export_model(calibrated.run, out, **how)
  about = json.loads((out / 'about.json').read_text())
  assert about['temperature'] == calibrated.at
  card = (out / 'README.md').read_text()
  assert f'divided by the temperature {calibrated.at:.4g}' in card
  # As the network sees it, without a resize.
  model = rj.from_checkpoint(out, image_scale=(64, 48))
  assert model.temperature == calibrated.at
  image = cv2.imread(str(calibrated.picture))[..., ::-1]
  expected = model.predict(image, probabilities=True)
  # Renewed ones stay as they are, whatever is fitted to the weights.
  pretrained.load_weights(out).place.write(2.5, {})
  assert rj.from_checkpoint(out).temperature == 2.5
  renew_exports(out)
  assert (
    json.loads((out / 'about.json').read_text())['temperature'] == calibrated.at
  )
  program = read_stablehlo(out / 'model_48x64.stablehlo')
  for run in (program, read_onnx(out / 'model_48x64.onnx')):
    labels, found = (np.asarray(x)[0] for x in run(image[None]))
    np.testing.assert_allclose(found, expected.probabilities, atol=1e-4)
    assert (labels == expected.labels).mean() > 0.999
  # What converts takes it along, but for a backbone.
  for name, words, there in (
    ('a', (), True),
    ('b', ('--drop', 'decode_head', 'auxiliary_head'), False),
  ):
    convert([str(calibrated.run), '--out', f'{tmp_path}/{name}', *words])
    about = json.loads((tmp_path / name / 'about.json').read_text())
    assert ('temperature' in about) == there


def test_other_weights_do_not_get_it(calibrated, tmp_path):
  other = write_run(tmp_path / 'run', calibrated.config, seed=1)
  kept = shutil.copytree(calibrated.run / 'calibration', other / 'calibration')
  assert rj.from_checkpoint(other).temperature == 1
  (kept / f'{STEP}.json').write_text('{"temperature": 0}')
  with pytest.raises(
    UserError, match=r'temperature is 0; it must be from 0\.01'
  ):
    rj.from_checkpoint(other)


def test_weights_in_a_file_keep_it_next_to_it(calibrated, tmp_path):
  convert([str(calibrated.run), '--out', str(tmp_path / 'a')])
  file = tmp_path / 'a' / 'model.safetensors'
  before = file.read_bytes()
  how = {'weights': str(tmp_path / 'a'), 'out': tmp_path / 'out'}
  evaluate_split.evaluate_split(calibrated.config, calibrate=True, **how)
  result = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
  # Of the logits as they are, whatever was fitted before.
  found = result['calibration']['temperature']
  assert found == pytest.approx(calibrated.at, rel=1e-5)
  place = file.with_name('model.safetensors.temperature.json')
  changed = json.loads(place.read_text()) | {'temperature': 3}
  place.write_text(json.dumps(changed))
  assert rj.from_checkpoint(tmp_path / 'a').temperature == 3
  assert file.read_bytes() == before
  other = write_run(tmp_path / 'run', calibrated.config, seed=1)
  convert([str(other), '--out', str(tmp_path / 'b')])
  shutil.copy(tmp_path / 'b' / file.name, file)
  assert rj.from_checkpoint(tmp_path / 'a').temperature == 1


def test_where_no_logits_decide_it_is_refused(calibrated, tmp_path):
  place = temperature.Place(tmp_path / 'x.json', '')
  for name in ('ms_flip_0x', 'ms_flip_1x', 'encoding'):
    protocol = Protocol(name, (64, 64), (48, 48))
    with pytest.raises(UserError, match=f'{name}.* decides by means of prob'):
      calibration.check(protocol, place)
  (tmp_path / 'file').touch()
  place = temperature.Place(tmp_path / 'file' / 'x.json', '')
  with pytest.raises(UserError, match='leave --calibrate out'):
    calibration.check(Protocol(), place)
