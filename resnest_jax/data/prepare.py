"""Turns an archive into a data set that training can read.

    python -m resnest_jax.data.prepare ade20k --archive ZIP --data_dir DIR
    python -m resnest_jax.data.prepare ade20k_mini --data_dir DIR

Without --archive, ade20k is downloaded and ade20k_mini is generated. The data
appears in DIR/ade20k at once when all of it is written and checked; stopped
at any moment, the same command starts again. Finished data is never replaced.
"""

import argparse
import contextlib
import fcntl
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import tensorflow_datasets as tfds

from resnest_jax import errors
from resnest_jax.data import mini
from resnest_jax.data.ade20k import (
  Ade20k,
  Ade20kConfig,
  check_counts,
  find_pairs,
  fingerprint,
  open_archive,
)
from resnest_jax.data.datasets import CONFIGS, missing_files
from resnest_jax.data.progress import progress_bar
from resnest_jax.errors import UserError

# tfds keeps a split in memory up to here and in temporary files above.
_TFDS_BUFFER_BYTES = 1000 * 2**20


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m resnest_jax.data.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('dataset', choices=CONFIGS)
  parser.add_argument('--data_dir', type=Path, default=Path('data'))
  parser.add_argument(
    '--archive', type=Path, help='the zip file, as downloaded'
  )
  mini.add_arguments(parser)
  args = parser.parse_args()
  config = CONFIGS[args.dataset]
  if config is CONFIGS['ade20k_mini'] and args.archive is None:
    counts = mini.counts_from_arguments(args)
    builder = prepare_mini(args.data_dir, counts, args.seed)
  else:
    builder = prepare(config, args.data_dir, args.archive)
  print_summary(args.dataset, args.data_dir, builder)


def prepare_mini(
  data_dir: Path, counts: Mapping[str, int], seed: int
) -> Ade20k:
  """Generates the mini archive in `data_dir`/downloads and prepares it."""
  builder = Ade20k(config=CONFIGS['ade20k_mini'], data_dir=data_dir)
  comment = mini.archive_comment(counts, seed)
  if is_finished(builder):
    if builder.info.metadata['comment'] != comment:
      raise _already_other(builder, comment)
    print(f'Already prepared: {builder.data_path}')
    return builder
  name = f'ade20k_mini_{"_".join(map(str, counts.values()))}_seed{seed}.zip'
  archive = data_dir / 'downloads' / name
  with _exclusive(data_dir):
    mini.write_archive(archive, counts, seed)
  return prepare(CONFIGS['ade20k_mini'], data_dir, archive)


def prepare(
  config: Ade20kConfig, data_dir: Path, archive: Path | None = None
) -> Ade20k:
  """Checks `archive` and writes it as records; does nothing if that is done.

  Args:
    config: which archive is expected.
    data_dir: where prepared data lies; made if needed.
    archive: the zip file; None: it is downloaded to `data_dir`/downloads.

  Raises:
    UserError: an archive that is damaged or another release, too little disk
      space, or `data_dir` already has data from another archive.
  """
  if archive is not None:
    contents = _examine(config, archive)  # Before anything is written.
  elif config.url is None:
    raise UserError(f'{config.name} cannot be downloaded; pass --archive')
  with _exclusive(data_dir):
    builder = Ade20k(config=config, data_dir=data_dir)
    if is_finished(builder):
      if archive and contents != builder.info.metadata['fingerprint']:
        raise _already_other(builder, archive)
      print(f'Already prepared: {builder.data_path}')
      return builder
    _remove_unfinished(builder, data_dir)
    _check_disk_space(config, data_dir, archive)
    with progress_bar('checking and writing') as on_progress:
      builder = Ade20k(
        config=config,
        data_dir=data_dir,
        archive=archive,
        on_progress=on_progress,
      )
      # tfds prints about sizes that it does not know, and its bars are many.
      tfds.disable_progress_bar()
      with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
          download_dir=data_dir / 'downloads',
          download_config=tfds.download.DownloadConfig(try_download_gcs=False),
          file_format='array_record',
        )
    _remove_empty(data_dir / 'downloads' / 'extracted', data_dir / 'downloads')
    return builder


def is_finished(builder: Ade20k) -> bool:
  """Whether the data is there; a `UserError` if only parts of it are."""
  if not builder.data_path.exists():
    return False
  if not builder.is_prepared() or missing_files(builder):
    raise UserError(
      f'{builder.data_path} exists but is not a complete data set. Nothing '
      'was changed; delete or move it and run the same command again.'
    )
  return True


def _examine(config: Ade20kConfig, path: Path) -> str:
  """Checks an archive's table of contents; returns its fingerprint."""
  with open_archive(path) as archive:
    check_counts(archive, find_pairs(archive), config.counts)
    return fingerprint(archive)


def _already_other(builder: Ade20k, asked: object) -> UserError:
  return UserError(
    f'{builder.data_path} was prepared from another archive '
    f'({_origin(builder)}) than the one given now ({asked}). Nothing was '
    'changed; give another --data_dir, or delete that folder to replace it.'
  )


def _origin(builder: Ade20k) -> str:
  images = {name: s.num_examples for name, s in builder.info.splits.items()}
  return builder.info.metadata['comment'] or str(images)


def _remove_unfinished(builder: Ade20k, data_dir: Path) -> None:
  """Deletes what a killed run left behind; call with the lock held."""
  for path in Path(builder.data_path).parent.glob('incomplete.*'):
    shutil.rmtree(path)
  for path in list((data_dir / 'downloads').rglob('*.tmp.*')):
    shutil.rmtree(path)


def _remove_empty(*folders: Path) -> None:
  for folder in folders:
    if folder.is_dir() and not any(folder.iterdir()):
      folder.rmdir()


def _check_disk_space(
  config: Ade20kConfig, data_dir: Path, archive: Path | None
) -> None:
  """Records are as large as the archive: both hold compressed pictures."""
  size = archive.stat().st_size if archive else config.download_bytes
  needed = size * 1.05
  if archive is None:
    needed += size
  if size > _TFDS_BUFFER_BYTES:
    needed += size
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
  try:
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / '.prepare.lock', 'w') as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise UserError(
          f'another process prepares data in {data_dir} just now. Wait until '
          'it is done.'
        ) from error
      yield
  except OSError as error:
    raise UserError(
      f'cannot write to {data_dir}: {error}. Free some space or give another '
      '--data_dir, then run the same command again.'
    ) from error


def print_summary(dataset: str, data_dir: Path, builder: Ade20k) -> None:
  """Says what is there, how large it is, and what to do with it."""
  infos = builder.info.splits
  size = sum(info.num_bytes for info in infos.values())
  config = 'configs/ade20k_pspnet.py'
  if dataset == 'ade20k_mini':
    config += ':mini'
  options = ''
  if data_dir != Path('data'):
    options = f'--config.data.data_dir={data_dir} '
  print(f'{dataset} is ready.')
  for split in infos:
    print(f'  {split:<13}{infos[split].num_examples} images')
  print(f'  {"size":<13}{size / 1e6:.0f} MB')
  print(f'  {"where":<13}{builder.data_path}')
  print(
    f'Next:\n  python train.py --config {config} {options}'
    f'--workdir runs/{dataset}'
  )


if __name__ == '__main__':
  errors.run(main)
