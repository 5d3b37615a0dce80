"""Runs on images of other bands than RGB, from the first step to exports."""

import json

import jax
import numpy as np
import pytest
import tifffile
from data.fields import BANDS, write_fields
from data.refusals import refused
from small import RUN

from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_splits
from resnest_jax.data.own.classes import label_set
from resnest_jax.data.preprocess import Normalization, preprocess
from resnest_jax.evaluation.evaluate_split import evaluate_split
from resnest_jax.export.folder import export_model
from resnest_jax.inference.predictor import Predictor, from_checkpoint
from resnest_jax.inference.protocols import Protocol
from resnest_jax.models.classifier import create_network
from resnest_jax.models.initial import initial_variables
from resnest_jax.training.loop import of_bands, train
from resnest_jax.weights.convert import main as convert
from resnest_jax.weights.files import write_weights
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import (
  NORMALIZATION,
  Weights,
  load_weights,
)
from resnest_jax.weights.start import start_variables
from resnest_jax.weights.state_dict import export_state_dict

SMALL = RUN | {'model.head': 'fcn', 'model.radix': 1, 'data.photometric': False}
SIZE = 128
SMALL |= {'data.image_scale': (SIZE, SIZE), 'data.crop_size': (SIZE, SIZE)}
SMALL |= {'data.scale_range': (1.0, 1.0), 'train.batch_size': 8}
SMALL |= {'eval.bucket': 16, 'eval.overlays': 1, 'eval.report_images': 1}
COLOURS = BANDS[1:]


def config_of(**changes):
  given = SMALL | {'model.num_classes': 3, **changes}
  return load_config('configs/folder.py:mini', given)


@pytest.fixture
def rgb(tmp_path):
  """Weights of an RGB network, and the network itself."""
  config = config_of()
  model = create_network(config.model)
  variables = initial_variables(model, 3)
  about = Weights(
    {}, 'ours', Description('segmentor', config.model.to_dict()),
    *(None, None, NORMALIZATION, {'source': 'drawn'}),
  ).about()  # fmt: skip
  write_weights(
    tmp_path / 'rgb', 'ours', export_state_dict(model, variables, 'ours'), about
  )
  return tmp_path / 'rgb', model, variables


@pytest.mark.parametrize(
  'names', [BANDS, ('blue', 'nir', 'green', 'swir', 'red')]
)
def test_the_first_logits_are_those_of_the_rgb_network(rgb, names):
  path, model, variables = rgb
  config = config_of(**{'data.bands': ','.join(names), 'pretrained': str(path)})
  wider = create_network(config.model)
  started, notes = start_variables(wider, config)
  assert notes[-1] == f'bands nir{", swir" * (len(names) - 4)} begin at zero'
  image = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), np.uint8)
  more = np.random.default_rng(1).integers(0, 256, (2, 40, 56, len(names)))
  more = more.astype(np.uint8)
  places = [names.index(x) for x in COLOURS]
  more[..., places] = image
  mean, std = np.full((2, len(names)), 77.0)
  mean[places], std[places] = NORMALIZATION['mean'], NORMALIZATION['std']
  how = Normalization(tuple(mean), tuple(std), bands=names)
  size = np.array([[40, 56], [33, 56]])

  @jax.jit
  def logits(variables, image):
    norm = how if image.shape[3] > 3 else Normalization()
    seen = preprocess(image, size, normalization=norm)
    net = wider if image.shape[3] > 3 else model
    return net.apply(variables, seen, train=False, size=size).logits

  expected, found = logits(variables, image), logits(started, more)
  assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
  kernel = started['params']['backbone']['stem_conv1']['kernel']
  assert not kernel[:, :, 3:].any()
  if names == BANDS:
    found = []
    for net, norm, picture in (
      ((model, variables), Normalization(), image[0]),
      ((wider, started), how, more[0]),
    ):
      protocol = Protocol(image_scale=(64, 64), normalization=norm)
      predictor = Predictor(*net, label_set(3, None, None), protocol)
      found.append(predictor.predict([picture])[0].labels)
    np.testing.assert_array_equal(*found)
    assert len(np.unique(found[0])) > 1


def test_bands_without_names_share_the_mean_kernel(rgb):
  path, _, variables = rgb
  config = config_of(**{'data.bands': 'a,b', 'pretrained': str(path)})
  started, notes = start_variables(create_network(config.model), config)
  ours, theirs = (
    x['params']['backbone']['stem_conv1']['kernel']
    for x in (started, variables)
  )
  np.testing.assert_allclose(ours.sum(2), theirs.sum(2), atol=1e-6)
  assert notes[-1] == 'bands a, b share the mean kernel'


def trained(root, names, steps=200):
  config = config_of(**{
    **{'data.data_dir': str(write_fields(root / 'data', names, size=SIZE))},
    **{'data.bands': ','.join(names), 'train.total_steps': steps},
    **{'train.eval_steps': steps, 'train.checkpoint_steps': steps // 2},
  })  # fmt: skip
  train(config, root / 'run')
  evaluate_split(config, workdir=root / 'run', out=root / 'eval')
  found = json.loads((root / 'eval' / 'metrics.json').read_text())
  return config, np.mean([x['IoU'] for x in found['per_class'][1:]])


@pytest.mark.long
def test_a_band_separates_what_colours_do_not(tmp_path, capsys):
  _, without = trained(tmp_path / 'rgb', COLOURS)
  config, score = trained(tmp_path, BANDS)
  assert without < 0.6
  assert score > 0.9
  assert 'bands (uint16): nir ' in capsys.readouterr().out
  run, scene = tmp_path / 'run', tmp_path / 'data/images/val/9.tif'
  weights = load_weights(run)
  assert weights.normalization['bands'] == [*BANDS]
  # The numbers are those of the run, whatever the data is by now.
  for path in (tmp_path / 'data/images/train').iterdir():
    tifffile.imwrite(path, tifffile.imread(path) // 2)
  kept = of_bands(config, open_splits(config), run)
  assert kept == weights.normalized()
  predicted = from_checkpoint(run).predict(scene)
  assert predicted.overlay().shape == (SIZE, SIZE, 3)
  assert len(np.unique(predicted.labels)) == 3
  refused(
    'takes uint16', from_checkpoint(run).predict, np.zeros((9, 9, 4), 'u1')
  )
  convert([str(run), '--out', str(tmp_path / 'kept')])
  array = tifffile.imread(scene)
  for again in from_checkpoint(tmp_path / 'kept').predict([array, scene]):
    np.testing.assert_array_equal(again.labels, predicted.labels)
  formats = ('stablehlo', 'onnx', 'safetensors')
  exports = export_model(
    run, tmp_path / 'out', formats=formats, sizes=[(48, 48)]
  )
  assert min(x.agreement for x in exports) > 0.999
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert 'uint16 (b, H, W, 4)' in card
  assert card.count("np.load('scene.npy')") == 2
  flags = {
    'data.bands': ','.join(COLOURS),
    'data.data_dir': config.data.data_dir,
  }
  refused('Add --config.data.bands=nir,red', evaluate_split, config_of(**flags),
          weights=str(tmp_path / 'kept'), out=tmp_path / 'x')  # fmt: skip
