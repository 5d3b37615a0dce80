"""Turns an archive into a data set that training can read.

    python -m resnest_jax.data.prepare ade20k --archive ZIP --data_dir DIR
    python -m resnest_jax.data.prepare cityscapes --archive_dir FOLDER
    python -m resnest_jax.data.prepare ade20k_mini --data_dir DIR
    python -m resnest_jax.data.prepare cityscapes_mini --data_dir DIR
    python -m resnest_jax.data.prepare cityscapes --raw --data_dir DIR
    python -m resnest_jax.data.prepare palette2id --help

Without --archive, ade20k is downloaded; the mini data sets are generated if no
archive is given. cityscapes has to be downloaded by hand, which needs a
registration; FOLDER holds its two zip files. The data appears in DIR (`data`
if not given) at once when all of it is written and checked; stopped at any
moment, the same command starts again. Finished data is never replaced.

--raw stores the pixels of Cityscapes' training images as well, so that
training need not decode PNG files (25 GB; 6.3 MB an image and 2.1 MB its mask).
No archive is needed where the data is prepared. Training reads them by itself,
with the same results; stopped at any moment, the same command goes on.

palette2id converts the masks of data of one's own; configs/folder.py reads
such data where it lies.
"""

import argparse
import contextlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from resnest_jax import errors
from resnest_jax.data import pixels
from resnest_jax.data.archives import ArchiveBuilder, ArchiveConfig
from resnest_jax.data.datasets import (
  DATASETS,
  Dataset,
  find_stored,
  is_prepared,
  missing_files,
  open_split,
  prepare_command,
)
from resnest_jax.data.mini import ade20k_mini, cityscapes_mini
from resnest_jax.data.own import palette2id
from resnest_jax.errors import UserError
from resnest_jax.files import explain_refusal
from resnest_jax.progress import progress_bar
from resnest_jax.runtime import lock_folder
from resnest_jax.shipped import command

# Of which --raw stores the pixels: evaluations decode little in comparison.
_RAW_SPLIT = 'train'

# tfds keeps a split in memory up to here and in temporary files above.
_TFDS_BUFFER_BYTES = 1000 * 2**20


def main() -> None:
  if sys.argv[1:2] == ['palette2id']:
    palette2id.main(sys.argv[2:])
    return
  args = _parse_arguments()
  dataset = DATASETS[args.dataset]
  archive = archive_from_arguments(args)
  asked = archive or args.images or args.size
  if args.raw and not asked and is_prepared(args.dataset, args.data_dir):
    builder = find_stored(args.dataset, args.data_dir).builder
  elif archive is None and args.dataset == 'ade20k_mini':
    builder = prepare_ade20k_mini(args)
  elif archive is None and args.dataset == 'cityscapes_mini':
    builder = prepare_cityscapes_mini(args)
  else:
    builder = prepare(dataset, args.data_dir, archive)
  if args.raw:
    prepare_raw(args.dataset, args.data_dir)
  print_summary(args.dataset, args.data_dir, builder)


def _parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m resnest_jax.data.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'dataset',
    choices=DATASETS,
    metavar='DATASET',
    help=', '.join(DATASETS),
  )
  parser.add_argument(
    '--data_dir',
    type=Path,
    default=Path('data'),
    metavar='DIR',
    help='where the data is written (default: data)',
  )
  parser.add_argument(
    '--archive',
    type=Path,
    metavar='ZIP',
    help='the zip file of ADE20K, as downloaded; without it ade20k is '
    'downloaded (0.9 GB)',
  )
  parser.add_argument(
    '--archive_dir',
    type=Path,
    metavar='FOLDER',
    help='the folder of the two zip files of Cityscapes, as downloaded',
  )
  parser.add_argument(
    '--raw',
    action='store_true',
    help='also store the decoded pixels of Cityscapes (25 GB)',
  )
  ade20k_mini.add_arguments(
    parser,
    '{} {}; Cityscapes: {} {}'.format(
      *ade20k_mini.DEFAULT_COUNTS.values(),
      *cityscapes_mini.DEFAULT_COUNTS.values(),
    ),
  )
  cityscapes_mini.add_size_argument(parser)
  return parser.parse_args()


def archive_from_arguments(args: argparse.Namespace) -> Path | None:
  """The archive that was given, None if there is none.

  Raises:
    UserError: a flag of another data set, or none where one is needed.
  """
  city = args.dataset.startswith('cityscapes')
  if city and args.archive:
    raise UserError(
      f'{args.dataset} has two archives: give --archive_dir, the folder that '
      'holds both, instead of --archive'
    )
  if not city and (args.archive_dir or args.size):
    flag = '--archive_dir' if args.archive_dir else '--size'
    raise UserError(f'{flag} is for Cityscapes, not for {args.dataset}')
  if not city and args.raw:
    raise UserError(
      f'--raw is for Cityscapes, whose images are all of one size, not for '
      f'{args.dataset}'
    )
  prepared = args.raw and is_prepared(args.dataset, args.data_dir)
  if args.dataset == 'cityscapes' and not (args.archive_dir or prepared):
    raise UserError(
      f'cityscapes cannot be downloaded by itself: '
      f'{DATASETS["cityscapes"].hint} Then run:\n  '
      f'{prepare_command("cityscapes", args.data_dir)}'
    )
  return args.archive_dir if city else args.archive


def prepare_ade20k_mini(args: argparse.Namespace) -> ArchiveBuilder:
  """Generates the mini ADE20K of --images and --seed and prepares it."""
  counts = ade20k_mini.counts_from_arguments(args)
  name = f'ade20k_mini_{"_".join(map(str, counts.values()))}_seed{args.seed}'
  return _prepare_generated(
    DATASETS['ade20k_mini'],
    args.data_dir,
    f'{name}.zip',
    ade20k_mini.archive_comment(counts, args.seed),
    lambda path: ade20k_mini.write_archive(path, counts, args.seed),
  )


def prepare_cityscapes_mini(args: argparse.Namespace) -> ArchiveBuilder:
  """Generates the mini Cityscapes of --images, --seed and --size."""
  counts = cityscapes_mini.counts_from_arguments(args)
  size = cityscapes_mini.size_from_arguments(args)
  numbers = '_'.join(map(str, (*counts.values(), *size)))
  what = counts, args.seed, size
  return _prepare_generated(
    DATASETS['cityscapes_mini'],
    args.data_dir,
    f'cityscapes_mini_{numbers}_seed{args.seed}',
    cityscapes_mini.archive_comment(*what),
    lambda folder: cityscapes_mini.write_archives(folder, *what),
  )


def _prepare_generated(
  dataset: Dataset,
  data_dir: Path,
  name: str,
  comment: str,
  write: Callable[[Path], None],
) -> ArchiveBuilder:
  """Generates an archive in `data_dir`/downloads and prepares it.

  Args:
    dataset: a mini one.
    data_dir: where prepared data lies.
    name: of the archive or of its folder.
    comment: that it will have; tells whether the right one is there.
    write: function of the path that writes the archive.
  """
  builder = dataset.builder(config=dataset.config, data_dir=data_dir)
  if is_finished(builder):
    if builder.info.metadata['comment'] != comment:
      raise _already_other(builder, comment)
    print(f'Already prepared: {builder.data_path}')
    return builder
  with _exclusive(data_dir):
    write(data_dir / 'downloads' / name)
  return prepare(dataset, data_dir, data_dir / 'downloads' / name)


def prepare(
  dataset: Dataset, data_dir: Path, archive: Path | None = None
) -> ArchiveBuilder:
  """Checks `archive` and writes it as records; does nothing if that is done.

  Args:
    dataset: which archive is expected, and who writes it.
    data_dir: where prepared data lies; made if needed.
    archive: the zip file, or the folder of several; None: it is downloaded to
      `data_dir`/downloads.

  Raises:
    UserError: an archive that is damaged or another release, too little disk
      space, or `data_dir` already has data from another archive.
  """
  make, config = dataset.builder, dataset.config
  if archive is not None:  # Before anything is written.
    contents = make.open_contents(config, archive)
    contents.close()
  elif config.url is None:
    raise UserError(f'{config.name} cannot be downloaded; pass the archive')
  with _exclusive(data_dir):
    builder = make(config=config, data_dir=data_dir)
    if is_finished(builder):
      if archive and contents.fingerprint != _fingerprint(builder):
        raise _already_other(builder, archive)
      print(f'Already prepared: {builder.data_path}')
      return builder
    _remove_unfinished(builder, data_dir)
    size = contents.num_bytes() if archive else None
    _check_disk_space(config, data_dir, size)
    with progress_bar('checking and writing') as on_progress:
      builder = make(
        config=config,
        data_dir=data_dir,
        archive=archive,
        on_progress=on_progress,
      )
      try:
        _write_records(builder, data_dir)
      except Exception:  # A part of a download is of no use.
        _remove_unfinished(builder, data_dir)
        raise
    _remove_empty(data_dir / 'downloads' / 'extracted', data_dir / 'downloads')
    return builder


def prepare_raw(name: str, data_dir: Path) -> Path:
  """Decodes the training split of prepared data, or the rest of it.

  Args:
    name: of the data set, whose images are all of one size.
    data_dir: where it was prepared.

  Returns:
    The folder of the decoded pixels.

  Raises:
    UserError: the data is not there or cannot be decoded, too little disk
      space, or there are decoded pixels of other data.
  """
  split = open_split(name, data_dir, _RAW_SPLIT)
  stored = find_stored(name, data_dir)
  folder = stored.pixel_folder
  if split.decoded:
    print(f'Already decoded: {folder}')
    return folder
  what = folder, _RAW_SPLIT, split.raw, len(split), stored.fingerprint
  with _exclusive(data_dir):
    _check_free(data_dir, pixels.bytes_to_write(*what))
    with progress_bar('decoding') as on_progress:
      pixels.write_pixels(*what, on_progress)
  return folder


def _write_records(builder: ArchiveBuilder, data_dir: Path) -> None:
  # tfds prints about sizes that it does not know, and its bars are many.
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_dir=data_dir / 'downloads',
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      file_format='array_record',
    )


def is_finished(builder: ArchiveBuilder) -> bool:
  """Whether the data is there; a `UserError` if only parts of it are."""
  if not builder.data_path.exists():
    return False
  if not builder.is_prepared() or missing_files(builder):
    raise UserError(
      f'{builder.data_path} exists but is not a complete data set. Nothing '
      'was changed; delete or move it and run the same command again.'
    )
  return True


def _fingerprint(builder: ArchiveBuilder) -> str:
  return builder.info.metadata['fingerprint']


def _already_other(builder: ArchiveBuilder, asked: object) -> UserError:
  return UserError(
    f'{builder.data_path} was prepared from another archive '
    f'({_origin(builder)}) than the one given now ({asked}). Nothing was '
    'changed; give another --data_dir, or delete that folder to replace it.'
  )


def _origin(builder: ArchiveBuilder) -> str:
  images = {name: s.num_examples for name, s in builder.info.splits.items()}
  return builder.info.metadata['comment'] or str(images)


def _remove_unfinished(builder: ArchiveBuilder, data_dir: Path) -> None:
  """Deletes what a failed or killed run left; call with the lock held."""
  for path in Path(builder.data_path).parent.glob('incomplete.*'):
    shutil.rmtree(path)
  for path in list((data_dir / 'downloads').rglob('*.tmp.*')):
    shutil.rmtree(path)


def _remove_empty(*folders: Path) -> None:
  for folder in folders:
    if folder.is_dir() and not any(folder.iterdir()):
      folder.rmdir()


def _check_disk_space(
  config: ArchiveConfig, data_dir: Path, archive_bytes: int | None
) -> None:
  """Records are as large as the archive: both hold compressed pictures."""
  size = archive_bytes or config.download_bytes
  needed = size * 1.05
  if archive_bytes is None:
    needed += size
  if size > _TFDS_BUFFER_BYTES:
    needed += size
  _check_free(data_dir, needed)


def _check_free(data_dir: Path, needed: float) -> None:
  """Raises a `UserError` unless there is room for `needed` bytes."""
  free = shutil.disk_usage(data_dir).free
  if free < needed:
    raise UserError(
      f'{data_dir} has {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB '
      'are needed. Make room or give another --data_dir.'
    )


@contextlib.contextmanager
def _exclusive(data_dir: Path) -> Iterator[None]:
  """Holds the lock of `data_dir`, and explains the file system's errors.

  The lock ends with the process, however that ends.
  """
  again = 'give another --data_dir; then run the same command again'
  with (
    lock_folder(data_dir, 'prepares data in'),
    explain_refusal(f'to {data_dir}', again),
  ):
    yield


def print_summary(
  dataset: str, data_dir: Path, builder: ArchiveBuilder
) -> None:
  """Says what is there, how large it is, and what to do with it."""
  infos = builder.info.splits
  size = sum(info.num_bytes for info in infos.values())
  family, _, variant = dataset.partition('_')
  config = f'configs/{family}_pspnet.py{":mini" if variant else ""}'
  options = ''
  if data_dir != Path('data'):
    options = f'--config.data.data_dir={data_dir} '
  print(f'{dataset} is ready.')
  for split in infos:
    print(f'  {split:<13}{infos[split].num_examples} images')
  print(f'  {"size":<13}{size / 1e6:.0f} MB')
  print(f'  {"where":<13}{builder.data_path}')
  stored = find_stored(dataset, data_dir)
  if pixels.is_written(stored.pixel_folder, _RAW_SPLIT):
    print(f'  {"decoded":<13}{_RAW_SPLIT}, in {stored.pixel_folder}')
  print(
    f'Next:\n  {command("train.py")} --config {config} {options}'
    f'--workdir runs/{dataset}'
  )


if __name__ == '__main__':
  errors.run(main)
