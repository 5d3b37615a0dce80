"""Finds the files to predict and names their outputs."""

import dataclasses
import glob
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from resnest_jax.bands import ARRAY
from resnest_jax.data.own.pairing import IMAGE_SUFFIXES, endings, tell, walk
from resnest_jax.errors import UserError
from resnest_jax.files import clean, inside
from resnest_jax.prediction.video import VIDEO_SUFFIXES

SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES
TIFF_SUFFIXES = ('.tif', '.tiff')
KINDS = ('masks', 'colors', 'overlays')
_ACCEPTED = f'accepted are {", ".join(SUFFIXES)}.'


@dataclasses.dataclass(frozen=True)
class Source:
  """A picture or a video."""

  path: Path
  folder: Path = Path()  # Sub folder of the output.
  # By kind, relative to the output folder; see `with_files`.
  files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
  is_large: bool = False  # A TIFF file that is read in parts.

  @property
  def is_video(self) -> bool:
    # By name: opening thousands of files would take long.
    return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(
  given: Sequence[str | Path], recursive: bool = False, out: Path | None = None
) -> list[Source]:
  """The pictures and videos that are given, each once.

  Args:
    given: files, folders, or patterns with *, ?, [abc] or **. Patterns keep the
      sub folders from the first part with such a character on.
    recursive: whether to search sub folders of folders.
    out: skipped if it is inside a given folder.

  Raises:
    UserError: a file does not exist, or no picture or video is found.
  """
  # A file may be given itself and by its folder.
  unique: dict[Path, Source] = {}
  for one in map(Path, given):
    for source in _sources_of(one, recursive, out):
      unique.setdefault(source.path.resolve(), source)
  if not unique:
    deeper = '' if recursive else ' Add --recursive to search sub folders.'
    raise UserError(
      f'there is no picture or video in {", ".join(map(str, given))}; '
      f'{_ACCEPTED}{deeper}'
    )
  return list(unique.values())


def _sources_of(one: Path, recursive: bool, out: Path | None) -> list[Source]:
  path = one.expanduser()  # Shells leave ~ alone within quotes.
  # Existing names come before patterns: '[a].jpg' may be a file.
  if os.path.isfile(path):
    # Not filtered by its ending: if it is unreadable, an error says so.
    return [Source(path)]
  if os.path.isdir(path):
    base, there = path, walk(path, deep=recursive)
  elif glob.has_magic(str(path)):
    # Nor are folders that exist, such as '[project]'.
    base = next(x for x in path.parents if os.path.isdir(x))
    pattern = path.relative_to(base)
    matched = glob.glob(str(pattern), root_dir=base, recursive=True)
    # A set: '**' may match a file in several ways.
    there = sorted({base / x for x in matched})
    _check_folders(base, pattern)
  else:
    raise UserError(
      f'there is no file, folder or pattern {one}, or it cannot be reached.'
    )
  there = [x for x in there if not os.path.isdir(x)]
  # Results of an earlier run are no sources, unless `out` itself is given.
  if out and base.resolve() in (target := out.resolve()).parents:
    there = [x for x in there if not x.resolve().is_relative_to(target)]
  # A link to nothing is a source: reading fails with its name.
  read = {
    x
    for x in there
    if x.suffix.lower() in SUFFIXES and (os.path.isfile(x) or x.is_symlink())
  }
  # For networks of bands; beside pictures, arrays are rather something else.
  read = read or {x for x in there if x.suffix.lower() == ARRAY}
  if (others := [x for x in there if x not in read]) and base == path:
    tell(f'left out of {path}: {endings(others)}')
  if not read and base != path:
    raise UserError(
      f'the pattern {str(one)!r} matches no picture or video; {_ACCEPTED}'
    )
  return [Source(x, x.parent.relative_to(base)) for x in there if x in read]


def _check_folders(base: Path, pattern: Path) -> None:
  """Raises `UserError` if a folder below `base` cannot be searched."""
  # `glob` takes a folder that it may not read for an empty one.
  for parent in pattern.parents:
    for folder in glob.glob(str(parent), root_dir=base, recursive=True):
      if os.path.isdir(base / folder):
        walk(base / folder, deep=False)


def with_files(
  sources: Sequence[Source],
  save: Collection[str] | None = None,
  polygons: str | None = None,
  in_parts: bool = False,
) -> list[Source]:
  """The sources with the names of their files.

  `save` are some of `KINDS`, and 'confidence'; None: all of `KINDS`, for videos
  without masks. With `polygons` 'labelme' is one more; 'coco' is a single file,
  coco.json. TIFF files that are read `in_parts` have masks alone.
  """
  stems = [source.folder / source.path.stem for source in sources]
  # The masks of day.mp4 fill a folder `day`, which may be a folder of sources.
  folders = {parent for stem in stems for parent in stem.parents}
  named = []
  for source, stem in zip(sources, stems, strict=True):
    # street.jpg becomes street.png, but street.jpg.png beside a street.png.
    if stems.count(stem) > 1 or (source.is_video and stem in folders):
      stem = source.folder / source.path.name
    ending = '.mp4' if source.is_video else '.png'
    of_kind = {
      'masks': stem if source.is_video else stem.with_name(f'{stem.name}.png'),
      'colors': stem.with_name(f'{stem.name}_color{ending}'),
      'overlays': stem.with_name(f'{stem.name}_overlay{ending}'),
      'confidence': stem.with_name(f'{stem.name}_confidence.png'),
      'labelme': stem.with_name(f'{stem.name}.json'),
    }
    # An hour of video has a hundred thousand masks: only on demand.
    kinds = KINDS[source.is_video :] if save is None else save
    if is_large := in_parts and source.path.suffix.lower() in TIFF_SUFFIXES:
      of_kind = {'masks': stem.with_name(f'{stem.name}.tif')}
      if polygons or 'confidence' in kinds or 'masks' not in kinds:
        raise UserError(
          f'{source.path} is read in parts and becomes a TIFF file of class '
          'numbers with their colours: --save masks is all there is of it.'
        )
    wanted = {*kinds, polygons}
    files = {kind: file for kind, file in of_kind.items() if kind in wanted}
    named.append(dataclasses.replace(source, files=files, is_large=is_large))
  return named


def part_of(target: Path) -> Path:
  """Where the finished rows of a large label map wait for the others."""
  return target.with_name(f'{target.name}.part')


def check_names(sources: Sequence[Source], polygons: str | None = None) -> None:
  """Raises `UserError` for what videos lack, and two sources of one file."""
  videos = [x for x in sources if x.is_video]
  if videos and (polygons or 'confidence' in videos[0].files):
    raise UserError(
      f'--{"polygons" if polygons else "confidence"} is for pictures, and '
      f'{videos[0].path} is a video. Leave it out, or give single frames.'
    )
  taken = {x: x for x in map(Path, ('classes.json', 'predictions.json'))}
  for source in sources:
    # Still possible: a.jpg of two folders, b_overlay.jpg beside b.jpg.
    for file in source.files.values():
      other = taken.setdefault(file, source.path)
      if other is not source.path:
        raise UserError(
          f'{other} and {source.path} would both be written to {file}. Predict '
          'them in two commands, each with its own --out, or rename one.'
        )


def check_output(out: Path, sources: Sequence[Source], overwrite: bool) -> None:
  """Refuses an output folder in which files would be lost, by `UserError`.

  That is a file, the folder of the sources, one that leads elsewhere by links,
  or without `overwrite` one that is not empty and has no rows to resume from.
  """
  if out.exists() and not out.is_dir():
    raise UserError(f'--out {out} is a file; give a folder.')
  paths = [out / file for source in sources for file in source.files.values()]
  # One file of each folder stands for all.
  for path in {path.parent: path for path in paths}.values():
    inside(out, path.relative_to(out))
  # Even with --overwrite: a source, or a folder of them that masks would fill.
  # Links are replaced and not followed.
  written = {path.parent.resolve() / path.name for path in paths}
  for source in sources:
    path = source.path.resolve()
    if path.parent == out.resolve() or written & {path, *path.parents}:
      raise UserError(
        f'--out {out} is the folder of the pictures, and {source.path} could '
        'be overwritten; give another folder.'
      )
  clean(out)
  large = [out / x.files['masks'] for x in sources if x.is_large]
  resumes = any(part_of(target).exists() for target in large)
  if out.exists() and any(out.iterdir()) and not (overwrite or resumes):
    raise UserError(
      f'{out} is not empty; add --overwrite to write into it anyway '
      '(only files of the same names are replaced), or give another --out.'
    )
