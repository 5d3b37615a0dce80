"""Windows, scales, mirrors and label maps against the plain way."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import plain
from evaluation.plain import CLASSES
from golden import reference
from lengths import others_long
from models.torch_segmentor import TorchSegmentor, upsampled
from scipy.special import softmax

from resnest_jax import runtime
from resnest_jax.config import load_config
from resnest_jax.data import pipeline, preprocess, resize
from resnest_jax.evaluation import metrics
from resnest_jax.inference import label_maps, protocols, steps
from resnest_jax.inference.multiscale import scaled_sizes
from resnest_jax.inference.protocols import Protocol
from resnest_jax.models import implementations
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import export_state_dict

# Height and width: larger than a window in both directions, in one, in none.
SIZES = [(60, 90), (33, 96), (64, 30), (20, 25), (1, 1)]
SLIDE = Protocol('slide', crop=(40, 48), stride=(24, 31))
KEPT = Protocol('slide', (0, 0), SLIDE.crop, SLIDE.stride)
SCALED = {'image_scale': (90, 50), 'scales': (0.5, 1.25), 'bucket': 32}
SCALES_0X = Protocol('ms_flip_0x', **SCALED)
SCALES_1X = Protocol('ms_flip_1x', **SCALED)
SQUARES = {'image_scale': (48, 48), 'crop': (40, 40), 'stride': (26, 26)}
ENCODING = Protocol('encoding', scales=(0.5, 1.0, 1.75), **SQUARES)


def golden_network(row, shape):
  # mmsegmentation's network, compiled for one padded shape.
  model, weights = plain.golden_model(row)

  @reference.quick_jit
  def apply(images, size):
    images = preprocess.preprocess(images, size, dtype=jnp.float64)
    return model.apply(weights, images, train=False, size=size).logits

  def network(_, images, size):
    canvas = images.shape[1:3]
    more = [(0, n - m) for n, m in zip(shape, canvas, strict=True)]
    logits = apply(jnp.pad(images, ((0, 0), *more, (0, 0))), size)
    stride = shape[0] // logits.shape[1]
    height, width = (-(-length // stride) for length in canvas)
    return logits[:, :height, :width]

  return network


def probabilities(view, slot):
  # One image's at the original size, (H, W, C).
  logits, rows, columns = (np.asarray(array)[slot] for array in view)
  scores = np.einsum('th,hwc,xw->txc', rows, logits, columns, optimize=True)
  return softmax(scores, -1)


PADDED = {'infer_slide': (64, 64), 'infer_tta': (128, 192)}


@pytest.mark.long
@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('name', 'shape'), PADDED.items())
def test_protocols_equal_mmsegmentation(name, shape):
  golden = reference.load(name)
  images, protocol = [golden['image']], Protocol('ms_flip_1x', bucket=8)
  if name == 'infer_slide':
    # Its windows share batches with those of a smaller image.
    images.insert(0, golden['image'][:50, 20:100])
    crop, stride = (tuple(golden[key]) for key in ('crop', 'stride'))
    protocol = Protocol('slide', crop=crop, stride=stride)
  network = golden_network(str(golden['row']), shape)
  look, build = protocols.make_views(protocol, network, jax.device_put, None)
  batch = {'image': plain.padded(images, golden['pred'].shape, 0)}
  batch['size'] = np.array([image.shape[:2] for image in images])
  layout, arrays = look(None, batch)

  @jax.jit
  def finish(arrays, size):
    views = build(layout, arrays, size, golden['pred'].shape)
    return views, label_maps.label_maps(views, size, tile_bytes=2**19)

  found, maps = finish(arrays, batch['size'])
  np.testing.assert_array_equal(maps[-1], golden['pred'])
  scores = np.mean([probabilities(view, -1) for view in found], 0)
  np.testing.assert_allclose(scores.max(-1), golden['prob_max'], 0, 1e-12)
  some = scores[::7, ::7].transpose(2, 0, 1)
  np.testing.assert_allclose(some, golden['prob_sub'], 0, 1e-12)


def pictures(sizes, label_sizes):
  # A batch padded as little as the network in `plain` can stand.
  canvases = resize.padded_size(np.max(sizes, 0), 32), np.max(label_sizes, 0)
  return plain.batch_of(sizes, label_sizes, canvases)


def plain_scores(protocol, image, label_size):
  if protocol.name == 'slide':
    return plain.slide_scores(image, label_size, SLIDE.crop, SLIDE.stride)
  if protocol == Protocol():
    return plain.resized(plain.network(image), label_size)
  if protocol == ENCODING:
    return plain.encoding_scores(image, ENCODING)
  scale = protocol.image_scale if protocol == SCALES_0X else None
  return plain.multiscale_scores(image, protocol.scales, scale)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
  ('protocol', 'devices', 'tile_bytes'),
  [
    *((Protocol(), 1, size) for size in (1, 200_000, label_maps.TILE_BYTES)),
    *((x, 1, label_maps.TILE_BYTES) for x in (SLIDE, SCALES_0X, SCALES_1X)),
    *((x, 4, label_maps.TILE_BYTES) for x in (Protocol(), SLIDE, SCALES_1X)),
    *((KEPT, devices, 200_000) for devices in (1, 4)),
    *(
      (ENCODING, *x) for x in ((1, 1), (1, label_maps.TILE_BYTES), (4, 500_000))
    ),
  ],
)
def test_mixed_sizes_equal_the_plain_way(protocol, devices, tile_bytes):
  label_sizes = SIZES if protocol.keep_size else plain.LABEL_SIZES
  batch = pictures(*(sizes + 3 * [(1, 1)] for sizes in (SIZES, label_sizes)))
  for slot in (5, 6, 7):
    plain.fill_slot(batch, slot)
  options = {'tile_bytes': tile_bytes, 'mesh': plain.make_mesh(devices)}
  step = plain.make_step(protocol=protocol, dtype=jnp.float64, **options)
  maps, counts = step(plain.VARIABLES, batch)
  assert (maps.dtype, len(maps.sharding.device_set)) == (np.uint8, devices)
  expected = []
  for slot, (height, width) in enumerate(SIZES):
    image = batch['image'][slot, :height, :width]
    expected.append(plain_scores(protocol, image, label_sizes[slot]).argmax(-1))
  expected = plain.padded(expected, maps.shape[1:], 255)
  np.testing.assert_array_equal(maps[:5], expected)
  pairs = zip(np.asarray(maps), batch['label'], strict=True)
  confusions = [metrics.confusion_matrix(*pair, CLASSES) for pair in pairs]
  np.testing.assert_array_equal(counts, confusions)


@pytest.mark.parametrize('argmax', implementations.IMPLEMENTATIONS['argmax'])
def test_of_equal_scores_the_lowest_class_wins(argmax):
  rng, size = np.random.default_rng(0), jnp.array([[4, 6], [4, 6]])
  logits = rng.integers(-3, 3, (2, 4, 6, 9)).astype(np.float32)
  with implementations.use(argmax=argmax):
    canvases = size, (4, 6), size, (4, 6)
    view = label_maps.resized_view(jnp.asarray(logits), *canvases)
    maps = label_maps.label_maps([view], size)
  np.testing.assert_array_equal(maps, logits.argmax(-1))


HEADS = [('fcn', 16), ('pspnet', 8), ('deeplabv3', 8), ('deeplabv3plus', 8)]


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
  ('head', 'output_stride'), others_long(HEADS, HEADS[1], HEADS[3])
)
def test_mixed_sizes_equal_each_image_alone(head, output_stride):
  split = plain.noise(15, (40, 40), (200, 300), seed=len(head))
  shapes, errors, seen = set(), [], []
  with runtime.count_compilations() as compiled:
    changes = {'head': head, 'output_stride': output_stride}
    model = create_segmentor(plain.TINY | changes)
    variables = reference.variables_of(model)
    state_dict = export_state_dict(model, variables, 'mmseg')
    alone = TorchSegmentor(state_dict, head, output_stride)
    options = None, None, jnp.float64, lambda height, width: None
    views = steps.compile_views(model, CLASSES, *options)
    finish = steps.make_finish(views.build, CLASSES, None)
    threads = types.SimpleNamespace(num_threads=1)
    shared = {'batch_size': 5, 'bucket': 200, 'keep_size': True}
    for batch in pipeline.make_eval_iterator(threads, split, **shared):
      layout, arrays = views.look(variables, batch)
      maps, _ = finish(layout, arrays, batch['label'], batch['label_size'])
      # NumPy's slices do not compile.
      maps, logits = np.asarray(maps), np.asarray(arrays[0])
      shapes.add(batch['image'].shape)
      for slot in np.flatnonzero(batch['index'] >= 0):
        image = split[batch['index'][slot]]['image']
        expected = alone((image - np.array(preprocess.MEAN)) / preprocess.STD)
        rows, columns = expected.shape[2:]
        ours = logits[slot, :rows, :columns].transpose(2, 0, 1)
        errors.append(reference.relative_error(ours, expected[0]))
        classes = upsampled(expected, image.shape[:2])[0].argmax(0).numpy()
        found = maps[slot, : image.shape[0], : image.shape[1]]
        seen.append((batch['index'][slot], np.count_nonzero(found != classes)))
  assert sorted(seen) == [(index, 0) for index in range(15)]
  assert max(errors) < 1e-9
  # Few shapes, and the network was compiled once for each.
  assert shapes == {(5, 200, 200, 3), (5, 200, 400, 3)}
  assert sum('forward' in name for name in compiled) == 2


TRACED = {
  # The third batch's images are lower than a window.
  SLIDE: [(40, 48), (32, 48)],
  # Both images of the first two batches are padded alike at each scale. In the
  # third they are enlarged to 50 x 90 (0x), or become the smallest (1x).
  SCALES_0X: [(32, 48), (80, 120)],
  SCALES_1X: [(32, 48), (80, 120), (16, 32), (40, 80)],
  ENCODING: [(40, 40)],  # Always a whole window.
}


@pytest.mark.parametrize(('protocol', 'shapes'), TRACED.items())
def test_the_network_compiles_once_a_padded_shape(protocol, shapes):
  traced = []

  @jax.jit
  def network(variables, images, size):
    traced.append(images.shape[1:3])
    return images[:, ::8, ::8].astype(np.float32)

  look, _ = protocols.make_views(protocol, network, jax.device_put, None)
  for sizes in ([(60, 90), (33, 70)], [(63, 91), (40, 70)], [(30, 50), (1, 1)]):
    look(None, pictures(sizes, sizes))
  assert traced == shapes


def test_a_configuration_names_a_protocol_and_results_hold_all_of_it():
  large = {'slide_crop': (769, 769), 'slide_stride': (513, 513)}
  scales = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
  for name, keys, described in (
    ('slide', {}, {'crop': [512, 1024], 'stride': [341, 682]}),
    ('slide', large, {'crop': [769, 769], 'stride': [513, 513]}),
    ('ms_flip_0x', {'flip': False}, {'scales': scales, 'flip': False}),
  ):
    overrides = {'eval.protocol': name} | {f'eval.{x}': keys[x] for x in keys}
    config = load_config('configs/cityscapes_fcn.py', overrides)
    found = protocols.make_protocol(config).describe()
    assert found == {'name': name, 'image_scale': [2048, 1024]} | described


def test_logits_size_follows_the_stride():
  size = np.array([[64, 96], [1, 33]])
  found = label_maps.logits_size(size, (64, 96), (2, 3))
  np.testing.assert_array_equal(found, -(-size // 32))
  with pytest.raises(ValueError, match='no stride'):
    label_maps.logits_size(size, (64, 96), (9, 12))


def test_counts_are_exact_and_nothing_invalid_is_counted():
  rng = np.random.default_rng(1)
  label, prediction = rng.integers(0, CLASSES, (2, 3, 20, 30), np.uint8)
  label[rng.random(label.shape) < 0.3] = 255
  pairs = zip(prediction, label, strict=True)
  expected = [metrics.confusion_matrix(*pair, CLASSES) for pair in pairs]
  count = jax.jit(label_maps.count_confusion, static_argnums=2)
  np.testing.assert_array_equal(count(prediction, label, CLASSES), expected)
  # Neither a label nor a prediction beyond the classes wraps into another bin.
  label[0, 0, :2], prediction[0, 0, :2] = [CLASSES, 1], [0, CLASSES]
  label[0, 1:] = 255
  counted = count(prediction, label, CLASSES)[0].sum()
  assert counted == np.count_nonzero(label[0, 0, 2:] != 255)


@pytest.mark.parametrize('name', ['whole', 'ms_flip_1x', 'encoding'])
def test_a_large_image_of_many_classes_takes_little_memory(name):
  # Twelve megapixels; one copy of the scores of all classes has 7.2 GB.
  def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  squares = {'image_scale': (520, 520), 'crop': (480, 480)}
  protocol = Protocol(name, **squares, stride=(320, 320))
  sizes = shaped(1, 2, dtype=jnp.int32)
  if name == 'whole':
    layout, arrays = (512, 704), (shaped(1, 64, 88, 150), sizes)
  elif name == 'encoding':
    # Windows of the scales 0.5 to 1.75, whose logits have 60 x 60 pixels.
    layout = (1, 1), (1, 1), (1, 2), (2, 2), (2, 2), (2, 3)
    arrays = [(shaped(1, 60 * y, 60 * x, 150), sizes) for y, x in layout]
  else:
    size = np.array([[3000, 4000]])
    scaled = (scaled_sizes(size, ratio, None) for ratio in protocol.scales)
    layout = tuple(resize.padded_size(x[0].tolist(), 64) for x in scaled)
    logits = (shaped(1, h // 8, w // 8, 150) for h, w in layout)
    arrays = [(2 * [x], sizes) for x in logits]
  _, build = protocols.make_views(protocol, None, None, None)

  finish = steps.make_finish(build, 150, None)
  label = shaped(1, 3008, 4032, dtype=jnp.uint8)
  compiled = finish.lower(layout, arrays, label, sizes).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 400e6
