"""Sixty sizes in shared shapes and batches against each image on its own."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.plain import CLASSES, TINY
from evaluation.processes import Noise
from golden import reference
from lengths import others_long
from models.torch_segmentor import TorchSegmentor, upsampled

from resnest_jax import runtime
from resnest_jax.data import preprocess
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.inference import steps
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
  ('head', 'output_stride'),
  others_long(
    [('fcn', 16), ('pspnet', 8), ('deeplabv3', 8), ('deeplabv3plus', 8)],
    ('pspnet', 8),
    ('deeplabv3plus', 8),
  ),
)
def test_mixed_sizes_equal_each_image_alone(head, output_stride, monkeypatch):
  kept, make_views = [], steps.make_views

  def watched(protocol, network, *others):
    def keeping(*arguments):
      kept.append(network(*arguments))
      return kept[-1]

    return make_views(protocol, keeping, *others)

  monkeypatch.setattr(steps, 'make_views', watched)
  split = Noise(15, sizes=((40, 40), (200, 300)), seed=len(head))
  shapes, errors, seen = set(), [], []
  with runtime.count_compilations() as compiled:
    model = create_segmentor(
      TINY | {'head': head, 'output_stride': output_stride}
    )
    variables = reference.filled_variables(variable_shapes(model))
    state_dict = export_state_dict(model, variables, 'mmseg')
    alone = TorchSegmentor(state_dict, head, output_stride)
    step = steps.make_eval_step(model, CLASSES, dtype=jnp.float64)
    threads = types.SimpleNamespace(num_threads=1)
    for batch in make_eval_iterator(
      threads, split, batch_size=5, bucket=200, keep_size=True
    ):
      # NumPy's slices do not compile.
      maps = np.asarray(step(variables, batch)[0])
      logits = np.asarray(kept.pop())
      shapes.add(batch['image'].shape)
      for slot, index in enumerate(batch['index'].tolist()):
        if index < 0:
          continue
        image = (
          split[index]['image'] - np.array(preprocess.MEAN)
        ) / preprocess.STD
        expected = alone(image)
        rows, columns = expected.shape[2:]
        ours = logits[slot, :rows, :columns].transpose(2, 0, 1)
        errors.append(reference.relative_error(ours, expected[0]))
        height, width = split.sizes[index]
        classes = upsampled(expected, (height, width))[0].argmax(0)
        flips = np.count_nonzero(maps[slot, :height, :width] != classes.numpy())
        seen.append((index, flips))
  assert sorted(seen) == [(index, 0) for index in range(15)]
  assert max(errors) < 1e-9
  # Few shapes, and the network was compiled once for each.
  assert shapes == {(5, 200, 200, 3), (5, 200, 400, 3)}
  assert sum('forward' in name for name in compiled) == 2
