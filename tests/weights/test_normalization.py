"""The normalisation of weights is used wherever they are."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from evaluation.plain import resized
from markdown_it import MarkdownIt
from small import small_config
from weights.built import described, written

import resnest_jax as rj
from resnest_jax.data.preprocess import IMAGENET, Normalization, preprocess
from resnest_jax.evaluation.evaluate_split import load_network
from resnest_jax.export.card import model_card
from resnest_jax.export.program import make_program
from resnest_jax.inference.protocols import Protocol
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.start import start_from

OTHER = Normalization((10.5, 20, 30), (50, 100, 200.5), 'BGR')
SIZE = (48, 64)


@pytest.fixture(scope='module')
def source(segmentor, tmp_path_factory):
  """Our weights of a network that was trained with `OTHER`."""
  folder = tmp_path_factory.mktemp('weights') / 'other'
  return written(folder, segmentor, 'ours', described(OTHER.described())).parent


def test_channels_are_turned_before_the_mean_is_taken():
  image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
  found = preprocess(image, jnp.array([[2, 1]]), normalization=OTHER)
  expected = (image[..., ::-1] - np.array(OTHER.mean)) / np.array(OTHER.std)
  expected[:, :, 1:] = 0
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  same = preprocess(image, jnp.array([[2, 2]]), normalization=IMAGENET)
  np.testing.assert_array_equal(same, preprocess(image, jnp.array([[2, 2]])))


def test_prediction_and_export_use_it(source, segmentor):
  model, variables = segmentor
  image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)

  def labels_by(normalization):
    mean, std, order, *_ = normalization
    x = image[..., ::-1] if order == 'BGR' else image
    x = (x - np.float32(mean)) / np.float32(std)
    logits = model.apply(variables, x[None], train=False).logits
    return resized(np.asarray(logits)[0], SIZE).argmax(-1)

  expected = labels_by(OTHER)
  assert (labels_by(IMAGENET) != expected).mean() > 0.02
  found = rj.from_checkpoint(source).predict(image).labels
  assert (found == expected).mean() >= 0.999
  normalization = load_weights(source).normalized()
  program = make_program(model, variables, SIZE, normalization=normalization)
  assert (np.asarray(program(image[None])[0][0]) == expected).mean() >= 0.999


def test_evaluation_and_training_are_told(source, segmentor):
  config = small_config(**{'model.num_classes': 7})
  console = rich.console.Console(quiet=True)
  found = load_network(config, None, str(source), 'latest', console)
  assert found[3] == OTHER
  told = Protocol(normalization=OTHER).describe()
  assert (told['mean'], told['order']) == ([10.5, 20, 30], 'BGR')
  assert Protocol().describe().keys() == {'name', 'image_scale'}
  _, notes = start_from(*segmentor, str(source))
  assert notes[1].startswith('its images were normalised by BGR mean (10.5, 20')


def test_card_shows_names_of_any_text_as_they_are(source):
  names = [
    *('a|b', '<img src=x onerror=alert(1)>', 'line\nbreak\r\n| 9 | row |'),
    *('[link](http://x)', '`code` **bold** _it_', 'back\\slash'),
    '&amp; \u202egnp ~~no~~ $x$',
  ]
  about = load_weights(source).about()
  about |= {'classes': names, 'palette': [[0, 0, 0]] * 7}
  about['provenance'] = {'config': '<script>', 'source': 'a\n# heading'}
  card = model_card(about, [])
  # Rich brings this reader along.
  reader = MarkdownIt('commonmark').enable(['table', 'strikethrough'])
  html = reader.render(card.partition('## Classes')[2])
  assert not re.search(r'<(img|a|code|strong|em|script|h1|del)\b', html)
  assert html.count('<tr>') == 1 + len(names)
  cells = [x.partition('</td>')[0] for x in html.split('<td>')[2::3]]
  assert cells == [
    *('a|b', '&lt;img src=x onerror=alert(1)&gt;', 'line break  | 9 | row |'),
    *names[3:6],
    '&amp;amp;  gnp ~~no~~ $x$',
  ]
