"""StableHLO that expires: dates, refused files, and writing it again."""

import json
import runpy
import shutil
import sys
from datetime import date
from pathlib import Path

import jax
import numpy as np
import pytest
from evaluation.runs import write_run
from PIL import Image

import resnest_jax as rj
from resnest_jax.errors import UserError
from resnest_jax.export import folder as export_folder
from resnest_jax.export.folder import export_model
from resnest_jax.export.pictures import gather_pictures
from resnest_jax.export.promise import RELEASED, Written, promised, written_now
from resnest_jax.export.renew import renew_exports
from resnest_jax.export.stablehlo import read_stablehlo

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = [(33, 32), (32, 40)]
FILES = ['model_33x32.stablehlo', 'model_32x40.stablehlo']
# Written by the JAX of its name:
#   images = jax.ShapeDtypeStruct(
#     (*export.symbolic_shape('b'), 4, 4, 3), jnp.uint8
#   )
#   program = jax.jit(lambda x: (jnp.argmax(x, -1).astype(jnp.uint8),))
#   export.export(program, platforms=('cpu', 'cuda', 'tpu'))(images).serialize()
# JAX 0.12 does not read the older one, JAX 0.10 does not run the newer one.
WRITER = '0.7.2' if jax.__version_info__ >= (0, 12) else '0.12.0.1'
REFUSED = Path(__file__).with_name(f'jax_{WRITER}.stablehlo')


def told(entry, **changes):
  """What older versions told of an export in about.json, changed."""
  keys = ('file', 'format', 'size', 'agreement', 'pictures')
  return {key: entry[key] for key in keys} | changes


def rewrite(folder, change):
  """Changes the list of exports in about.json."""
  about = json.loads((folder / 'about.json').read_text())
  about['exports'] = change(about['exports'])
  (folder / 'about.json').write_text(json.dumps(about))
  return about


def contents(folder):
  """Name -> bytes."""
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """An export with probabilities of a tiny network, in two sizes."""
  out = tmp_path_factory.mktemp('renew') / 'exported'
  run = write_run(out.parent / 'run')
  export_model(run, out, sizes=SIZES, probabilities=True, say=lambda line: 0)
  return out


@pytest.fixture
def old(exported, tmp_path):
  """The same as of an older version, with files that are refused."""
  folder = tmp_path / 'exported'
  shutil.copytree(exported, folder)
  rewrite(folder, lambda entries: [told(each) for each in entries])
  for name in FILES:
    shutil.copy(REFUSED, folder / name)
  return folder


@pytest.mark.parametrize(
  ('day', 'end'),
  [
    ('2026-06-17', '2026-12-17'),
    ('2026-10-20', '2027-04-20'),
    ('2026-12-31', '2027-06-30'),
    ('2026-08-31', '2027-02-28'),
    ('2027-08-29', '2028-02-29'),
  ],
)
def test_six_months_later(day, end):
  assert promised(day) == end


def test_release_of_this_jax_is_known():
  written = written_now(date(2026, 11, 29))
  released = RELEASED[jax.__version__]
  assert written == (
    jax.__version__,
    '2026-11-29',
    released,
    promised(released),
  )
  assert f'released on {released}; ' in written.sentence()
  assert f', until {written.read_until}, read it' in written.sentence()
  row = f'| JAX {jax.__version__} | {released} | {promised(released)} |\n'
  assert row in (ROOT / 'docs' / 'export.md').read_text('utf-8')


def test_unknown_release_promises_no_date(monkeypatch):
  monkeypatch.setattr(jax, '__version__', '9.9')
  written = written_now(date(2026, 11, 29))
  assert written == ('9.9', '2026-11-29', None, None)
  assert 'not known here: they end on 2027-05-29 at the' in written.sentence()


@pytest.mark.parametrize(
  ('until', 'other', 'said'),
  [
    ('2027-04-20', None, ''),
    ('2027-04-20', '2026-12-17', ''),
    ('2026-12-17', '2027-04-20', '2026-12-17, before that of JAX 2: write'),
    ('2026-11-28', '2026-11-28', 'ends on 2026-11-28: write it by a newer'),
    (None, '2027-04-20', ''),
  ],
)
def test_shorter_promises_are_told(until, other, said):
  new = Written('1', '2026-11-29', None, until)
  old = other and Written('2', '2026-10-29', None, other)
  found = new.shorter_than(old, '2026-11-29')
  assert said in found
  assert bool(found) == bool(said)


def test_export_tells_how_long_it_is_read(exported):
  entries = json.loads((exported / 'about.json').read_text())['exports']
  released = RELEASED[jax.__version__]
  for entry in entries:
    if entry['format'] == 'safetensors':
      assert entry['written'] is entry['probabilities'] is None
    else:
      assert entry['probabilities'] is True
      assert entry['written'].pop('on') <= date.today().isoformat()
      assert entry['written'] == {
        'jax': jax.__version__,
        'released': released,
        'read_until': promised(released),
      }
  card = (exported / 'README.md').read_text()
  for name in FILES:
    assert f'- {name}: written on 2' in card
  assert card.count(f'until {promised(released)}, read it') == 2
  assert '`resnest-jax export --renew .` (in a clone' in card


def test_refused_file_is_told_with_its_history_and_the_remedy(tmp_path):
  file = tmp_path / FILES[0]
  shutil.copy(REFUSED, file)
  message = rf'^JAX {jax.__version__} does not read .*33x32.stablehlo \(.*\)\. '
  remedy = f'python export.py --renew {tmp_path} writes it again'
  images = np.zeros((1, 4, 4, 3), np.uint8)
  with pytest.raises(UserError, match=f'{message}{remedy}'):
    read_stablehlo(file)(images)
  written = Written(WRITER, '2026-11-29', None, None)
  entry = {'file': file.name, 'format': 'stablehlo', 'size': [4, 4]}
  entry |= {'agreement': 1, 'pictures': 1, 'written': written._asdict()}
  (tmp_path / 'about.json').write_text(json.dumps({'exports': [entry]}))
  history = f'about.json has of it: written .* JAX {WRITER}; .* the latest. '
  with pytest.raises(UserError, match=f'{message}{history}{remedy}'):
    read_stablehlo(file)(images)
  file.write_bytes(REFUSED.read_bytes()[:100])
  with pytest.raises(UserError, match=rf'33x32.stablehlo \(.*{remedy}'):
    read_stablehlo(file)


def test_renewed_folder_gives_what_its_weights_give(
  old, tmp_path, monkeypatch, capsys
):
  (old / 'notes.txt').write_text('mine')
  before, about = contents(old), json.loads((old / 'about.json').read_text())
  picture = tmp_path / 'one.png'
  Image.fromarray(gather_pictures([])[3]).save(picture)
  command = ['export.py', '--renew', str(old), '--pictures', str(picture)]
  monkeypatch.setattr(sys, 'argv', command)
  runpy.run_path(str(ROOT / 'export.py'))['main']()
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition(' ')[0] for line in lines] == [*FILES, 'renewed:']
  assert '100.0000% of the pixels of 1 picture agree' in lines[0]
  assert lines[0].endswith(f'read it until {written_now().read_until}')

  after = contents(old)
  assert after.keys() == before.keys()
  changed = {name for name in before if after[name] != before[name]}
  assert changed == {*FILES, 'about.json', 'README.md'}
  images = np.random.default_rng(5).integers(0, 256, (3, 33, 32, 3), np.uint8)
  model = rj.from_checkpoint(old / 'model.safetensors', image_scale=(33, 32))
  found = read_stablehlo(old / FILES[0])(images)
  for slot, each in enumerate(model.predict_frames(images, probabilities=True)):
    assert (each.labels == found[0][slot]).mean() >= 0.999
    np.testing.assert_allclose(found[1][slot], each.probabilities, atol=1e-4)

  new = json.loads(after['about.json'])
  entries, olds = new.pop('exports'), about.pop('exports')
  assert new == about
  assert [told(each) for each in entries] == [
    told(each, pictures=1 if each['file'] in FILES else 20) for each in olds
  ]
  for entry in entries:
    is_new = entry['file'] in FILES
    assert entry['probabilities'] is (True if is_new else None)
    assert entry['written'] == (written_now()._asdict() if is_new else None)
  card = after['README.md'].decode()
  assert (
    f'{FILES[1]} | stablehlo | 32 high, 40 wide | 100.0000% | 1 pict' in card
  )
  assert 'model.safetensors | safetensors | any | 100.0000% | 20 pict' in card
  assert f' by JAX {jax.__version__}, released on ' in card
  assert 'labels, probabilities = program(' in card


@pytest.mark.parametrize('error', [UserError, KeyboardInterrupt])
def test_failed_renewal_leaves_all_as_it_was(error, old, monkeypatch):
  before, make, calls = contents(old), export_folder.make_program, []

  def fails_at_the_second(*arguments, **more):
    calls.append(arguments)
    if len(calls) < 2:
      return make(*arguments, **more)
    if error is KeyboardInterrupt:
      raise error
    return lambda images: (images[..., 0] * 0 + 7,)

  monkeypatch.setattr(export_folder, 'make_program', fails_at_the_second)
  with pytest.raises(error):
    renew_exports(old, say=lambda line: None)
  assert len(calls) == 2
  assert contents(old) == before


def no_stablehlo(entries):
  return [each for each in entries if each['format'] != 'stablehlo']


@pytest.mark.parametrize(
  ('break_it', 'message'),
  [
    (shutil.rmtree, 'is no folder of exports: its about.json is missing'),
    (
      lambda folder: (folder / 'about.json').write_text('{}'),
      "is no folder of exports: .*KeyError: 'exports'.* that export.py --out",
    ),
    (
      lambda folder: rewrite(folder, no_stablehlo),
      'nothing to renew in .* it has no StableHLO',
    ),
    (
      lambda folder: (folder / 'model.safetensors').unlink(),
      'neither model.safetensors nor model.pth .* --sizes 33x32 32x40',
    ),
    (
      lambda folder: (folder / 'README.md').unlink(),
      'whether model_33x32.stablehlo gives probabilities.* --sizes 33x32, with',
    ),
  ],
)
def test_what_cannot_be_renewed(break_it, message, old):
  break_it(old)
  before = contents(old) if old.exists() else None
  with pytest.raises(UserError, match=message):
    renew_exports(old)
  assert before == (contents(old) if old.exists() else None)
