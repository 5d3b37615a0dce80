"""Label maps of pictures: from weights and files to PNG files."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from resnest_jax.data.classes import label_set
from resnest_jax.data.images import decode_image
from resnest_jax.data.labels import IGNORE, LabelSet
from resnest_jax.data.pairing import IMAGE_SUFFIXES as SUFFIXES
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.evaluation import inference, visualize
from resnest_jax.evaluation.progress import compile_notice, evaluation_progress
from resnest_jax.training import sharding
from resnest_jax.weights.pretrained import load_segmentor

# (long edge, short edge) in pixels, to which pictures are resized where the
# weights do not say: the protocols of ADE20K and Cityscapes, by their number
# of classes.
IMAGE_SCALES = {150: (2048, 512), 19: (2048, 1024)}
# Padded heights and widths are multiples of this many pixels.
BUCKET = 64


class Pictures:
  """Image files as the evaluation pipeline reads them, without labels.

  All become 8-bit RGB, turned upright where their EXIF data says so: of 16 bits
  the upper eight are taken, transparency is left out.

  Attributes:
    unreadable: index -> why this file could not be read.
  """

  def __init__(self, paths: Sequence[Path]):
    self.paths = paths
    self.unreadable: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = self.paths[index]
    try:
      image = read_picture(path)
    except UserError as error:
      self.unreadable[index] = str(error)
      raise
    label = np.full(image.shape[:2], IGNORE, np.uint8)
    return {'image': image, 'label': label, 'name': path.name}


def read_picture(path: Path) -> np.ndarray:
  """A picture as uint8 (H, W, 3) RGB.

  Raises:
    UnreadableSample: it cannot be read.
  """
  try:
    image = decode_image(path.read_bytes(), cv2.IMREAD_COLOR_RGB)
  except OSError as error:
    raise UnreadableSample(f'{path}: {error.strerror}') from error
  except cv2.error as error:
    raise UnreadableSample(
      f'{path}: OpenCV cannot decode it ({error.err}); it is larger than '
      'OpenCV allows, or damaged'
    ) from error
  if image is None:
    raise UnreadableSample(
      f'{path} cannot be read as a picture: it is damaged, cut off or none; '
      f'accepted are {", ".join(SUFFIXES)} of 8 or 16 bits'
    )
  return image


def find_pictures(sources: Sequence[Path]) -> list[Path]:
  """The files that are meant, each once: themselves, or those of a folder.

  Raises:
    UserError: there is no such file, or no picture at all.
  """
  paths = []
  for source in sources:
    if source.is_dir():
      inside = sorted(source.iterdir())
      paths += [path for path in inside if path.suffix.lower() in SUFFIXES]
    elif source.is_file():
      paths.append(source)
    else:
      raise UserError(f'there is no picture or folder {source}.')
  if not paths:
    raise UserError(
      f'there is no picture in {", ".join(map(str, sources))}; accepted are '
      f'{", ".join(SUFFIXES)}.'
    )
  return list({path.resolve(): path for path in paths}.values())


def output_names(paths: Sequence[Path]) -> list[str]:
  """What the files of each picture are called in the output folder.

  'street' for street.jpg, but 'street.jpg' where there is a street.png too.

  Raises:
    UserError: two would be written to the same file.
  """
  stems = [path.stem for path in paths]
  names = [
    path.name if stems.count(path.stem) > 1 else path.stem for path in paths
  ]
  taken: dict[str, Path] = {}
  for path, name in zip(paths, names, strict=True):
    for file in output_files(name):
      other = taken.setdefault(file, path)
      if other is not path:
        raise UserError(
          f'{other} and {path} would both be written to {file}. Predict them '
          'in two commands, each with its own --out, or rename one.'
        )
  return names


def output_files(name: str) -> tuple[str, str]:
  """The label map and the overlay of the picture with this output name."""
  return f'{name}.png', f'{name}_overlay.png'


def check_output(out: Path, paths: Sequence[Path], overwrite: bool) -> None:
  """Refuses a folder in which something would be lost.

  Raises:
    UserError: it is a file, has the pictures themselves, or is not empty.
  """
  if out.exists() and not out.is_dir():
    raise UserError(f'--out {out} is a file; give a folder.')
  if any(path.resolve().parent == out.resolve() for path in paths):
    raise UserError(
      f'--out {out} is the folder of the pictures, which could be overwritten; '
      'give another.'
    )
  if out.exists() and any(out.iterdir()) and not overwrite:
    raise UserError(
      f'{out} is not empty; add --overwrite to write into it all the same '
      '(only files of the same names are replaced), or give another --out.'
    )


def load_model(
  source: str, which: str
) -> tuple[nn.Module, Any, LabelSet, tuple[int, int]]:
  """The network, its variables, its labels, and the size for its pictures.

  Args:
    source: the workdir of a training, a published name, a path, an address.
    which: checkpoint of a workdir: 'latest', 'best' or a step.
  """
  model, variables, weights = load_segmentor(source, which)
  number = weights.description.config['num_classes']
  labels = label_set(number, weights.classes, weights.palette)
  scale = weights.image_scale or IMAGE_SCALES.get(number, (2048, 512))
  return model, variables, labels, tuple(scale)


def predict_pictures(
  sources: Sequence[Path],
  weights: str,
  out: Path,
  *,
  checkpoint: str = 'latest',
  image_scale: tuple[int, int] | None = None,
  batch_size: int = 1,
  overwrite: bool = False,
) -> None:
  """Writes NAME.png and NAME_overlay.png for each picture, and classes.json.

  Args:
    sources: files and folders.
    weights: see `load_model`.
    out: folder; made if needed.
    checkpoint: see `load_model`.
    image_scale: (long edge, short edge) in pixels that pictures are resized to
      fit into; None: the training's.
    batch_size: pictures at a time, over all devices.
    overwrite: `out` may hold files already.

  Raises:
    UserError: nothing can be done, or, after all others, some pictures could
      not be read; the message lists them.
  """
  # What it warns of is said in our words.
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
  paths = find_pictures(sources)
  names = output_names(paths)
  check_output(out, paths, overwrite)
  model, variables, labels, scale = load_model(weights, checkpoint)

  mesh = sharding.make_mesh()
  pictures = Pictures(paths)
  batches = make_eval_iterator(
    ConfigDict({'image_scale': tuple(image_scale or scale), 'num_threads': 0}),
    pictures,
    batch_size=inference.divisible_batch_size(batch_size, mesh),
    bucket=BUCKET,
    skip_unreadable=True,
  )
  done = 0
  with contextlib.closing(batches), evaluation_progress() as progress:
    task = progress.add_task('predict', total=len(paths))
    eval_step = inference.make_eval_step(
      model,
      len(labels.classes),
      mesh=mesh,
      on_compile=compile_notice(progress),
    )
    for result in inference.image_results(eval_step, variables, batches):
      image = read_picture(paths[result.index])
      overlay = visualize.overlay(image, result.prediction, labels.palette)
      map_file, overlay_file = output_files(names[result.index])
      try:
        if not done:
          write_classes(out, labels)
        visualize.write_image(out / map_file, result.prediction)
        visualize.write_image(out / overlay_file, overlay)
      except OSError as error:
        raise UserError(
          f'cannot write to {out} ({error}). Make sure that there is space and '
          'that you may write there, or give another --out.'
        ) from error
      done += 1
      progress.advance(task)
  if done:
    print(f'{done} predictions in {out}', flush=True)
  if pictures.unreadable:
    reasons = '\n'.join(
      f'  {why}' for _, why in sorted(pictures.unreadable.items())
    )
    raise UserError(
      f'{len(pictures.unreadable)} of {len(paths)} pictures could not be read; '
      f'repair them or leave them out:\n{reasons}'
    )


def write_classes(out: Path, labels: LabelSet) -> None:
  """Makes the folder with classes.json, the meaning of the label maps."""
  out.mkdir(parents=True, exist_ok=True)
  listed = {'classes': labels.classes, 'palette': labels.palette.tolist()}
  (out / 'classes.json').write_text(json.dumps(listed), 'utf-8')
