"""A tiny classifier: its weights, and a run's folder as training leaves it."""

import functools
import types

import cv2
import jax
import numpy as np
from evaluation.drawn import smooth_picture
from evaluation.runs import save_run
from golden.reference import variables_of

from resnest_jax.config import load_config
from resnest_jax.data.preprocess import MEAN, STD
from resnest_jax.labels import class_names
from resnest_jax.models.classifier import create_network, described
from resnest_jax.weights import files, infer, pretrained
from resnest_jax.weights.state_dict import export_state_dict

NAMES = ['ant', 'bee | wasp', 'cat', 'dog', 'elk', 'fox']
ROW = 'configs/classify_folder.py'
STEP, EDGE = 3, 48
OVERRIDES = {
  **{'model.width': 8, 'model.stem_width': 8},
  **{'model.stage_sizes': (1, 1, 1, 1), 'data.image_scale': (EDGE, EDGE)},
  **{'data.crop_size': (32, 32), 'eval.batch_size': 4, 'pretrained': ''},
  **{'eval.report_images': 3},
}


def mean_colour(variables, images, train):
  # Stands in for a network: logits are the mean colour's.
  assert train is False
  return images.mean((1, 2)) @ variables['kernel']


COLOURS = types.SimpleNamespace(apply=mean_colour)
LAYER = {
  'kernel': np.random.default_rng(3).standard_normal((3, len(NAMES)), 'f4')
}


class Split(list):
  labels = class_names('own', NAMES)


def stand_in(number):
  # A split of pictures of random colours, none of the last class.
  rng, split = np.random.default_rng(1), Split()
  for i in range(number):
    image = np.full((40 + i, 50, 3), rng.integers(0, 256, 3), np.uint8)
    label = int(rng.integers(0, len(NAMES) - 1))
    split.append({'image': image, 'label': label, 'name': f'image_{i}'})
  return split


def config_of(data_dir):
  return load_config(ROW, OVERRIDES | {'data.data_dir': str(data_dir)})


def write_pictures(folder, number=4):
  # DATA_DIR/val/CLASS/NUMBER.png, of sizes that differ.
  for k, name in enumerate(NAMES):
    inside = folder / 'val' / name
    inside.mkdir(parents=True)
    for i in range(number - k % 2):
      picture = smooth_picture(60 + 7 * i, 90 - 9 * i, 10 * k + i)
      cv2.imwrite(f'{inside}/{i}.png', picture)
  (folder / 'train').symlink_to(folder / 'val')
  return folder


@functools.cache
def network():
  """The model, and variables by which pictures have several classes."""
  config = config_of('.').model.to_dict() | {'num_classes': len(NAMES)}
  model = create_network(config)
  variables = variables_of(model)
  layer = variables['params']['fc']
  rng = np.random.default_rng(0)
  layer['kernel'] = rng.standard_normal(layer['kernel'].shape).astype('f4')
  layer['bias'] = 0 * layer['bias']
  seen = [smooth_picture(EDGE, EDGE, 100 + i) for i in range(16)]
  logits = logits_of(model, variables, np.stack(seen))
  spread = logits.std(0).mean()
  layer['kernel'] /= spread
  layer['bias'] = -logits.mean(0) / spread
  return model, variables


def logits_of(model, variables, images):
  # uint8 (n, H, W, 3) -> (n, C).
  normalised = np.float32((images - np.array(MEAN)) / STD)
  apply = jax.jit(functools.partial(model.apply, train=False))
  return np.asarray(apply(variables, normalised))


def write_class_run(path, data_dir):
  # Gives the folder one checkpoint, of random weights; returns it.
  config = config_of(data_dir)
  config.model.num_classes = len(NAMES)
  about = {'classes': NAMES, 'palette': [], 'dilation_rule': 'official'}
  scores = {'top1': 0.5, 'top5': 0.75}
  return save_run(path, STEP, config, network()[1], about, scores)


def write_weights(path, rule='encoding'):
  # A folder of weights with a description, as convert writes it.
  model, variables = network()
  fields = config_of('.').model.to_dict() | {'num_classes': len(NAMES)}
  description = infer.Description(*described(fields))
  tensors = export_state_dict(model, variables, 'ours')
  weights = pretrained.Weights(
    *(tensors, 'ours', description, NAMES, None),
    *(pretrained.NORMALIZATION, {'source': 'made up'}),
    *([EDGE, EDGE], None, rule),
  )
  files.write_weights(path, 'ours', tensors, weights.about())
  return model, variables
