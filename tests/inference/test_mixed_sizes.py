"""Sixty sizes in shared shapes and batches against each image on its own."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.plain import CLASSES, TINY, noise
from golden import reference
from lengths import others_long
from models.torch_segmentor import TorchSegmentor, upsampled

from resnest_jax import runtime
from resnest_jax.data import preprocess
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.inference import steps
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import export_state_dict

HEADS = [('fcn', 16), ('pspnet', 8), ('deeplabv3', 8), ('deeplabv3plus', 8)]


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
  ('head', 'output_stride'), others_long(HEADS, HEADS[1], HEADS[3])
)
def test_mixed_sizes_equal_each_image_alone(head, output_stride):
  split = noise(15, (40, 40), (200, 300), seed=len(head))
  shapes, errors, seen = set(), [], []
  with runtime.count_compilations() as compiled:
    config = TINY | {'head': head, 'output_stride': output_stride}
    model = create_segmentor(config)
    variables = reference.variables_of(model)
    state_dict = export_state_dict(model, variables, 'mmseg')
    alone = TorchSegmentor(state_dict, head, output_stride)
    options = None, None, jnp.float64, lambda height, width: None
    views = steps.compile_views(model, CLASSES, *options)
    finish = steps.make_finish(views.build, CLASSES, None)
    threads = types.SimpleNamespace(num_threads=1)
    for batch in make_eval_iterator(
      threads, split, batch_size=5, bucket=200, keep_size=True
    ):
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
        height, width = image.shape[:2]
        classes = upsampled(expected, (height, width))[0].argmax(0)
        flips = np.count_nonzero(maps[slot, :height, :width] != classes.numpy())
        seen.append((batch['index'][slot], flips))
  assert sorted(seen) == [(index, 0) for index in range(15)]
  assert max(errors) < 1e-9
  # Few shapes, and the network was compiled once for each.
  assert shapes == {(5, 200, 200, 3), (5, 200, 400, 3)}
  assert sum('forward' in name for name in compiled) == 2
