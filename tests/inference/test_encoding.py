"""PyTorch-Encoding's protocol against its outputs and the plain way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import plain
from golden import reference
from lengths import others_long

from resnest_jax.errors import UserError
from resnest_jax.inference import label_maps, protocols, steps
from resnest_jax.inference.protocols import Protocol, choose_protocol

GOLDENS = ['multi', 'multi_gain', 'multi_s26_noflip']


def protocol_of(golden):
  crop = 2 * (int(golden['crop_size']),)
  return Protocol(
    'encoding',
    image_scale=2 * (int(golden['base_size']),),
    crop=crop,
    stride=protocols.default_stride(crop),
    scales=tuple(golden['scales'].tolist()),
    flip=bool(golden['flip']),
  )


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('name', others_long(GOLDENS, GOLDENS[1]))
def test_labels_and_scores_are_the_authors(name):
  golden = reference.load(f'encoding_infer_{name}')
  model, variables = reference.encoding(golden, aux_channels=None)
  classifier = variables['params']['decode_head']['classifier']['conv_seg']
  classifier['kernel'] = classifier['kernel'] * golden['gain']
  options = protocol_of(golden), None, jnp.float64, lambda height, width: None
  views = steps.compile_views(model, len(golden['score_sub']), *options)
  image = golden['image']
  batch = {'image': image[None], 'index': np.zeros(1, np.int32)}
  batch['size'] = np.array([image.shape[:2]])
  layout, arrays = views.look(variables, batch)

  @jax.jit
  def finish(arrays, size):
    scales = views.build(layout, arrays, size, image.shape[:2])
    maps = label_maps.label_maps(scales, size, tile_bytes=2**22)
    each = [label_maps.probabilities([scale]) for scale in scales]
    return maps, label_maps.probabilities(scales), each

  maps, scores, each = finish(arrays, batch['size'])
  np.testing.assert_array_equal(maps[0], golden['pred'])
  # Ours have a sum of 1 in each pixel.
  pairs = [(scores, golden['score_sub'], 7)]
  pairs += [
    (x, y, 14) for x, y in zip(each, golden['scale_score_sub'], strict=True)
  ]
  for ours, theirs, step in pairs:
    ours = np.asarray(ours)[0, ::step, :, ::step].swapaxes(0, 1)
    np.testing.assert_allclose(ours, theirs / theirs.sum(0), rtol=1e-10)


@pytest.mark.parametrize('gain', [1.0, 300.0])
def test_float32_overflows_nowhere_and_loses_no_class(gain):
  # Logits are up to five times the gain.
  sizes = [(60, 90), (33, 96), (64, 30), (1, 1)]
  batch = plain.batch_of(sizes, sizes, 2 * [(64, 96)])
  protocol = Protocol(
    'encoding', (48, 48), (40, 40), (26, 26), (0.5, 1.0, 1.75)
  )
  model = plain.upsampler(align_corners=True)
  step = steps.make_predict_step(model, plain.CLASSES, protocol=protocol)
  variables = {'kernel': gain * plain.VARIABLES['kernel']}
  maps, shares = map(np.asarray, step(variables, batch, True))
  for slot, (height, width) in enumerate(sizes):
    image, classes, found = (
      x[slot, :height, :width] for x in (batch['image'], maps, shares)
    )
    expected = plain.encoding_scores(image, protocol, plain.aligned, gain)
    expected /= expected.sum(-1, keepdims=True)
    # Logits of a thousand have an error of 1e-4.
    np.testing.assert_allclose(found, np.float64(expected), 0, 2e-5 * gain)
    # Other labels are ties.
    theirs = np.take_along_axis(expected, classes[..., None].astype(int), -1)
    assert (theirs[..., 0] > (1 - 2e-5 * gain) * expected.max(-1)).all()
    assert np.mean(classes != expected.argmax(-1)) < 1e-3


def test_what_it_cannot_scale_or_cut_is_refused():
  square = {'image_scale': (64, 64), 'crop': (48, 48)}
  for given, told in (
    ({'image_scale': (64, 48)}, r'image_scale is \(64, 48\) and slide_crop'),
    ({'slide_crop': (40, 48)}, r'slide_crop \(40, 48\) .* equal numbers'),
    ({'slide_stride': (32, 49)}, r'stride \(32, 49\) is longer than the win'),
  ):
    with pytest.raises(UserError, match=told):
      choose_protocol('encoding', **square, given=given)
  # A training's that are not square give way to the authors'.
  found = choose_protocol('encoding', image_scale=(9, 8), crop=(7, 6), given={})
  assert found.describe() == {
    'name': 'encoding',
    'image_scale': [520, 520],
    'crop': [480, 480],
    'stride': [320, 320],
    'scales': [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
    'flip': True,
  }
