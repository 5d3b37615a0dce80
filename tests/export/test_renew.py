"""StableHLO that expires: dates, refused files, and writing it again."""

import json
import shutil
from datetime import date
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import resnest_jax as rj
from resnest_jax.errors import UserError
from resnest_jax.export import folder as export_folder
from resnest_jax.export.card import Export
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


# Told of an export in about.json by older versions.
TOLD = ('file', 'format', 'size', 'agreement', 'pictures')


def rewrite(folder, change):
  """Changes the list of exports in about.json."""
  about = json.loads((folder / 'about.json').read_text())
  about['exports'] = change(about['exports'])
  (folder / 'about.json').write_text(json.dumps(about))


def spoil(folder, **wrong):
  """Changes all exports in about.json."""
  rewrite(folder, lambda entries: [entry | wrong for entry in entries])


def contents(folder):
  """Name -> bytes."""
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def exported(written_run, tmp_path_factory):
  """An export with probabilities of a tiny network, in two sizes."""
  out = tmp_path_factory.mktemp('renew') / 'exported'
  export_model(written_run, out, sizes=SIZES, probabilities=True)
  return out


@pytest.fixture
def old(exported, tmp_path):
  """The same as of an older version, with files that are refused."""
  folder = tmp_path / 'exported'
  shutil.copytree(exported, folder)
  rewrite(folder, lambda entries: [{k: x[k] for k in TOLD} for x in entries])
  for name in FILES:
    shutil.copy(REFUSED, folder / name)
  return folder


@pytest.mark.parametrize(
  ('day', 'end'),
  [
    ('2026-06-17', '2026-12-17'),
    ('2026-12-31', '2027-06-30'),
    ('2027-08-31', '2028-02-29'),
  ],
)
def test_six_months_later(day, end):
  assert promised(day) == end


def test_release_of_this_jax_is_known():
  written = written_now(date(2026, 11, 29))
  version, released = jax.__version__, RELEASED[jax.__version__]
  assert written == (version, '2026-11-29', released, promised(released))
  row = f'| JAX {version} | {released} | {promised(released)} |\n'
  assert row in (ROOT / 'docs' / 'export.md').read_text('utf-8')


def test_unknown_release_promises_no_date(monkeypatch):
  monkeypatch.setattr(jax, '__version__', '9.9')
  written = written_now(date(2026, 11, 29))
  assert written == ('9.9', '2026-11-29', None, None)
  assert 'not known here: they end on 2027-05-29 at the' in written.sentence()


@pytest.mark.parametrize(
  ('until', 'other', 'said'),
  [
    ('2027-04-20', '2026-12-17', ''),
    ('2026-12-17', '2027-04-20', '2026-12-17, before that of JAX 2: write'),
    ('2026-11-28', '2026-11-28', 'ends on 2026-11-28: write it by a newer'),
    (None, '2027-04-20', ''),
  ],
)
def test_shorter_promises_are_told(until, other, said):
  new = Written('1', '2026-11-29', None, until)
  old = Written('2', '2026-10-29', None, other)
  found = new.shorter_than(old, '2026-11-29')
  assert said in found
  assert bool(found) == bool(said)


def test_refused_file_is_told_with_its_history_and_the_remedy(tmp_path):
  file = tmp_path / FILES[0]
  shutil.copy(REFUSED, file)
  remedy = f'python export.py --renew {tmp_path} writes it again'

  def refused(history=''):
    message = rf'33x32.stablehlo \(.*\)\. {history}{remedy}'
    with pytest.raises(UserError, match=message):
      read_stablehlo(file)(np.zeros((1, 4, 4, 3), np.uint8))

  refused()
  written = Written(WRITER, '2026-11-29', None, None)
  entry = Export(*(file.name, 'stablehlo', (4, 4), 1, 1), written=written)
  about = {'exports': [entry.entry()]}
  (tmp_path / 'about.json').write_text(json.dumps(about))
  refused(f'about.json has of it: written .* JAX {WRITER}; .* the latest. ')
  file.write_bytes(REFUSED.read_bytes()[:100])
  refused('about.*')


def test_renewed_folder_gives_what_its_weights_give(
  old, tmp_path, call_script, capsys
):
  (old / 'notes.txt').write_text('mine')
  before, about = contents(old), json.loads((old / 'about.json').read_text())
  picture = tmp_path / 'one.png'
  Image.fromarray(gather_pictures([])[3]).save(picture)
  call_script('export.py', '--renew', old, '--pictures', picture)
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition(' ')[0] for line in lines] == [*FILES, 'renewed:']
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

  for entry in about['exports']:
    is_new = entry['file'] in FILES
    entry |= {'pictures': 1 if is_new else 20, 'drawn': False}
    entry['probabilities'] = True if is_new else None
    entry['written'] = written_now()._asdict() if is_new else None
  assert json.loads(after['about.json']) == about
  card = after['README.md'].decode()
  for name in FILES:
    assert f'- {name}: written on 2' in card
  assert card.count(f'until {written_now().read_until}, read it') == 2
  assert '`resnest-jax export --renew .` (in a clone' in card
  assert f'{FILES[1]} | stablehlo | 32 high, 40 wide | 100.0000% | 1 p' in card
  assert 'model.safetensors | safetensors | any | 100.0000% | 20 pict' in card
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
    renew_exports(old)
  assert len(calls) == 2
  assert contents(old) == before


@pytest.mark.parametrize(
  ('break_it', 'message'),
  [
    (
      lambda folder: (folder / 'about.json').write_text('{}'),
      r'no folder of exports: .* export\.py --out',
    ),
    (
      lambda folder: rewrite(folder, lambda entries: entries[1:2]),
      'nothing to renew',
    ),
    *(
      (lambda folder, wrong=wrong: spoil(folder, **wrong), said)
      for wrong, said in (
        (
          {'file': '../x.stablehlo'},
          r'file is \'\.\./x\.stablehlo\'; it must be',
        ),
        ({'file': 'a`\n# b'}, 'file is'),
        ({'size': [10**9, 32]}, r'size is \[1000000000, 32\]'),
        ({'size': '33x32'}, 'size is'),
        ({'format': 'pickle'}, "format is 'pickle'"),
        ({'agreement': 'all'}, "agreement is 'all'"),
        ({'written': 3}, 'TypeError'),
        (
          {'written': {'jax': '1\n# x', 'on': '2026-01-01'}},
          r'jax is .* must be a version',
        ),
        (
          {'written': {'jax': '1', 'on': '2026-13-01'}},
          "on is '2026-13-01'; it must be a date",
        ),
      )
    ),
    (
      lambda folder: (folder / 'about.json').write_text('[' * 100_000),
      r'no folder of exports: .* is damaged',
    ),
    (
      lambda folder: (folder / 'model.safetensors').unlink(),
      r'neither .* nor model\.pth .* --sizes 33x32 32x40',
    ),
    (
      lambda folder: (folder / 'README.md').unlink(),
      r'whether model_33x32\.stablehlo gives prob.* --sizes 33x32, with',
    ),
  ],
)
def test_what_cannot_be_renewed(break_it, message, old):
  break_it(old)
  before = contents(old)
  with pytest.raises(UserError, match=message):
    renew_exports(old)
  assert before == contents(old)
