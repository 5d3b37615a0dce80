"""Windows, scales and mirrors against mmsegmentation and the plain way."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import plain
from golden import reference

from resnest_jax.config import load_config
from resnest_jax.data import device
from resnest_jax.data.resize import padded_size
from resnest_jax.evaluation import final_stage, inference, protocols, slide
from resnest_jax.evaluation.protocols import Protocol
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import import_state_dict

# Height and width: larger than a window in both directions, in one, in none.
SIZES = [(60, 90), (33, 96), (64, 30), (20, 25)]
SLIDE = Protocol('slide', crop=(40, 48), stride=(24, 31))
MULTISCALE = {
  name: Protocol(name, image_scale=(90, 50), scales=(0.5, 1.25), bucket=32)
  for name in ('ms_flip_0x', 'ms_flip_1x')
}


def golden_network(row, shape):
  """mmsegmentation's network of depth 14, compiled for one padded shape."""
  shapes = reference.manifest(f'mmseg/{row}')
  first_blocks = {  # Depth 14: one block a stage.
    name: shape
    for name, shape in shapes.items()
    if not re.search(r'layer\d\.[1-9]', name)
  }
  head = row.partition('_')[2]
  model = create_segmentor(
    reference.CONFIG | {'stage_sizes': (1, 1, 1, 1), 'head': head}
  )
  weights = import_state_dict(model, reference.filled(first_blocks))

  @reference.quick_jit
  def apply(images, size):
    images = device.preprocess(images, size, dtype=jnp.float64)
    return model.apply(weights, images, train=False, size=size).logits

  def network(_, images, size):
    canvas = images.shape[1:3]
    more = [(0, n - m) for n, m in zip(shape, canvas, strict=True)]
    logits = apply(jnp.pad(images, ((0, 0), *more, (0, 0))), size)
    stride = shape[0] // logits.shape[1]
    height, width = (-(-length // stride) for length in canvas)
    return logits[:, :height, :width]

  return network


def golden_views(protocol, golden, shape, images):
  """The views of a batch of images, and the label maps made of them."""
  network = golden_network(str(golden['row']), shape)
  look, build = protocols.make_views(protocol, network, jax.device_put, None)
  batch = {
    'image': np.zeros((len(images), *golden['pred'].shape, 3), np.uint8),
    'size': np.array([image.shape[:2] for image in images]),
  }
  for slot, image in enumerate(images):
    height, width = image.shape[:2]
    batch['image'][slot, :height, :width] = image
  layout, arrays = look(None, batch)

  @jax.jit
  def finish(arrays, size):
    views = build(layout, arrays, size, golden['pred'].shape)
    return views, final_stage.label_maps(views, size, tile_bytes=2**19)

  return finish(arrays, batch['size'])


def check_probabilities(scores, golden):
  np.testing.assert_allclose(
    scores.max(-1), golden['prob_max'], rtol=0, atol=1e-12
  )
  np.testing.assert_allclose(
    scores[::7, ::7].transpose(2, 0, 1), golden['prob_sub'], rtol=0, atol=1e-12
  )


def numpy_scores(view, slot):
  """One image's logits at the original size, (H, W, C)."""
  logits, rows, columns = (np.asarray(array)[slot] for array in view)
  return np.einsum('th,hwc,xw->txc', rows, logits, columns, optimize=True)


@pytest.mark.long
def test_slide_equals_mmsegmentation():
  golden = reference.load('infer_slide')
  protocol = Protocol(
    'slide', crop=tuple(golden['crop']), stride=tuple(golden['stride'])
  )
  # Its windows share batches with those of a smaller image.
  images = [golden['image'][:50, 20:100], golden['image']]
  with jax.enable_x64(True):
    (view,), maps = golden_views(protocol, golden, (64, 64), images)
  np.testing.assert_array_equal(maps[1], golden['pred'])
  check_probabilities(plain.softmax(numpy_scores(view, 1)), golden)


@pytest.mark.long
def test_multiscale_and_flip_equal_mmsegmentation():
  golden = reference.load('infer_tta')
  protocol = Protocol('ms_flip_1x', bucket=8)
  assert protocol.scales == tuple(golden['ratios'])
  with jax.enable_x64(True):
    views, maps = golden_views(protocol, golden, (128, 192), [golden['image']])
  assert len(views) == 12
  np.testing.assert_array_equal(maps[0], golden['pred'])
  scores = [plain.softmax(numpy_scores(view, 0)) for view in views]
  check_probabilities(np.mean(scores, 0), golden)


def pictures(seed, sizes, label_sizes):
  """A batch padded as little as the network in `plain` can stand."""
  batch = plain.random_batch(
    seed, sizes, label_sizes, label_canvas=tuple(np.max(label_sizes, 0))
  )
  height, width = padded_size(np.max(sizes, 0), 32)
  batch['image'] = batch['image'][:, :height, :width]
  return batch


def expected_map(protocol, image, label_size):
  if protocol.name == 'slide':
    scores = plain.slide_scores(
      image, label_size, protocol.crop, protocol.stride
    )
  else:
    relative = protocol.name == 'ms_flip_0x'
    scores = plain.multiscale_scores(
      image,
      protocol.scales,
      (False, True) if protocol.flip else (False,),
      protocol.image_scale if relative else None,
    )
  return scores.argmax(-1)


@pytest.mark.parametrize(
  'protocol', [SLIDE, *MULTISCALE.values()], ids=lambda p: p.name
)
def test_mixed_sizes_in_a_batch_equal_the_plain_way(protocol):
  label_sizes = SIZES if protocol.keep_size else [*plain.LABEL_SIZES[:4]]
  batch = pictures(0, SIZES, label_sizes)
  with jax.enable_x64(True):
    step = inference.make_eval_step(
      plain.Upsampler(), plain.CLASSES, protocol=protocol, dtype=jnp.float64
    )
    maps, counts = step(plain.variables(), batch)
    for slot, (height, width) in enumerate(SIZES):
      image = batch['image'][slot, :height, :width]
      rows, columns = label_sizes[slot]
      np.testing.assert_array_equal(
        maps[slot, :rows, :columns],
        expected_map(protocol, image, (rows, columns)),
      )
      outside = np.asarray(maps[slot]).copy()
      outside[:rows, :columns] = 255
      assert (outside == 255).all()
  np.testing.assert_array_equal(
    np.sum(counts, (1, 2)), np.sum(batch['label'] != 255, (1, 2))
  )


@pytest.mark.parametrize(
  'protocol', [SLIDE, Protocol('ms_flip_1x', scales=(1.25,), bucket=32)]
)
def test_devices_do_not_change_the_result(protocol):
  batch = pictures(1, SIZES, SIZES)
  (maps, counts), (sharded_maps, sharded_counts) = (
    inference.make_eval_step(
      plain.Upsampler(), plain.CLASSES, protocol=protocol, mesh=mesh
    )(plain.variables(), batch)
    for mesh in (None, plain.make_mesh(4))
  )
  assert len(sharded_maps.sharding.device_set) == 4
  np.testing.assert_array_equal(sharded_maps, maps)
  np.testing.assert_array_equal(sharded_counts, counts)


@pytest.mark.parametrize(
  ('protocol', 'shapes'),
  [
    # The third batch's images are lower than a window.
    (SLIDE, [(40, 48), (32, 48)]),
    # Both images of the first two batches are padded alike at each scale. In
    # the third they are enlarged to 50 x 90 (0x), or become the smallest (1x).
    (MULTISCALE['ms_flip_0x'], [(32, 48), (80, 120)]),
    (
      MULTISCALE['ms_flip_1x'],
      [(32, 48), (80, 120), (16, 32), (40, 80)],
    ),
  ],
  ids=lambda x: getattr(x, 'name', ''),
)
def test_the_network_compiles_once_a_padded_shape(protocol, shapes):
  traced = []

  @jax.jit
  def network(variables, images, size):
    traced.append(images.shape[1:3])
    return images[:, ::8, ::8].astype(np.float32)

  look, _ = protocols.make_views(protocol, network, jax.device_put, None)
  for sizes in ([(60, 90), (33, 70)], [(63, 91), (40, 70)], [(30, 50), (1, 1)]):
    look(None, pictures(2, sizes, sizes))
  assert traced == shapes


def test_windows_are_planned_for_each_device():
  # 70 wide: windows of 48 at 0 and, moved back, at 22. 20 high: one.
  sizes = np.array([(20, 70), (40, 48), (64, 49), (1, 1)])
  corners, window_sizes, places = slide.plan(
    sizes, (64, 96), (40, 48), (24, 31), devices=2
  )
  assert corners.shape == (3, 4, 3)
  # Three windows of the first device's images, five of the second's, by twos.
  np.testing.assert_array_equal(
    corners[:, :2].reshape(-1, 3)[:3], [(0, 0, 0), (0, 0, 22), (1, 0, 0)]
  )
  np.testing.assert_array_equal(
    corners[:, 2:].reshape(-1, 3)[:5],
    [(0, 0, 0), (0, 0, 1), (0, 24, 0), (0, 24, 1), (1, 0, 0)],
  )
  np.testing.assert_array_equal(
    window_sizes[:, :2].reshape(-1, 2),
    [(20, 48), (20, 48), (40, 48), (1, 1), (1, 1), (1, 1)],
  )
  assert places.shape == (4, 2, 3)
  np.testing.assert_array_equal(places[0], [(0, 1, 0), (0, 0, 0)])
  np.testing.assert_array_equal(places[2], [(0, 1, 0), (2, 3, 0)])
  assert places[3, 0, 0] == 4


def test_a_configuration_names_a_protocol_and_results_hold_all_of_it():
  def described(row='ade20k_pspnet', **keys):
    overrides = {f'eval.{key}': value for key, value in keys.items()}
    config = load_config(f'configs/{row}.py', overrides)
    return protocols.make_protocol(config).describe()

  assert described() == {'name': 'whole', 'image_scale': [2048, 512]}
  assert described(protocol='slide') == {
    'name': 'slide',
    'image_scale': [2048, 512],
    'crop': [512, 512],
    'stride': [341, 341],
  }
  assert described(
    'cityscapes_fcn',
    protocol='slide',
    slide_crop=(769, 769),
    slide_stride=(513, 513),
  ) == {
    'name': 'slide',
    'image_scale': [2048, 1024],
    'crop': [769, 769],
    'stride': [513, 513],
  }
  scales = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
  assert described(protocol='ms_flip_0x') == {
    'name': 'ms_flip_0x',
    'image_scale': [2048, 512],
    'scales': scales,
    'flip': True,
  }
  assert described(protocol='ms_flip_1x', scales=(1, 2), flip=False) == {
    'name': 'ms_flip_1x',
    'scales': [1.0, 2.0],
    'flip': False,
  }
