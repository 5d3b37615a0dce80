"""Exports of tiny networks: that they agree, run alone, and are renewed."""

import functools
import json
import os
import shutil
import sys
from datetime import date
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from cards import run_card
from evaluation.runs import STEP
from golden.reference import TINY, assert_same_bits, variables_of
from lengths import others_long
from PIL import Image
from weights import built
from weights.built import refused

import resnest_jax as rj
from resnest_jax.errors import UserError
from resnest_jax.export import checks, folder, pictures, promise, stablehlo
from resnest_jax.export.card import Export
from resnest_jax.export.renew import renew_exports
from resnest_jax.models import convolution, segmentor
from resnest_jax.weights import files, infer, pretrained
from resnest_jax.weights.state_dict import export_state_dict

# Not square, and rows that no stride divides.
SIZE = (65, 64)
NAMES = ['wall', 'sky | clouds', 'tree', 'road', 'car', 'sea', 'dog']
PALETTE = [[30 * i, 7, 200] for i in range(7)]
FILES = ['model_33x32.stablehlo', 'model_32x40.stablehlo']
# Weights by which noise has several classes; of the other heads those of 0.
SEEDS = {'encoding_fcn': 12, 'encoding_pspnet': 1, 'encoding_deeplabv3': 18}
# Written by the JAX of its name:
#   images = jax.ShapeDtypeStruct(
#     (*export.symbolic_shape('b'), 4, 4, 3), jnp.uint8
#   )
#   program = jax.jit(lambda x: (jnp.argmax(x, -1).astype(jnp.uint8),))
#   export.export(program, platforms=('cpu', 'cuda', 'tpu'))(images).serialize()
# JAX 0.12 does not read the older one, JAX 0.10 does not run the newer one.
WRITER = '0.7.2' if jax.__version_info__ >= (0, 12) else '0.12.0.1'
REFUSED = Path(__file__).with_name(f'jax_{WRITER}.stablehlo')


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Weights of each head."""
  root = tmp_path_factory.mktemp('sources')
  more = (NAMES, PALETTE, pretrained.NORMALIZATION, {'source': 'made up'})
  for head in segmentor.HEADS:
    config = TINY | {'dtype': 'float32', 'head': head}
    description = infer.Description('segmentor', config)
    about = pretrained.Weights({}, 'ours', description, *more).about()
    model = description.create()
    network = model, variables_of(model, SEEDS.get(head, 0))
    built.written(root / head, network, 'ours', about)
  return root


@pytest.fixture(scope='module')
def exported(sources, tmp_path_factory):
  """exported(head): a folder of its exports, and what was said of them."""

  @functools.cache
  def export(head):
    # ONNX's libraries read names in UTF-8 alone.
    out = tmp_path_factory.mktemp('exported') / os.fsdecode(b'[x] \xdf') / head
    formats = folder.FORMATS[: 4 if head == 'pspnet' else 2]
    more = {'formats': formats, 'sizes': [SIZE], 'probabilities': head == 'fcn'}
    with pytest.MonkeyPatch.context() as patch:
      # So that the CPU's ways with wide convolutions would show.
      patch.setattr(convolution, 'ENOUGH_PAIRS', 1)
      patch.setattr(convolution, 'ENOUGH_PIXELS', 1)
      return out, folder.export_model(sources / head, out, **more)

  return export


# Labels, and probabilities if there are any, with those of the weights.
def assert_agrees(found, source, images):
  model = rj.from_checkpoint(source, image_scale=images.shape[1:3])
  expected = list(model.predict_frames(images, probabilities=len(found) > 1))
  labels = np.stack([each.labels for each in expected])
  assert found[0].shape == labels.shape
  assert (found[0] == labels).mean() >= 0.999
  for probabilities in found[1:]:
    wanted = [each.probabilities for each in expected]
    np.testing.assert_allclose(probabilities, wanted, atol=1e-4)


def noise(size):
  # Three pictures, which are as good as the four of an export's batch.
  return np.random.default_rng(5).integers(0, 256, (3, *size, 3), np.uint8)


@pytest.mark.parametrize('head', others_long(segmentor.HEADS, 'pspnet'))
def test_head_agrees_with_its_checkpoint(head, exported, sources):
  out, exports = exported(head)
  assert [each.pictures for each in exports] == len(exports) * [20]
  assert all(each.agreement >= 0.999 for each in exports)
  # Not by its own account alone.
  program = (out / 'model_65x64.onnx').read_bytes()
  session, images = onnxruntime.InferenceSession(program), noise(SIZE)
  found = session.run(None, {'images': images})
  assert len(found) == (2 if head == 'fcn' else 1)
  assert found[0].dtype == np.uint8
  assert len(np.unique(found[0])) > 2
  assert_agrees(found, sources / head, images)


def test_onnx_has_folded_what_is_constant(exported):
  model = onnx.load(exported('pspnet')[0] / 'model_65x64.onnx')
  operations = [node.op_type for node in model.graph.node]
  # Normalisations: neither their roots nor, but for the four fc1, which have a
  # bias before it, their gains; two more weigh the splits of each block. That
  # of the bottleneck follows a sum, of the convolutions of map and pyramid.
  assert not {*operations} & {'BatchNormalization', 'Sqrt', 'Reciprocal'}
  assert operations.count('Mul') == 4 + 2 * 4 + 1
  assert operations.count('Conv') == 3 + 2 * 4 + 1  # Stem, splits, head.


# Besides this project.
ABSENT = {'stablehlo': 'flax ml_collections cv2', 'onnx': 'flax jax jaxlib cv2'}


@pytest.mark.parametrize('format_', ABSENT)
def test_card_runs_without_this_project(format_, exported, sources, tmp_path):
  out, _ = exported('pspnet')
  file, picture = (
    out / f'model_65x64.{format_}',
    pictures.gather_pictures([])[3],
  )
  last = "np.save('labels.npy', np.asarray(labels))\n"
  run_card(file, picture, last, tmp_path, ABSENT[format_].split())
  labels = np.load(tmp_path / 'labels.npy')
  resized = Image.open(tmp_path / 'street.jpg').resize(SIZE[::-1])
  assert_agrees([labels], sources / 'pspnet', np.asarray(resized)[None])


def test_weights_come_back_with_the_same_bits(exported, sources):
  out, _ = exported('pspnet')
  given, safe = sources / 'pspnet', out / 'model.safetensors'
  original = files.read_weights(given).state_dict
  assert_same_bits(files.read_weights(safe).state_dict, original)
  weights = pretrained.load_weights(out / 'model.pth')
  assert weights.classes == NAMES
  assert_same_bits(export_state_dict(*weights.create(), 'ours'), original)


def test_description_and_card(exported, sources, root):
  out, exports = exported('pspnet')
  written = {'README.md', 'about.json', *(each.file for each in exports)}
  assert set(os.listdir(out)) == written
  about = json.loads((out / 'about.json').read_text())
  assert about['palette'] == PALETTE
  assert about['protocol'] == {'name': 'whole', 'image_scale': [2048, 512]}
  assert about['provenance']['source'] == 'pspnet'
  assert about['provenance']['from']['source'] == 'made up'
  text = (out / 'README.md').read_text()
  assert '\n# A ResNeSt of (1, 1, 1, 1) blocks with pspnet\n' in text
  assert '| 1 | sky \\| clouds | #1e07c8 |' in text
  assert '123.675' in text
  # No file names a folder of this machine.
  folders = out.parent, sources, root, os.path.dirname(sys.prefix)
  for file in out.iterdir():
    content = file.read_bytes()
    assert [x for x in folders if os.fsencode(x) in content] == []


def test_provenance_is_published_without_folders(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs/own').mkdir(parents=True)
  published = {
    'runs/own': 'own',
    '/home/somebody/runs/own/': 'own',
    '~/runs/own': 'own',
    '.': tmp_path.name,
    r'C:\Users\somebody\own.pth': 'own.pth',
    'of "/home/somebody/own.pth", read': 'of "own.pth", read',
    r'is C:\Users\somebody\own.pth': 'is own.pth',
  }
  # No files of this machine.
  others = ['hf://owner/repository/x.safetensors', 'ade20k_pspnet', '0.x/1.x']
  others += ['see https://host/a/b/c.pth, and/or 1 / 2 /3']
  said, expected = [*published, *others], [*published.values(), *others]
  found = files.public({'classes': said, 'provenance': {'x': [said], 'n': 3}})
  assert found == {'classes': said, 'provenance': {'x': [expected], 'n': 3}}


# How one picture's labels and probabilities compare with those found.
def compare(expected, *found):
  pair = ([each[None] for each in outputs] for outputs in (found, expected))
  return checks.compare_labels('x', [tuple(pair)])


def test_one_in_a_thousand_pixels_may_differ():
  labels = np.arange(10_000).reshape(100, 100) % 7
  found = labels.copy()
  found[0, :10] = 8
  assert compare([labels], found) == 0.999
  found[0, 10] = 8
  refused(r'x gives 99\.890% .* class; 99\.9%', compare, [labels], found)


def test_wrong_probabilities_are_told():
  labels, even = np.zeros((2, 2), np.uint8), np.full((2, 2, 7), 1 / 7)
  for off, said in ((0.02, '0.020'), (np.nan, '1.000')):
    wrong = [labels, even], labels, even + off
    refused(f'differ by up to {said}', compare, *wrong)
  assert compare([labels, even], labels, even + 0.009) == 1


def wrong_program(images):
  return (images[..., 0] * 0 + 7,)


FAILS = (
  ('', {'sizes': [(31, 64)]}, 'each edge must have 32 to 8192'),
  ('', {'sizes': [(64, 8193)]}, 'each edge must have 32 to 8192'),
  ('', {'formats': ['mmseg'], 'probabilities': True}, 'neither is among'),
  ('program', {'sizes': [SIZE]}, r'gives 0\.000% of the pixels of 20'),
  ('jax2onnx', {'formats': ['onnx']}, 'pip install --no-deps jax2onnx=='),
  ('torch', {'formats': ['mmseg']}, 'pip install torch'),
)


@pytest.mark.parametrize(('broken', 'options', 'message'), FAILS)
def test_what_fails_leaves_nothing(
  broken, options, message, sources, monkeypatch, tmp_path
):
  monkeypatch.setitem(sys.modules, broken, None)  # As if not installed.
  if broken == 'program':
    make = mock.Mock(return_value=wrong_program)
    monkeypatch.setattr(folder, 'make_program', make)
  given = sources / 'fcn', tmp_path / 'out'
  refused(message, folder.export_model, *given, **options)
  assert os.listdir(tmp_path) == []


def test_command(call_script, written_run, tmp_path, capsys):
  out, picture = tmp_path / 'out', tmp_path / 'one.png'
  Image.fromarray(pictures.gather_pictures([])[0]).save(picture)
  command = ('export.py', '--weights', written_run, '--out', out)
  more = ('--sizes', '65x64', '--formats', 'safetensors')
  call_script(*command, *more, '--pictures', picture)
  said = capsys.readouterr().out
  assert f'checkpoint {STEP} of {written_run}\n' in said
  assert 'model.safetensors' in said
  assert '100.0000% of the pixels of 1 picture agree' in said
  assert f'written: {out}' in said
  refused('out is there already', call_script, *command)


# Renewing


def rewrite(out, change):
  path = out / 'about.json'
  about = json.loads(path.read_text())
  about['exports'] = list(map(change, about['exports']))
  path.write_text(json.dumps(about))


def contents(out):
  return {path.name: path.read_bytes() for path in out.iterdir()}


# A renewal fails, and changes nothing.
def assert_not_renewed(out, error, told=None):
  before = contents(out)
  with pytest.raises(error, match=told):
    renew_exports(out)
  assert contents(out) == before


@pytest.fixture(scope='module')
def expired(written_run, tmp_path_factory):
  """An older version's export of probabilities, whose programs are refused."""
  out = tmp_path_factory.mktemp('refused') / 'exported'
  sizes = [(33, 32), (32, 40)]
  folder.export_model(written_run, out, sizes=sizes, probabilities=True)
  told = ('file', 'format', 'size', 'agreement', 'pictures')
  rewrite(out, lambda entry: {key: entry[key] for key in told})
  for name in FILES:
    shutil.copy(REFUSED, out / name)
  return out


@pytest.fixture
def old(expired, tmp_path):
  return shutil.copytree(expired, tmp_path / 'exported')


def test_six_months_from_the_release_are_promised(root, monkeypatch):
  days = ('2026-06-17', '2026-12-31', '2027-08-31')
  ends = ['2026-12-17', '2027-06-30', '2028-02-29']
  assert list(map(promise.promised, days)) == ends
  version, released = jax.__version__, promise.RELEASED[jax.__version__]
  until, today = promise.promised(released), date(2026, 11, 29)
  expected = version, '2026-11-29', released, until
  assert promise.written_now(today) == expected
  row = f'| JAX {version} | {released} | {until} |\n'
  assert row in (root / 'docs' / 'export.md').read_text('utf-8')
  # Of another release no date is known.
  monkeypatch.setattr(jax, '__version__', '9.9')
  written = promise.written_now(today)
  assert written == ('9.9', '2026-11-29', None, None)
  assert 'not known here: they end on 2027-05-29 at the' in written.sentence()


SHORTER = (
  ('2027-04-20', '2026-12-17', None),
  ('2026-12-17', '2027-04-20', '2026-12-17, before that of JAX 2: write'),
  ('2026-11-28', '2026-11-28', '2026-11-28: write it by a newer'),
  (None, '2027-04-20', None),
)


@pytest.mark.parametrize(('until', 'other', 'said'), SHORTER)
def test_shorter_promises_are_told(until, other, said):
  new = promise.Written('1', '2026-11-29', None, until)
  old = promise.Written('2', '2026-10-29', None, other)
  found = new.shorter_than(old, '2026-11-29')
  assert f'ends on {said}' in found if said else found == ''


@pytest.mark.parametrize('known', [True, False])
@pytest.mark.parametrize('size', [None, 100])  # Of what is read, in bytes.
def test_refused_file_is_told_with_its_history(known, size, tmp_path):
  file = tmp_path / FILES[0]
  file.write_bytes(REFUSED.read_bytes()[:size])
  told = rf'33x32.stablehlo \(.*\)\. python export.py --renew {tmp_path} writes'
  if known:
    written = promise.Written(WRITER, '2026-11-29', None, None)
    entry = Export(*(file.name, 'stablehlo', (4, 4), 1, 1), written=written)
    about = json.dumps({'exports': [entry.entry()]})
    (tmp_path / 'about.json').write_text(about)
    history = f'about.json has of it: written .* JAX {WRITER}; .* the latest. '
    told = told.replace('python', f'{history}python')
  with pytest.raises(UserError, match=told):
    stablehlo.read_stablehlo(file)(np.zeros((1, 4, 4, 3), np.uint8))


def test_renewed_programs_are_right(old, tmp_path, call_script, capsys):
  (old / 'notes.txt').write_text('mine')
  before, picture = contents(old), tmp_path / 'one.png'
  Image.fromarray(pictures.gather_pictures([])[3]).save(picture)
  call_script('export.py', '--renew', old, '--pictures', picture)
  now, lines = promise.written_now(), capsys.readouterr().out.splitlines()
  assert [line.partition(' ')[0] for line in lines] == [*FILES, 'renewed:']
  assert lines[0].endswith(f'read it until {now.read_until}')

  after = contents(old)
  assert after.keys() == before.keys()
  changed = {name for name in before if after[name] != before[name]}
  assert changed == {*FILES, 'about.json', 'README.md'}
  images = noise((33, 32))
  found = stablehlo.read_stablehlo(old / FILES[0])(images)
  assert len(found) == 2
  assert_agrees(found, old / 'model.safetensors', images)

  expected = json.loads(before['about.json'])
  for entry in expected['exports']:
    entry |= {'pictures': 20, 'drawn': False}
    entry |= {'probabilities': None, 'written': None}
    entry |= {'features': False, 'classes': False, 'canvas': False}
    entry |= {'reduced': None}
    if entry['file'] in FILES:
      entry |= {'pictures': 1, 'probabilities': True, 'written': now._asdict()}
  assert json.loads(after['about.json']) == expected
  text = after['README.md'].decode()
  assert text.count(f'until {now.read_until}, read it') == 2
  for line in (
    *(f'- {name}: written on 2' for name in FILES),
    '`resnest-jax export --renew .` (in a clone',
    f'{FILES[1]} | stablehlo | 32 high, 40 wide | 100.0000% | 1 p',
    'model.safetensors | safetensors | any | 100.0000% | 20 pict',
    'labels, probabilities = program(',
  ):
    assert line in text


@pytest.mark.parametrize('second', [wrong_program, KeyboardInterrupt])
def test_failed_renewal_leaves_all_as_it_was(second, old, monkeypatch):
  effects = [mock.DEFAULT, second]
  make = mock.Mock(wraps=folder.make_program, side_effect=effects)
  monkeypatch.setattr(folder, 'make_program', make)
  assert_not_renewed(old, UserError if second is wrong_program else second)
  assert make.call_count == 2


WRONG = (
  ({'file': '../x.stablehlo'}, r"file is '\.\./x\.stablehlo'; it must be"),
  ({'file': 'a`\n# b'}, 'file is'),
  ({'size': [10**9, 32]}, r'size is \[1000000000, 32\]'),
  ({'size': '33x32'}, 'size is'),
  ({'format': 'pickle'}, "format is 'pickle'"),
  ({'format': 'safetensors'}, 'nothing to renew'),
  ({'agreement': 'all'}, "agreement is 'all'"),
  ({'written': 3}, 'TypeError'),
  ({'written': {'jax': '1\n# x', 'on': '2026-01-01'}}, 'must be a version'),
  ({'written': {'jax': '1', 'on': '2026-13-01'}}, "on is '2026-13-01'; it"),
)


@pytest.mark.parametrize(('wrong', 'told'), WRONG)
def test_what_others_have_written_is_checked(wrong, told, old):
  rewrite(old, lambda entry: entry | wrong)
  assert_not_renewed(old, UserError, told)


LACKING = (
  ('about.json', '{}', 'no folder of exports: .* export.py --out'),
  ('about.json', '[' * 100_000, 'no folder of exports: .* is damaged'),
  ('model.safetensors', '', r' nor model\.pth .* --sizes 33x32 32x40'),
  ('README.md', '', r'model_33x32\.stablehlo gives .* with --prob'),
)


@pytest.mark.parametrize(('file', 'content', 'told'), LACKING)
def test_what_cannot_be_renewed(file, content, told, old):
  (old / file).unlink()
  if content:
    (old / file).write_text(content)
  assert_not_renewed(old, UserError, told)
