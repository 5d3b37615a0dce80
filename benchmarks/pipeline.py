"""Times the training pipeline: reading, augmenting and batching samples.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --peer /path/to/python

Images are made here: 1/f noise compresses like photographs do. They are
prepared as the data sets are: ADE20K's JPEG of 683 x 512, Cityscapes' PNG of
2048 x 1024, and these stored decoded. `--peer` names a Python that has
mmsegmentation; its training transforms then read the same files in a process
of their own. All take turns, round by round, and medians are compared.
`--out DIR` keeps the figures as JSON.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import rich.console
import rich.table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flags import add_out, natural, positive
from benchmarks.peer import open_peer
from benchmarks.report import count_cores, describe_machine, write_result
from resnest_jax.config import load_config
from resnest_jax.data import cityscapes, transforms
from resnest_jax.data.datasets import DATASETS, PreparedSplit
from resnest_jax.data.mini import ade20k_mini, cityscapes_mini
from resnest_jax.data.pipeline import (
  make_augment,
  make_train_iterator,
  sample_key,
  sample_rng,
)
from resnest_jax.data.prepare import prepare, prepare_raw
from resnest_jax.data.sampling import Shuffled
from resnest_jax.errors import run
from resnest_jax.labels import CITYSCAPES

SEED = 0
DATA = ('ade20k', 'cityscapes', 'cityscapes_raw')
SIZES = {'ade20k': (512, 683), 'cityscapes': (1024, 2048)}


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """float32 (height, width) of mean 0 and deviation 1, spectrum 1/f."""
  rows = np.fft.fftfreq(height)[:, None] * height
  columns = np.fft.rfftfreq(width)[None] * width
  frequency = np.hypot(rows, columns)
  frequency[0, 0] = np.inf
  white = np.fft.rfft2(rng.standard_normal((height, width)))
  field = np.fft.irfft2(white / frequency, (height, width))
  return (field / field.std()).astype(np.float32)


def make_sample(
  seed: int, height: int, width: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
  """Image uint8 (H, W, 3), and a map of about a dozen classes from 0 on."""
  rng = np.random.default_rng([SEED, seed])
  grey = noise(rng, height, width)
  image = np.stack(
    [grey + 0.3 * noise(rng, height, width) for _ in range(3)], 2
  )
  regions = np.digitize(noise(rng, height, width), np.linspace(-2, 2, 12))
  names = rng.permutation(classes)[: regions.max() + 1]
  image = (128 + 45 * image).clip(0, 255).astype(np.uint8)
  return image, names[regions].astype(np.uint8)


def write_ade20k(folder: Path, count: int) -> Path:
  """Files for the peer below `folder`, and the zip file of a mini ADE20K."""
  path = folder / 'ADEChallengeData2016.zip'
  counts = {'train': count, 'validation': 1}
  with zipfile.ZipFile(path, 'w') as archive:
    archive.comment = ade20k_mini.archive_comment(counts, SEED).encode()
    lines = ''
    for split, stem, seeds in (
      ('training', 'ADE_train', range(count)),
      ('validation', 'ADE_val', (count,)),
    ):
      for i, seed in enumerate(seeds, 1):
        image, label = make_sample(seed, *SIZES['ade20k'], 150)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
        jpeg = cv2.imencode('.jpg', image, quality)[1].tobytes()
        png = cv2.imencode('.png', label + 1)[1].tobytes()
        name = f'{stem}_{i:08d}'
        root = 'ADEChallengeData2016'
        ade20k_mini.add_entry(
          archive, f'{root}/images/{split}/{name}.jpg', jpeg
        )
        ade20k_mini.add_entry(
          archive, f'{root}/annotations/{split}/{name}.png', png
        )
        lines += f'{name} misc\n'
        if split == 'training':
          (folder / f'{i:04d}.jpg').write_bytes(jpeg)
          (folder / f'{i:04d}.png').write_bytes(png)
    ade20k_mini.add_entry(
      archive, f'{root}/sceneCategories.txt', lines.encode()
    )
  return path


def write_cityscapes(folder: Path, count: int) -> Path:
  """Files for the peer below `folder`, and both zips of a mini Cityscapes."""
  counts = {'train': count, 'validation': 1, 'test': 1}
  height, width = SIZES['cityscapes']
  comment = cityscapes_mini.archive_comment(counts, SEED, (width, height))
  ids = np.flatnonzero(CITYSCAPES.to_train_id < 19).astype(np.uint8)
  with (
    zipfile.ZipFile(folder / cityscapes.IMAGES, 'w') as images,
    zipfile.ZipFile(folder / cityscapes.MASKS, 'w') as masks,
  ):
    images.comment = masks.comment = comment.encode()
    for split, number in counts.items():
      for i in range(number):
        image, label = make_sample(i, height, width, 19)
        mask = ids[label] if split != 'test' else np.zeros_like(label)
        name = cityscapes_mini.sample_name(split, i, number)
        where = f'{cityscapes.FOLDERS[split]}/{name.split("_")[0]}/{name}'
        png = cv2.imencode('.png', image)[1].tobytes()
        ade20k_mini.add_entry(
          images, f'leftImg8bit/{where}{cityscapes.IMAGE_SUFFIX}', png
        )
        ade20k_mini.add_entry(
          masks,
          f'gtFine/{where}{cityscapes.MASK_SUFFIX}',
          cv2.imencode('.png', mask)[1].tobytes(),
        )
        if split == 'train':
          (folder / f'{i:04d}.png').write_bytes(png)
          cv2.imwrite(str(folder / f'{i:04d}_label.png'), label)
  return folder


def images_per_second(split: PreparedSplit, data_config, number: int) -> float:
  """Of the whole pipeline while it runs, without its start and its end."""
  batch_size, extra = 4, 8
  steps = -(-number // batch_size)
  batches = make_train_iterator(
    data_config,
    split,
    seed=SEED,
    batch_size=batch_size,
    total_steps=1 + steps + extra,
    # As if there were thousands: shuffling a handful takes longer than that.
    sampler=Shuffled(np.arange(3000) % len(split), SEED),
  )
  with contextlib.closing(batches):
    next(batches)  # Worker processes take seconds to start.
    start = time.perf_counter()
    for _ in range(steps):
      next(batches)
    return batch_size * steps / (time.perf_counter() - start)


def stage_milliseconds(split: PreparedSplit, data_config, number: int) -> dict:
  """Medians of each step of a sample, in one thread."""
  key, augment = sample_key(SEED), make_augment(data_config)
  seconds: dict[str, list[float]] = {}

  def timed(name: str, function: Callable, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return result

  for i in range(number):
    draw = transforms.draw_augmentation(sample_rng(key, i))
    sample = timed('read and decode', split.__getitem__, i % len(split))
    timed(
      'resize, crop, flip, pad',
      augment,
      sample['image'],
      sample['label'],
      draw,
    )
  return {
    name: 1e3 * statistics.median(values) for name, values in seconds.items()
  }


def compare(data, split, folder, flags) -> dict:
  """Figures of one data set: ours, the peer's, and the ratios."""
  config = load_config(f'configs/{data.partition("_")[0]}_pspnet.py').data
  cores = count_cores()
  ways = {
    'one thread': {'num_threads': 1},
    f'one process, {cores} threads': {'num_threads': cores},
  }
  if flags.workers:
    settings = {'num_threads': 1, 'num_workers': flags.workers}
    ways[f'{flags.workers} worker processes'] = settings
  number = -(-flags.samples // 4) if data == 'cityscapes' else flags.samples
  rates: dict[str, list[float]] = {}
  arguments = 'pipeline_peer.py', data.partition('_')[0], folder
  with open_peer(flags.peer, *arguments) as peer:
    for _ in range(flags.rounds + 1):  # The first one warms up.
      for way, settings in ways.items():
        with config.unlocked():
          config.update({'num_workers': 0} | settings)
        rate = images_per_second(split, config, number)
        rates.setdefault(way, []).append(rate)
      if peer:
        for workers in {0, flags.workers}:
          rate = number / peer.seconds(f'{number} {workers}')
          way = f'peer, {workers} workers' if workers else 'peer, one process'
          rates.setdefault(way, []).append(rate)
  medians = {
    way: statistics.median(values[1:]) for way, values in rates.items()
  }
  result = {
    'images_per_second': medians,
    'rounds': {way: values[1:] for way, values in rates.items()},
    'stages_ms': stage_milliseconds(split, config, number),
  }
  if flags.peer:
    single = medians['peer, one process']
    result['peer'] = peer.version
    result['ratio'] = {way: medians[way] / single for way in ways}
  return result


def prepare_splits(
  folder: Path, flags
) -> Iterator[tuple[str, PreparedSplit, Path]]:
  """Writes and prepares each data set in turn."""
  for data, write, count in (
    ('ade20k', write_ade20k, 48),
    ('cityscapes', write_cityscapes, 8),
  ):
    if data not in flags.data and f'{data}_raw' not in flags.data:
      continue
    files = folder / data
    files.mkdir()
    archive = write(files, count if flags.samples > 8 else 2)
    with contextlib.redirect_stdout(sys.stderr):
      prepare(DATASETS[f'{data}_mini'], folder / 'data', archive)
    if data in flags.data:
      yield data, PreparedSplit(f'{data}_mini', folder / 'data', 'train'), files
    if f'{data}_raw' in flags.data:
      with contextlib.redirect_stdout(sys.stderr):
        prepare_raw(f'{data}_mini', folder / 'data')
      split = PreparedSplit(f'{data}_mini', folder / 'data', 'train')
      yield f'{data}_raw', split, files


def print_figures(data: str, result: dict) -> None:
  """The rates with their ratios to the peer, and the stages."""
  table = rich.table.Table(data)
  for column in ('images/s', 'ratio'):
    table.add_column(column, justify='right')
  for way, rate in result['images_per_second'].items():
    ratio = result.get('ratio', {}).get(way)
    table.add_row(way, f'{rate:.1f}', f'{ratio:.2f}' if ratio else '')
  table.add_section()
  for name, milliseconds in result['stages_ms'].items():
    table.add_row(name, f'{milliseconds:.1f} ms', '')
  rich.console.Console().print(table)


def main() -> None:
  """Reads the command line, measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--data', nargs='+', choices=DATA, default=DATA, help='default: all'
  )
  parser.add_argument(
    '--samples',
    type=positive,
    default=96,
    help='a round, a quarter of it of PNG images (default: 96)',
  )
  parser.add_argument(
    '--rounds',
    type=positive,
    default=5,
    help='medians are over these (default: 5)',
  )
  parser.add_argument(
    '--workers',
    type=natural,
    default=count_cores(),
    help='processes, 0 to leave them out (default: one a core)',
  )
  parser.add_argument(
    '--peer', metavar='COMMAND', help='a Python that has mmsegmentation'
  )
  add_out(parser)
  flags = parser.parse_args()
  result = describe_machine() | {'samples': flags.samples}
  with tempfile.TemporaryDirectory() as folder:
    for data, split, files in prepare_splits(Path(folder), flags):
      print(f'measuring {data}', flush=True)
      result[data] = compare(data, split, files, flags)
      print_figures(data, result[data])
  if flags.out:
    write_result(flags.out, 'pipeline', result)


if __name__ == '__main__':
  run(main)
