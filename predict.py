"""Predicts a class for every pixel of pictures.

    python predict.py --weights ade20k_pspnet --out predictions street.jpg

--weights is a published name, a file, an address (see docs/weights.md) or the
workdir of a training. For each picture --out gets NAME.png, 8-bit with the
class numbers of the label list, NAME_overlay.png with their colours, and
classes.json with the list.
"""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ml_collections import ConfigDict

import resnest_jax as rj
from resnest_jax import runtime
from resnest_jax.data.classes import label_set
from resnest_jax.data.images import decode_image
from resnest_jax.data.labels import IGNORE, LabelSet
from resnest_jax.data.pairing import IMAGE_SUFFIXES as SUFFIXES
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UserError, run
from resnest_jax.evaluation import inference, visualize
from resnest_jax.training import checkpoints, sharding
from resnest_jax.weights.pretrained import load_segmentor

# (long edge, short edge) in pixels, to which pictures are resized where the
# weights do not say: the protocols of ADE20K and Cityscapes, by their number
# of classes.
IMAGE_SCALES = {150: (2048, 512), 19: (2048, 1024)}


class Pictures:
  """Image files as the evaluation pipeline reads them, without labels."""

  def __init__(self, paths: list[Path]):
    self.paths = paths

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = self.paths[index]
    image = decode_image(path.read_bytes(), cv2.IMREAD_COLOR_RGB)
    if image is None:
      raise UserError(
        f'{path} cannot be read as a picture: it is damaged, cut off or none; '
        f'accepted are {", ".join(SUFFIXES)}. Leave it out or repair it.'
      )
    label = np.full(image.shape[:2], IGNORE, np.uint8)
    return {'image': image, 'label': label, 'name': path.name}


def find_pictures(sources: list[Path]) -> list[Path]:
  """The files that are meant: themselves, or all pictures of a folder."""
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
    raise UserError(f'there is no picture in {", ".join(map(str, sources))}.')
  names = [path.stem for path in paths]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(
      f'{len(twice)} names come twice, the first is {twice[0]}; predict their '
      'folders one by one, each with its own --out.'
    )
  return paths


def load_model(
  source: str, which: str
) -> tuple[Any, Any, LabelSet, tuple[int, int]]:
  """The network, its variables, its labels, and the size for its pictures."""
  if checkpoints.checkpoint_dir(Path(source)).is_dir():
    model, variables, about = rj.load_checkpoint(Path(source), which)
    number = about['config']['model']['num_classes']
    # Older checkpoints have no colours.
    labels = label_set(number, about['classes'], about.get('palette'))
    return model, variables, labels, about['config']['data']['image_scale']
  model, variables, weights = load_segmentor(source)
  number = weights.description.config['num_classes']
  labels = label_set(number, weights.classes, weights.palette)
  return model, variables, labels, IMAGE_SCALES.get(number, (2048, 512))


def main() -> None:
  """Reads the command line, predicts, writes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('pictures', nargs='+', type=Path, help='files, folders')
  parser.add_argument('--weights', required=True, help='or a workdir')
  parser.add_argument('--out', required=True, type=Path, metavar='DIR')
  parser.add_argument(
    '--checkpoint', default='latest', help='of a workdir: latest, best, a step'
  )
  parser.add_argument(
    '--image_scale',
    nargs=2,
    type=int,
    metavar=('LONG', 'SHORT'),
    help="pixels to fit the edges into; default: the training's",
  )
  parser.add_argument('--batch_size', type=int, default=1)
  parser.add_argument(
    '--overwrite', action='store_true', help='replace what is in --out'
  )
  flags = parser.parse_args()
  runtime.set_up()

  paths = find_pictures(flags.pictures)
  model, variables, labels, scale = load_model(flags.weights, flags.checkpoint)
  scale = flags.image_scale or scale
  if flags.out.exists() and any(flags.out.iterdir()) and not flags.overwrite:
    raise UserError(f'{flags.out} is not empty; add --overwrite to replace.')

  mesh = sharding.make_mesh()
  eval_step = inference.make_eval_step(model, len(labels.classes), mesh=mesh)
  batches = make_eval_iterator(
    ConfigDict({'image_scale': tuple(scale), 'num_threads': 0}),
    Pictures(paths),
    batch_size=inference.divisible_batch_size(flags.batch_size, mesh),
    bucket=64,
  )
  flags.out.mkdir(parents=True, exist_ok=True)
  listed = {'classes': labels.classes, 'palette': labels.palette.tolist()}
  (flags.out / 'classes.json').write_text(json.dumps(listed), 'utf-8')
  with contextlib.closing(batches), inference.evaluation_progress() as bar:
    task = bar.add_task('predict', total=len(paths))
    for result in inference.image_results(eval_step, variables, batches):
      path = paths[result.index]
      image = Pictures(paths)[result.index]['image']
      picture = visualize.overlay(image, result.prediction, labels.palette)
      cv2.imwrite(str(flags.out / f'{path.stem}.png'), result.prediction)
      visualize.write_image(flags.out / f'{path.stem}_overlay.png', picture)
      bar.advance(task)
  print(f'{len(paths)} predictions in {flags.out}')


if __name__ == '__main__':
  run(main)
