"""The authors' segmentors against stored outputs of PyTorch-Encoding."""

import numpy as np
import pytest
from golden import reference
from golden.reference import evaluate, relative_error
from lengths import others_long

from resnest_jax.models.layers import resize

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('float64')]

NETWORKS = [
  'deeplab_resnest50_ade20k_odd',  # Three sizes, from a single pixel on.
  'deeplab_resnest50_ade20k',
  'deeplab_resnest101_ade20k',
  'deeplab_resnest101_pcontext',
  'deeplab_resnest269_ade20k',
  'fcn_resnest50_ade20k',
  'psp_resnest50_ade20k',
]


@pytest.mark.parametrize(
  'name', others_long(NETWORKS, NETWORKS[0], 'psp_resnest50_ade20k')
)
def test_logits_are_the_authors(name):
  golden = reference.load(f'encoding_forward_{name}')
  model, variables = reference.encoding(golden)
  # All sizes in one padded canvas.
  sizes, batch = golden['sizes'].tolist(), int(golden['batch'])
  canvas = np.zeros((len(sizes), batch, *np.max(sizes, 0), 3))
  for i, (h, w) in enumerate(sizes):
    images = reference.images(int(golden['seed']) + i, batch, h, w)
    canvas[i, :, :h, :w] = images
  true = None if len(sizes) == 1 else np.repeat(np.int32(sizes), batch, 0)
  output = evaluate(
    model, variables, canvas.reshape(-1, *canvas.shape[2:]), true
  )
  for head, maps in zip(('', 'aux_'), output, strict=True):
    maps = np.asarray(maps).reshape(*canvas.shape[:2], *maps.shape[1:])
    for i, size in enumerate(sizes):
      end = '' if len(sizes) == 1 else f'_{i}'
      h, w = (-(-length // 8) for length in size)
      logits = maps[i, :, :h, :w]
      pixels = np.asarray(resize(logits, tuple(size), align_corners=True))
      found = {f'{head}logits': logits, f'{head}out_sub': pixels[:, ::13, ::13]}
      if not head:
        found['out_corner'] = pixels[:, -1:, -1:]
      for what, ours in found.items():
        theirs = golden[what + end]
        ours = ours.transpose(0, 3, 1, 2).reshape(theirs.shape)
        assert relative_error(ours, theirs) < 1e-12, what
