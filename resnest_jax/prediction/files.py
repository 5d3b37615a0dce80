"""Predicts files and writes the results: the body of predict.py."""

import collections
import contextlib
import dataclasses
import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress

from resnest_jax import drawing, runtime
from resnest_jax.data.pictures import unused
from resnest_jax.errors import UserError
from resnest_jax.files import (
  check_writable,
  explain_refusal,
  remove,
  write_json,
)
from resnest_jax.inference.predictions import (
  ClassPrediction,
  Prediction,
  check_opacity,
  said_of,
)
from resnest_jax.inference.predictor import (
  ClassPredictor,
  Predictor,
  from_checkpoint,
  print_notes,
)
from resnest_jax.inference.steps import LARGEST
from resnest_jax.prediction.large import predict_large
from resnest_jax.prediction.polygons import regions, write_coco, write_labelme
from resnest_jax.prediction.sources import (
  KINDS,
  Source,
  check_names,
  check_output,
  find_sources,
  part_of,
  with_files,
)
from resnest_jax.prediction.video import VideoReader, drawn, video_outputs
from resnest_jax.progress import compile_notice, evaluation_progress
from resnest_jax.text import plural
from resnest_jax.threads import map_in_threads

SAID = 20  # Pictures at most whose classes are printed.
# Where one file is refused for these, all further ones are.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclasses.dataclass
class Done:
  """Results so far, by source."""

  out: Path
  progress: rich.progress.Progress
  # Entry in predictions.json of each that is done, wholly or partly.
  entries: dict[Path, dict[str, Any]] = dataclasses.field(default_factory=dict)
  # Reason for each source that is not done, or only partly.
  failed: dict[Path, str] = dataclasses.field(default_factory=dict)
  # Pictures by what is said of parts that are not used.
  left_out: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  seconds: float = 0.0  # With compilation.

  def add(self, source: Source, **more: Any) -> None:
    names = {kind: file.as_posix() for kind, file in source.files.items()}
    self.entries[source.path] = {'source': str(source.path), **names, **more}

  def check(self, total: int) -> None:
    """Raises `UserError` with all reasons if one of `total` sources failed."""
    if self.failed:
      reasons = ''.join(f'\n  {why}' for why in self.failed.values())
      raise UserError(
        f'{len(self.failed)} of {total} could not be read or written; repair '
        f'them or leave them out:{reasons}'
      )

  @contextlib.contextmanager
  def noting(self, path: Path) -> Iterator[None]:
    """Notes why a source has no result; a full disk ends the work."""
    try:
      yield
    # Also of an overlay: it reads its picture again, which may be gone.
    except UserError as error:
      why = ' '.join(str(error).splitlines())
      # A frame of a video does not know where it is from.
      self.failed[path] = why if str(path) in why else f'{path}: {why}'
    except OSError as error:
      if error.errno in _DISK:
        raise
      self.failed[path] = f'the results of {path} cannot be written: {error}'


def predict_files(
  given: Sequence[str | Path],
  weights: str,
  out: Path,
  *,
  recursive: bool = False,
  save: Sequence[str] | None = None,
  opacity: float = 0.5,
  legend: bool = False,
  overwrite: bool = False,
  polygons: str | None = None,
  confidence: bool = False,
  **options: Any,
) -> None:
  """Predicts pictures and videos and writes the results with two JSON files.

  `given` and `recursive` are of `find_sources`, `save` and `polygons` of
  `with_files`, `weights` and `options` of `from_checkpoint`. The colours of
  overlays have an `opacity` from 0 to 1, and with `legend` those of pictures
  name the classes; `confidence` adds how probable those are. The folder `out`
  may hold files with `overwrite`.

  Raises `UserError` for an invalid argument, what a classifier does not give,
  or, at the end, sources that are unreadable.
  """
  # Before the weights, which take seconds to load, or have to be fetched.
  check_opacity(opacity)
  found = find_sources(given, recursive, out)
  own_size = not any(options.get('image_scale') or [1])
  in_parts = own_size and options.get('protocol') == 'slide'
  kinds = [*(save or KINDS), 'confidence'] if confidence else save
  sources = with_files(found, kinds, polygons, in_parts)
  check_output(out, sources, overwrite)
  check_writable(out)
  predictor = from_checkpoint(weights, **options)
  if isinstance(predictor, ClassPredictor):
    flags = {'save': save, 'polygons': polygons, 'confidence': confidence}
    flags |= {'legend': legend, 'opacity': opacity != 0.5}
    refuse_for_classes(sources, flags)
    sources = found
  else:
    check_names(sources, polygons)
  print_notes(predictor)
  progress, started = evaluation_progress(), time.perf_counter()
  done = Done(out, progress)
  try:
    with explain_refusal(f'to {out}'), progress:
      predictor.on_compile = compile_notice(progress)
      # All pictures at once: similar sizes share a batch and a compiled shape.
      if pictures := [x for x in sources if not (x.is_video or x.is_large)]:
        predict_pictures(predictor, pictures, done, opacity, legend, polygons)
      for source in (x for x in sources if x.is_video):
        predict_video(predictor, source, done, opacity)
      large = [x for x in sources if x.is_large]
      predict_large_ones(predictor, large, done, overwrite)
    print_classes(done)
  finally:
    # After Ctrl-C or an error as well: files that are written are described.
    done.seconds = time.perf_counter() - started
    if done.entries:
      # Raised here, it would hide the error that ends the work.
      try:
        write_about(predictor, done)
      except OSError as error:
        done.failed[out] = f'{out} has no description: {error}'
      print(summary(done), flush=True)
  done.check(len(sources))


def refuse_for_classes(
  sources: Sequence[Source], flags: Mapping[str, Any]
) -> None:
  """Raises `UserError` for what means nothing to a classifier."""
  if given := [name for name, value in flags.items() if value]:
    raise UserError(
      f'--{given[0]} is for segmentors, which draw label maps; these weights '
      'are a classifier. Leave it out.'
    )
  if videos := [source.path for source in sources if source.is_video]:
    raise UserError(
      f'a classifier gives pictures a class, and {videos[0]} is a video. Give '
      'pictures, or single frames of it.'
    )


def print_classes(done: Done) -> None:
  found = [x for x in done.entries.values() if 'best' in x]
  for entry in found[:SAID]:
    best = said_of([x.values() for x in entry['best']])
    print(f'{entry["source"]}: {best}', flush=True)
  if len(found) > SAID:
    print(f'and {len(found) - SAID} more', flush=True)


def predict_pictures(
  predictor: Predictor,
  pictures: Sequence[Source],
  done: Done,
  opacity: float,
  legend: bool,
  polygons: str | None,
) -> None:
  """Predicts pictures and writes their files, a few at a time, in threads."""
  found = {}  # For COCO's file: by the place of the picture.
  confidence = 'confidence' in pictures[0].files

  def write(predicted: tuple[int, Prediction | UserError]) -> None:
    index, prediction = predicted
    source = pictures[index]
    with done.noting(source.path):
      if isinstance(prediction, UserError):
        raise prediction
      more = {}
      if isinstance(prediction, ClassPrediction):
        best = [{'class': x, 'probability': y} for x, y in prediction.top()]
        more = {'best': best}
      elif confidence:
        mean = prediction.probabilities.mean(dtype=np.float64)
        more = {'mean_confidence': round(float(mean), 4)}
      for kind, file in source.files.items():
        if kind == 'labelme':
          write_labelme(prediction, source.path, done.out / file)
        else:
          picture = drawn(prediction, kind, opacity, legend)
          drawing.write_image(done.out / file, picture)
      if polygons == 'coco':
        name = (source.folder / source.path.name).as_posix()
        found[index] = name, prediction.labels.shape, regions(prediction)
      done.add(source, **more)
      if predictor.protocol.normalization.bands:
        return  # All are used.
      # The file may be gone by now.
      with contextlib.suppress(OSError):
        encoded = source.path.read_bytes()
        done.left_out.update(unused(encoded, predictor.max_pixels))

  task = done.progress.add_task('predict', total=len(pictures))
  paths = [source.path for source in pictures]
  largest = LARGEST if polygons or confidence else False
  each = predictor.predict_each(paths, probabilities=largest)
  for _ in map_in_threads(write, each, ahead=2):
    done.progress.advance(task)
  if found:
    in_order = [found[index] for index in sorted(found)]
    write_coco(done.out / 'coco.json', in_order, predictor.classes)
  # Pictures come by size and from threads, and are listed as given.
  done.failed = {x: done.failed[x] for x in paths if x in done.failed}
  done.entries = {x: done.entries[x] for x in paths if x in done.entries}


def predict_video(
  predictor: Predictor, source: Source, done: Done, opacity: float
) -> None:
  """Predicts a video's frames and writes its files, whole or not at all."""
  path, progress = source.path, done.progress
  targets = {kind: done.out / file for kind, file in source.files.items()}
  with done.noting(path):
    with (
      contextlib.closing(VideoReader(path, predictor.max_pixels)) as reader,
      video_outputs(targets, reader.fps, opacity) as write,
    ):
      task = progress.add_task(path.name, total=reader.total, unit='frames')
      predictions = predictor.predict_frames(reader.frames())
      # A thread writes while the next frames are predicted. It is closed before
      # the outputs, to which it writes.
      with contextlib.closing(
        map_in_threads(write, predictions, num_threads=1)
      ) as writes:
        for _ in writes:
          progress.advance(task)
      if not reader.read:
        reader.check_end()
    # A truncated video is done up to its last readable frame, and failed.
    done.add(source, frames=reader.read)
    progress.update(task, total=reader.read)
    reader.check_end()


def predict_large_ones(
  predictor: Predictor, large: Sequence[Source], done: Done, overwrite: bool
) -> None:
  """Predicts pictures in parts, or resumes what a killed command has left."""
  for source in large:
    with done.noting(source.path):
      predict_large(predictor, source, done.out, done.progress, overwrite)
      done.add(source)
  # Until here the same command has nothing of a finished one to do again.
  for source in (x for x in large if x.path in done.entries):
    remove(part_of(done.out / source.files['masks']))


def summary(done: Done) -> str:
  """A sentence with the number of results, their folder and the speed."""
  counts = [x['frames'] for x in done.entries.values() if 'frames' in x]
  videos, frames = len(counts), sum(counts)
  pictures = len(done.entries) - videos
  parts = [plural(pictures, 'picture')] if pictures else []
  if videos:
    parts.append(f'{plural(videos, "video")} of {plural(frames, "frame")}')
    parts[-1] += ' in all' * (videos != 1)
  rate = (pictures + frames) / done.seconds
  said = ''.join(
    f'\n{plural(number, "picture", "have")} {what}'
    for what, number in sorted(done.left_out.items())
  )
  return (
    f'{" and ".join(parts)} predicted in {done.seconds:.1f} s ({rate:.3g} '
    f'images/s, compiling included), written to {done.out}{said}'
  )


def write_about(predictor: Predictor, done: Done) -> None:
  """Writes the meaning of the label maps, or the classes, and their origin."""
  # `own.classes` reads classes.json: label maps can become training masks.
  if palette := predictor.palette.tolist():
    classes = {'classes': predictor.classes, 'palette': palette}
    write_json(done.out / 'classes.json', classes)
  failed = [{'source': str(x), 'why': why} for x, why in done.failed.items()]
  about = {
    **predictor.about,
    'protocol': predictor.protocol.describe(),
    'temperature': predictor.temperature,
    'batch_size': predictor.batch_size,
    'versions': runtime.versions(),
    'devices': runtime.describe_devices(),
    'seconds': round(done.seconds, 3),
    'predictions': [*done.entries.values()],
    'failed': failed,
  }
  write_json(done.out / 'predictions.json', about)
