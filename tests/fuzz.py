"""Gives the commands damaged and odd inputs and looks how they end.

    python tests/fuzz.py --inputs 2000
    python tests/fuzz.py --only png --first 17 --inputs 1

Each input has to be used, or refused in short lines, within a minute and 2 GB.
Else it is printed and kept, and the status is 1.
"""

import argparse
import collections
import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from concurrent import futures
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import tifffile
import torch
from conftest import ROOT  # Which also sets the tests' variables.
from data import annotated
from data.small_archives import ade20k_sample, write_cityscapes, write_zip
from evaluation.drawn import write_video
from evaluation.runs import write_run
from kills import make_data
from mutations import NAMES, ODD, damage, edit_tensors, edit_text
from PIL import Image

from resnest_jax import config as configs
from resnest_jax.config import load_config
from resnest_jax.data import datasets, sampling
from resnest_jax.errors import UserError, explain
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.prediction import files
from resnest_jax.weights.pretrained import load_weights

SECONDS, GIGABYTES, LINE = 60, 2, 2000
CONFIG = str(ROOT / 'configs/folder.py:mini')
CONVERT = 'resnest_jax.weights.convert'
PREPARE = 'resnest_jax.data.prepare'
CLASSES = {
  'a.txt': 'sky 0 0 255\nwall 255 0 0\nroad 0 255 0\nignore: 255\n',
  'b.txt': '0: sky 0 0 255\n1, 3: wall\n2: road\n',
  'c.txt': '# label:color_rgb:parts:actions\nsky:0,0,255::\nwall:1,0,0::\n',
  'a.csv': 'name,r,g,b\nsky,0,0,255\nwall,255,0,0\nroad,0,255,0\n',
  'a.json': '{"classes": ["sky", "wall", "road"], "values": [0, 1, 2], '
  '"palette": [[0, 0, 255], [255, 0, 0], [0, 255, 0]], "ignore": [255]}',
  'b.json': '{"id2label": {"0": "sky", "1": "wall", "2": "road"}}',
}
# Values that keys of this type often accept.
LIKELY = {
  int: (0, 1, 2, 7, 500, 10**6),
  float: (0.0, 0.01, 0.5, 1.0, 300.0),
  bool: (True, False),
  tuple: ((1, 1), (8, 8), (500, 3), (0.5, 2.0), (0.0,), (4, 4, 4)),
}


def make_inputs(folder):
  """Writes what copies are damaged of."""
  make_data(folder / 'data')
  write_run(folder / 'run')
  call(CONVERT, folder / 'run', '--out', folder / 'ours')
  call(CONVERT, folder / 'run', '--out', folder / 'mmseg', '--to', 'mmseg')
  theirs = torch.load(folder / 'mmseg/model.pth')
  del theirs['resnest_jax']
  for name, new in (('new.pth', True), ('old.pth', False)):
    torch.save(theirs, folder / name, _use_new_zipfile_serialization=new)
  shutil.copy(folder / 'ours/model.safetensors', folder / 'x.safetensors')
  np.savez(folder / 'x.npz', x=np.zeros(9))
  rgb = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
  rgb[:24] //= 32
  pictures = list(map(Image.fromarray(rgb).convert, ('RGB', 'P', 'L', 'CMYK')))
  pictures.append(Image.fromarray(rgb[..., 0].astype(np.uint16) * 200))
  for ending in ('png', 'jpg', 'tif', 'webp', 'bmp', 'gif', 'ppm', 'jp2'):
    for i, x in enumerate(pictures):
      # Not all formats have all kinds.
      with contextlib.suppress(OSError, ValueError):
        x.save(folder / f'{i}.{ending}')
  write_video(folder / '0.avi', 3, 5, size=(48, 48))
  jpeg = (folder / '0.jpg').read_bytes()
  mask = (folder / 'data/masks/val/0.png').read_bytes()
  entries = ade20k_sample(jpeg=jpeg, png=mask)
  entries |= ade20k_sample('ADE_val', 'validation', jpeg, mask)
  about = '{"images": {"train": 1, "validation": 1}}'
  write_zip(folder / 'ade.zip', entries, about)
  (folder / 'cities').mkdir()
  write_cityscapes(folder / 'cities')
  write_zip(folder / 'submission.zip', {'ADE_test_00000001.png': mask})
  with warnings.catch_warnings():
    # The decoder of pycocotools, which Datumaro calls.
    warnings.filterwarnings('ignore', '__array__ implementation')
    for form, write in annotated.WRITERS.items():
      write(folder / 'exports' / form)
  annotated.labelme(folder / 'exports' / 'labelme')
  make_bands(folder / 'data', folder / 'bands')


def make_bands(data, folder):
  """The same data with images of four bands in files of several kinds."""
  shutil.copytree(data, folder)
  levels = np.random.default_rng(0).integers(0, 4000, (48, 48, 4), np.uint16)
  for i, path in enumerate(sorted((folder / 'images').rglob('*.png'))):
    path.unlink()
    if i % 3 == 2:
      np.save(path.with_suffix('.npy'), levels)
      continue
    options = {'photometric': 'minisblack', 'planarconfig': 'contig'}
    options['compression'] = (None, 'deflate')[i % 3]
    tifffile.imwrite(path.with_suffix('.tif'), levels, **options)


# --- Kinds: each damages a copy in the present folder and runs a command ------


def copy(source):
  one = shutil.copytree if source.is_dir() else shutil.copy
  return Path(one(source, source.name))


def spoil(rng, path, text=''):
  content = text.encode() or Path(path).read_bytes()
  Path(path).write_bytes(damage(rng, content))


def call(module, *words):
  sys.argv = [module, *map(str, words)]
  importlib.import_module(module).main()


def doctor(data, *words, config=CONFIG):
  words = '--config', config, f'--config.data.data_dir={data}', *words
  call('resnest_jax.data.doctor.__main__', *words)


def predict(source, *words):
  call('predict', '--weights', source / 'ours', '--out', 'out', *words)


def config(rng, source):
  """Values of keys, as flags or in a file, and the network made of them."""
  known = configs.flatten(load_config(CONFIG))
  values = {}
  for key in rng.sample(sorted(known), rng.choice([1, 1, 2, 3])):
    fits = LIKELY.get(type(known[key]), ODD)
    values[key] = rng.choice(fits if rng.random() < 0.8 else ODD)
  if rng.random() < 0.5:
    words = [f'--config.{key}={value}' for key, value in values.items()]
    words[0] = rng.choice([words[0], edit_text(rng, words[0])])
    doctor(source / 'data', *words)
  else:
    lines = [f'  config.{key} = {value!r}\n' for key, value in values.items()]
    before, after = (ROOT / 'configs/folder.py').read_text().split('  return')
    Path('own.py').write_text(f'{before}{"".join(lines)}  return{after}')
    doctor(source / 'data', config=rng.choice(['own.py', 'own.py:mini']))
  create_segmentor(load_config(CONFIG, {'model.num_classes': 3} | values).model)


def run_folder(rng, source):
  """What the commands wrote themselves."""
  place = {'data.data_dir': str(source / 'data')}
  own = load_config(CONFIG, place | {'data.sampling': 'repeat_factor'})
  match rng.randrange(5):
    case 0:
      spoil(rng, 'config.json', configs.config_to_json(own))
      configs.load_run_config(Path(), place)
    case 1:
      split = datasets.open_data(own.data, 'train')
      sampling.open_sampler(own.data, split, 0, Path('counts.npy'))
      spoil(rng, 'counts.npy')
      sampling.open_sampler(own.data, split, 0, Path('counts.npy'))
    case 2:
      spoil(rng, 'doctor.json', '{"writer": "resnest_jax.data.doctor"}')
      doctor(source / 'data', '--samples=1', '--out=.')
    case _:
      files = sorted(x for x in copy(source / 'run').rglob('*') if x.is_file())
      about = [x for x in files if x.parts[-2:] == ('about', 'metadata')]
      spoil(rng, rng.choice(rng.choice([files, about])))
      load_weights(Path('run')).create()


def weights(names, rng, source):
  path = copy(source / rng.choice(names))
  if path.suffix == '.pth' and rng.random() < 0.4:
    torch.save(edit_tensors(rng, torch.load(path)), path)
  else:
    spoil(rng, path)
  words = rng.choice([[], ['--to', 'mmseg'], ['--drop', rng.choice(NAMES)]])
  match rng.randrange(3):
    case 0:
      load_weights(path).create()
    case 1:
      files.from_checkpoint(path)
    case 2:
      call(CONVERT, path, '--out', 'out', *words)


# The data sets' releases, and what goes to their test servers.
ARCHIVES = {
  'ade.zip': (PREPARE, 'ade20k_mini', '--data_dir=data', '--archive'),
  'cities': (PREPARE, 'cityscapes_mini', '--data_dir=data', '--archive_dir'),
  'submission.zip': ('resnest_jax.evaluation.submission.__main__', 'validate'),
}


def archive(rng, source):
  name = rng.choice(list(ARCHIVES))
  path = copy(source / name)
  spoil(rng, path if path.is_file() else rng.choice(sorted(path.iterdir())))
  call(*ARCHIVES[name], path)


def picture(endings, rng, source):
  """Pictures and videos, for the doctor and predict.py."""
  pictures = sorted(source.glob(f'*.{rng.choice(endings)}'))
  old, new = copy(source / 'data') / 'images/val/0.png', rng.choice(pictures)
  old.unlink()
  path = Path(shutil.copy(new, old.with_suffix(new.suffix)))
  spoil(rng, path)
  if rng.random() < 0.5:
    doctor('data')
  else:
    predict(source, path, *rng.choice([[], ['--legend']]))


def masks(names, rng, source):
  """Masks, or lists of classes, for the doctor and `own`."""
  data, name = copy(source / 'data'), rng.choice(names)
  path, text = data / 'masks/val/0.png', ''
  if name in CLASSES:
    path, text = data / name, CLASSES[name]
  elif rng.random() < 0.5:
    shutil.copy(rng.choice(sorted(source.glob('*.png'))), path)
  spoil(rng, path, text)
  if rng.random() < 0.6:
    doctor('data', f'--config.data.folder.classes={name}')
  else:
    form = rng.choice(['mask_colours', 'mask_values'])
    words = '--format', form, '--classes', data / name, '--data_dir', 'out'
    call(PREPARE, 'own', data / 'masks', *words)


def exports(rng, source):
  """What annotation tools write, without their photographs."""
  folder = copy(rng.choice(sorted((source / 'exports').iterdir())))
  files = [x for x in sorted(folder.rglob('*')) if x.is_file()]
  texts = [x for x in files if x.suffix != '.jpg']
  spoil(rng, rng.choice(texts if rng.random() < 0.9 else files))
  words = rng.choice([[], ['--skip'], ['--unlabelled', 'background']])
  call(PREPARE, 'own', folder, '--data_dir', 'out', *words)


def bands(rng, source):
  images = copy(source / 'bands') / 'images'
  spoil(rng, rng.choice([x for x in sorted(images.rglob('*')) if x.is_file()]))
  doctor('bands', '--config.data.bands=red,green,blue,nir')


def lists(rng, source):
  data = copy(source / 'data')
  line = rng.choice(['images/{0}/{1}.png masks/{0}/{1}.png\n', '{1}\n'])
  for path in (data / 'train.txt', data / 'val.txt'):
    path.write_text(''.join(line.format(path.stem, i) for i in range(6)))
  spoil(rng, path)
  doctor('data', '--config.data.folder.lists={split}.txt')


def names(rng, source):
  for path in rng.sample(sorted(copy(source / 'data').rglob('*')), 3):
    new = rng.choice([edit_text(rng, path.name), rng.choice(NAMES)])
    with contextlib.suppress(OSError, ValueError):
      path.rename(path.with_name(new))
  if rng.random() < 0.5:
    doctor('data')
  else:
    predict(source, 'data', '--recursive')


def flags(rng, source):
  Path('x.png').touch()  # The network is not compiled for all these.
  words, known = ['x.png'], ['batch_size', 'max_pixels', 'opacity', 'protocol']
  known += ['image_scale', 'slide_crop', 'slide_stride', 'scales', 'save']
  for flag in rng.sample(known, rng.randint(1, 3)):
    odd = [*map(str, ODD), *['1', '2', '7', '64', '0.5', '-1', '999999'] * 20]
    number = 1 + flag.startswith(('image', 'slide'))
    words += [f'--{flag}', *(rng.choice(odd) for _ in range(number))]
    if flag.startswith(('slide', 'scales')):
      words += ['--protocol', 'slide' if flag[1] == 'l' else 'ms_flip_0x']
  predict(source, *words)


KINDS = {
  **{'config': config, 'run': run_folder, 'flags': flags, 'names': names},
  **{'classes': partial(masks, list(CLASSES)), 'archive': archive},
  **{'mask': partial(masks, ['classes.txt']), 'list': lists},
  **{'exports': exports, 'bands': bands},
  'safetensors': partial(weights, ['x.safetensors']),
  'pth': partial(weights, ['new.pth', 'new.pth', 'old.pth', 'x.npz']),
  **{x: partial(picture, [x]) for x in ('png', 'jpg', 'tif')},
  'picture': partial(picture, ['webp', 'bmp', 'gif', 'ppm', 'jp2', 'avi']),
}


# --- Workers -----------------------------------------------------------------


def set_up(folder: Path) -> None:
  sys.path.insert(0, str(ROOT))
  os.environ['RESNEST_JAX_OFFLINE'] = '1'
  tempfile.tempdir = str(folder)
  for stream in (1, 2):
    os.dup2(os.open(folder / 'output.txt', os.O_WRONLY | os.O_CREAT), stream)
  faulthandler.enable()
  make_inputs(folder)
  load, known = files.from_checkpoint, {}

  def load_once(source, **options):
    if not Path(source).is_absolute():  # A damaged copy.
      return load(source, **options)
    key = f'{source} {options}'
    known[key] = known.get(key) or load(source, **options)
    return known[key]

  files.from_checkpoint = load_once  # Compiled once as well.
  most = psutil.Process().memory_info().vms + 3 * GIGABYTES * 2**30
  resource.setrlimit(resource.RLIMIT_AS, (int(most), resource.RLIM_INFINITY))


def most_memory() -> int:
  status = Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+)', status)[1])  # kB


def attempt(kind: str, name: str, source: Path, place: Path) -> tuple[str, str]:
  """Runs an input: 'used', 'refused' or 'failed', and why."""
  in_threads = []
  threading.excepthook = lambda x: in_threads.append(x.exc_value)
  place.mkdir()
  os.chdir(place)
  Path('/proc/self/clear_refs').write_text('5')  # The peak begins anew.
  before = most_memory()
  ended, why = 'used', ''
  try:
    KINDS[kind](random.Random(name), source)
  except (UserError, SystemExit) as error:
    ended, why = 'refused', str(error)
  except Exception as error:
    ended, why = 'refused', explain(error)
    if 'fault of resnest-jax' in why or isinstance(error, MemoryError):
      ended, why = 'failed', traceback.format_exc()
  grown = most_memory() - before
  if grown > GIGABYTES * 2**20 or in_threads:
    ended, why = 'failed', f'{grown >> 10} MB more; {in_threads}; {why}'
  if any(len(line) > LINE for line in why.splitlines()):
    ended = 'failed'
  os.chdir(source)
  if ended != 'failed':
    shutil.rmtree(place)
  return ended, why


def fuzz(jobs, end, folder, rows):
  """Runs inputs, (kind, name) each, in a worker until it crashes or hangs."""
  pool = None
  for kind, name in jobs:
    if time.monotonic() > end:
      break
    if pool is None:
      source = Path(tempfile.mkdtemp(dir=folder))
      spawn = multiprocessing.get_context('spawn')
      pool = futures.ProcessPoolExecutor(1, spawn, set_up, [source])
      process = psutil.Process(pool.submit(os.getpid).result(10 * SECONDS))
    start, place = time.monotonic(), folder / name.replace('/', '-')
    job = pool.submit(attempt, kind, name, source, place)
    try:
      ended, why = job.result(SECONDS)
    except (futures.BrokenExecutor, TimeoutError) as error:
      with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
      said = (source / 'output.txt').read_text(errors='replace')
      pool, ended, why = None, 'failed', f'{said} {error!r}'
    rows[kind][ended] += 1
    rows[kind]['slowest'] = max(rows[kind]['slowest'], time.monotonic() - start)
    if ended == 'failed':
      print(f'{name}: {why[-1500:]}\n  see {place}', flush=True)
  if pool:
    pool.shutdown()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--inputs', type=int, default=2000, help='of all kinds together')
  add('--seconds', type=float, default=3600, help='after which none begins')
  add('--seed', type=int, default=0)
  add('--first', type=int, default=0, help='number of the first of each kind')
  add('--only', nargs='+', choices=KINDS, default=list(KINDS))
  add('--processes', type=int, default=2)
  flags = parser.parse_args()
  folder = Path(tempfile.mkdtemp(prefix='fuzz-'))
  numbers = range(flags.first, flags.first + flags.inputs)
  jobs = [(x, f'{flags.seed}/{x}/{i}') for i in numbers for x in flags.only]
  rows = {kind: collections.Counter() for kind in flags.only}
  end, number = time.monotonic() + flags.seconds, flags.processes
  shares = [jobs[i : flags.inputs : number] for i in range(number)]
  with futures.ThreadPoolExecutor(number) as threads:
    list(threads.map(lambda share: fuzz(share, end, folder, rows), shares))
  ends = 'used', 'refused', 'failed'
  print(f'{"kind":<12}', *(f'{x:>8}' for x in (*ends, 'slowest')))
  for kind, row in rows.items():
    counts = [f'{row[x]:>8}' for x in ends]
    print(f'{kind:<12}', *counts, f'{row["slowest"]:>6.1f} s')
  failed = sum(row['failed'] for row in rows.values())
  total = sum(row[x] for row in rows.values() for x in ends)
  print(f'{total} inputs, {failed} failures')
  if failed:
    sys.exit(f'failures are kept in {folder}')
  shutil.rmtree(folder)


if __name__ == '__main__':
  main()
