"""Prepares an archive as a data set that training can read.

    python -m resnest_jax.data.prepare ade20k --archive ZIP --data_dir DIR
    python -m resnest_jax.data.prepare cityscapes --archive_dir FOLDER
    python -m resnest_jax.data.prepare ade20k_mini --data_dir DIR
    python -m resnest_jax.data.prepare cityscapes_mini --data_dir DIR
    python -m resnest_jax.data.prepare imagenet --archive_dir FOLDER
    python -m resnest_jax.data.prepare imagenet_mini --data_dir DIR
    python -m resnest_jax.data.prepare cityscapes --raw --data_dir DIR
    python -m resnest_jax.data.prepare own SOURCE --data_dir DIR

Without an archive, ade20k is downloaded and the mini data sets are generated;
cityscapes and imagenet require a registration, and FOLDER holds their two
archives. The data appears in DIR once all of it is written and checked.
Finished data is never replaced.

--raw also stores the decoded pixels of Cityscapes' training images (25 GB),
which are faster to read. If it is stopped, the same command resumes.

own turns the export of an annotation tool, or a folder of masks, into your own
data (configs/folder.py).
"""

import argparse
import contextlib
import functools
import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from resnest_jax.errors import RESUMES as STOPPED
from resnest_jax.errors import run_module

if __name__ == '__main__':
  # Before the imports below, so that Ctrl-C during them is told in a line.
  run_module(__spec__.name, STOPPED)

import tensorflow_datasets as tfds

from resnest_jax.data import datasets, pixels
from resnest_jax.data.annotations import command as own
from resnest_jax.data.archives import ArchiveBuilder
from resnest_jax.data.datasets import DATASETS
from resnest_jax.data.mini import ade20k_mini, cityscapes_mini, imagenet_mini
from resnest_jax.errors import UserError
from resnest_jax.files import explain_refusal, remove
from resnest_jax.flags import Parser
from resnest_jax.progress import progress_bar
from resnest_jax.runtime import lock_folder
from resnest_jax.shipped import command

_RAW_SPLIT = 'train'
_DRAWN = {
  'ade20k_mini': ade20k_mini,
  'cityscapes_mini': cityscapes_mini,
  'imagenet_mini': imagenet_mini,
}

# tfds buffers a split in memory up to this size, and in temporary files above.
_TFDS_BUFFER_BYTES = 1000 * 2**20


def main() -> None:
  if sys.argv[1:2] == ['own']:
    own.main(sys.argv[2:])
    return
  args = _parse_arguments()
  name, data_dir = args.dataset, args.data_dir
  prepared = args.raw and datasets.is_prepared(name, data_dir)
  archive = archive_from_arguments(args, prepared)
  if not prepared or archive or args.images or args.size:
    if archive is None and name.endswith('_mini'):
      prepare_generated(args)
    else:
      prepare(DATASETS[name], data_dir, archive)
  if args.raw:
    prepare_raw(name, data_dir)
  print_summary(name, data_dir)


def _parse_arguments() -> argparse.Namespace:
  parser = Parser(
    prog='python -m resnest_jax.data.prepare', description=__doc__
  )
  add = parser.add_argument
  add('dataset', choices=DATASETS, metavar='DATASET', help=', '.join(DATASETS))
  add(
    '--data_dir',
    type=Path,
    default=Path('data'),
    metavar='DIR',
    help='where the data is written (default: data)',
  )
  add(
    '--archive',
    type=Path,
    metavar='ZIP',
    help='the zip file of ADE20K, as downloaded; without it ade20k is '
    'downloaded (0.9 GB)',
  )
  add(
    '--archive_dir',
    type=Path,
    metavar='FOLDER',
    help='the folder of both archives of Cityscapes or ImageNet, as downloaded',
  )
  add(
    '--raw',
    action='store_true',
    help='also store the decoded pixels of Cityscapes (25 GB)',
  )
  counts = [n for x in _DRAWN.values() for n in x.DEFAULT_COUNTS.values()]
  default = '{} {}; Cityscapes: {} {}; ImageNet: {} {}'
  ade20k_mini.add_arguments(parser, default.format(*counts))
  cityscapes_mini.add_size_argument(parser)
  return parser.parse_args()


def archive_from_arguments(
  args: argparse.Namespace, prepared: bool
) -> Path | None:
  """Returns the archive that was given; refuses flags of other data sets."""
  city = args.dataset.startswith('cityscapes')
  two = city or args.dataset.startswith('imagenet')
  one = 'ADE20K; --archive_dir takes the folder of two'
  for flag, given, fits, sets in (
    ('--archive', args.archive, not two, one),
    ('--archive_dir', args.archive_dir, two, 'Cityscapes and ImageNet'),
    ('--size', args.size, city, 'Cityscapes'),
    ('--raw', args.raw, city, 'Cityscapes, whose images are of one size'),
  ):
    if given and not fits:
      raise UserError(f'{args.dataset} takes no {flag}: it is for {sets}.')
  name, mini = args.dataset, args.dataset.endswith('_mini')
  if two and not (args.archive_dir or prepared or mini):
    raise UserError(
      f'{name} cannot be downloaded automatically: {DATASETS[name].hint} Then '
      f'run:\n  {datasets.prepare_command(name, args.data_dir)}'
    )
  return args.archive_dir if two else args.archive


def prepare_generated(args: argparse.Namespace) -> ArchiveBuilder:
  """Generates an archive in `data_dir`/downloads and prepares it."""
  drawn = _DRAWN[args.dataset]
  counts, seed, *size = what = drawn.arguments(args)
  comment = drawn.archive_comment(*what)
  numbers = '_'.join(map(str, (*counts.values(), *sum(size, ()))))
  suffix = '.zip' if drawn is ade20k_mini else ''
  name = f'{args.dataset}_{numbers}_seed{seed}{suffix}'
  archive = args.data_dir / 'downloads' / name
  dataset = DATASETS[args.dataset]
  builder = dataset.builder(config=dataset.config, data_dir=args.data_dir)
  # The comment has all arguments of the generator.
  if _is_there(builder, 'comment', comment, comment):
    return builder
  # Released before `prepare`, which takes the same lock.
  with _exclusive(args.data_dir):
    drawn.write_archives(archive, *what)
  return prepare(dataset, args.data_dir, archive)


def prepare(
  dataset: datasets.Dataset, data_dir: Path, archive: Path | None = None
) -> ArchiveBuilder:
  """Checks `archive`, or downloads it, and writes it as records, once."""
  config = dataset.config
  make = functools.partial(dataset.builder, config=config, data_dir=data_dir)
  archive_bytes = fingerprint = None
  # Before the lock is taken: a wrong archive leaves no trace.
  if archive is not None:
    contents = dataset.builder.open_contents(config, archive)
    archive_bytes = sum(map(os.path.getsize, contents.files))
    fingerprint = contents.fingerprint
  with _exclusive(data_dir):
    # Under the lock: another process may just have prepared the same data.
    builder = make()
    if _is_there(builder, 'fingerprint', fingerprint, archive):
      return builder
    _remove_unfinished(builder)
    size = archive_bytes or config.download_bytes
    # Records, download and tfds' temporary files, each as large as the archive.
    parts = 1.05 + (archive_bytes is None) + (size > _TFDS_BUFFER_BYTES)
    _check_free(data_dir, size * parts)
    with progress_bar('checking and writing') as on_progress:
      # A new builder: it takes archive and progress only when it is made.
      builder = make(archive=archive, on_progress=on_progress)
      try:
        _write_records(builder, data_dir)
      except Exception:
        _remove_unfinished(builder)
        raise
    for folder in ('downloads/extracted', 'downloads'):
      with contextlib.suppress(OSError):  # It is not there, or not empty.
        (data_dir / folder).rmdir()
    return builder


def prepare_raw(name: str, data_dir: Path) -> Path:
  """Decodes the training split of prepared data; resumes if interrupted."""
  split = datasets.PreparedSplit(name, data_dir, _RAW_SPLIT)
  stored = datasets.find_stored(name, data_dir)
  folder = stored.pixel_folder
  if split.decoded:
    print(f'Already decoded: {folder}')
    return folder
  what = folder, _RAW_SPLIT, split.raw, len(split), stored.fingerprint
  check = functools.partial(_check_free, data_dir)
  with _exclusive(data_dir), progress_bar('decoding') as on_progress:
    pixels.write_pixels(*what, on_progress, check)
  return folder


def _write_records(builder: ArchiveBuilder, data_dir: Path) -> None:
  # tfds shows warnings, and several bars for every split.
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_dir=data_dir / 'downloads',
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      file_format='array_record',
    )


def _is_there(
  builder: ArchiveBuilder, key: str, expected: str | None, asked: object
) -> bool:
  """Whether complete data is there; its metadata must be as `expected`."""
  if not builder.data_path.exists():
    return False
  # Not deleted: tfds moves only complete data into place; somebody changed it.
  # Not `builder.is_prepared`, which takes brackets in the path for a pattern.
  described = Path(builder.data_path, 'dataset_info.json').is_file()
  if not described or datasets.missing_files(builder):
    raise UserError(
      f'{builder.data_path} exists but is not a complete data set. Nothing '
      'was changed; delete or move it and run the same command again.'
    )
  metadata = builder.info.metadata
  if expected is not None and metadata[key] != expected:
    images = {name: s.num_examples for name, s in builder.info.splits.items()}
    raise UserError(
      f'{builder.data_path} was prepared from another archive '
      f'({metadata["comment"] or images}) than the one given now ({asked}). '
      'Nothing was changed; give another --data_dir, or delete that folder to '
      'replace it.'
    )
  print(f'Already prepared: {builder.data_path}')
  return True


def _remove_unfinished(builder: ArchiveBuilder) -> None:
  # Only with the lock held: another process may be writing there.
  for path in Path(builder.data_path).parent.glob('incomplete.*'):
    remove(path)


def _check_free(data_dir: Path, needed: float) -> None:
  free = shutil.disk_usage(data_dir).free
  if free < needed:
    raise UserError(
      f'{data_dir} has {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB '
      'are needed. Make room or give another --data_dir.'
    )


@contextlib.contextmanager
def _exclusive(data_dir: Path) -> Iterator[None]:
  datasets.check_utf8(data_dir)
  again = 'give another --data_dir; then run the same command again'
  with (
    lock_folder(data_dir, 'prepares data in'),
    explain_refusal(f'to {data_dir}', again),
  ):
    yield


def print_summary(dataset: str, data_dir: Path) -> None:
  stored = datasets.find_stored(dataset, data_dir)
  infos = stored.builder.info.splits
  size = sum(info.num_bytes for info in infos.values())
  family, _, variant = dataset.partition('_')
  row = {'imagenet': 'resnest50'}.get(family, 'pspnet')
  config = f'configs/{family}_{row}.py{":mini" if variant else ""}'
  options = ''
  if data_dir != Path('data'):
    options = shlex.quote(f'--config.data.data_dir={data_dir}') + ' '
  print(f'{dataset} is ready.')
  for split in infos:
    print(f'  {split:<13}{infos[split].num_examples} images')
  print(f'  {"size":<13}{size / 1e6:.0f} MB')
  print(f'  {"where":<13}{stored.builder.data_path}')
  if pixels.is_written(stored.pixel_folder, _RAW_SPLIT):
    print(f'  {"decoded":<13}{_RAW_SPLIT}, in {stored.pixel_folder}')
  print(
    f'Next:\n  {command("train.py")} --config {config} {options}'
    f'--workdir runs/{dataset}'
  )
