"""Names of files, folders and classes are data: all commands take any."""

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from data.small_archives import decode, encode
from evaluation.drawn import write_video
from small import small_flags

from resnest_jax import runtime
from resnest_jax.errors import UserError

# Bytes that are no text, a pattern, a line break, a number to be filled in, an
# address, a percent code, HTML, all 255 bytes.
STEMS = [b'stra\xdfe', b'\xb1\xb3\xbe\xb0', b'[a-z] {b}*', b'two\nlines\\']
STEMS += [b'%03d', b'file:a', b'%41 #?', b'<i>&lt;', '\u8857'.encode() * 83]
STEMS = [os.fsdecode(x) for x in STEMS]
# Two forms of one accent: of pairs they are the same name.
ACCENTS = ['e\u0301', '\u00e9']
ODD, WORKDIR = os.fsdecode(b'[in] $x$ \xdf'), os.fsdecode(b'[run] \\ \xe4:')


def write_pictures(folder, ending='.png', seed=0, more=()):
  """One of each name, 48x64; masks, in a folder of that name, of 3 classes."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(seed)
  for name in (*STEMS, *more):
    x = rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    picture = x[..., 0] % 3 if 'masks' in folder.parts else x
    (folder / f'{name}{ending}').write_bytes(encode(picture, ending))
  return folder


def test_predicts_files_of_any_name(written_run, call_script, tmp_path):
  workdir = shutil.copytree(written_run, tmp_path / WORKDIR)
  out, clips = (tmp_path / os.fsdecode(x) for x in (b'\xfc*', b'c\xdf'))
  pictures = write_pictures(tmp_path / ODD, more=ACCENTS)
  clips.mkdir()
  plain = write_video(tmp_path / 'plain.avi', 4, 12.5, size=(64, 48))
  for name in (STEMS[0], *STEMS[2:7]):
    shutil.copy(plain, clips / f'{name} clip.avi')
  flags = ('--weights', workdir, '--out', out, '--legend')
  # A name of the longest kind leaves no room for `_color`.
  with pytest.raises(UserError, match=r'1 of 17 .*\n.*File name too long'):
    call_script('predict.py', *flags, pictures, clips)
  record = json.loads((out / 'predictions.json').read_text())
  (failed,) = record['failed']
  assert failed['source'].endswith(f'{STEMS[-1]}.png')
  assert len(record['predictions']) == 10 + 6
  for entry in record['predictions']:
    assert os.path.isfile(entry['source'])
    colours = (out / entry['colors']).read_bytes()
    if 'frames' in entry:
      assert (entry['frames'], colours[4:8]) == (4, b'ftyp')
    else:
      assert decode(colours).shape == (48, 64, 3)


@pytest.mark.long
def test_a_run_with_such_names_everywhere(run_script, tmp_path):
  data, workdir = tmp_path / ODD, tmp_path / WORKDIR
  for seed, split in enumerate(('train', 'val')):
    write_pictures(data / 'images' / split, '.jpg', seed)
    write_pictures(data / 'masks' / split, seed=seed)
  classes = ['[void]', 'road [/red]', '\u80cc\u666f <b>']
  (data / 'classes.txt').write_text('\n'.join(classes), 'utf-8')
  steps = 'train.total_steps', 'train.eval_steps', 'train.checkpoint_steps'
  values = dict.fromkeys(steps, 1) | {'data.data_dir': data}
  values |= {'eval.overlays': 20, 'eval.report_images': 20}
  flags = ('--config', 'configs/folder.py:mini', *small_flags(values))

  def run(*command):
    ascii_only = {'PYTHONIOENCODING': 'ascii'}
    return run_script(*command, environment=ascii_only).stdout

  words = (*flags[:2], f'--config.data.data_dir={data}', '--out', data / 'out')
  told = run('-m', 'resnest_jax.data.doctor', *words)
  assert 'of val: nothing wrong' in told
  assert all(ascii(name)[1:-1] in told for name in classes)
  assert 'done: best mIoU' in run('train.py', *flags, '--workdir', workdir)
  told = run('eval.py', *flags, '--workdir', workdir)
  assert all(ascii(name)[1:-1] in told for name in classes)
  (out,) = (workdir / 'eval').iterdir()
  assert {x.stem for x in (out / 'overlays').iterdir()} == {*STEMS}
  page = (out / 'report.html').read_text('utf-8')
  assert re.search(r'stra\\udcdfe.*&lt;i&gt;&amp;lt;', page, re.S)
  told = run('export.py', '--weights', workdir, '--out', data / 'ex')
  assert 'agree with the checkpoint' in told


CACHED = {b'[c] \\ *': True, b'stra\xdfe': False, b'/dev/null/x': True}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(('name', 'cached'), CACHED.items())
def test_programs_are_cached_where_xla_can(
  tmp_path, monkeypatch, capsys, name, cached
):
  before = jax.config.jax_compilation_cache_dir
  folder = tmp_path / os.fsdecode(name)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(folder))
  try:
    assert runtime.enable_compile_cache() == folder
    assert jax.jit(lambda x: x * 3 + len(name))(2) == 6 + len(name)
    used = jax.config.jax_compilation_cache_dir
    assert used == (str(folder) if cached else None)
    noted = f'{folder} cannot be written, so' in capsys.readouterr().err
    assert noted == (not folder.is_dir())
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
