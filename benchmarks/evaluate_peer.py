"""mmsegmentation's evaluation, timed for `evaluate.py`.

    python evaluate_peer.py FOLDER

Runs in a Python that has mmsegmentation, not in ours. The folder has the images
and masks of a mini ADE20K, `config.json` with the network's keys, and
`weights.npz`. Answers each line that it reads with the seconds that one pass
over all images took, and writes `confusion.npy`.
"""

import json
import sys
import time
from pathlib import Path

import mmseg
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmseg.models.backbones.resnest import Bottleneck, ResNeSt
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

ROOT = 'ADEChallengeData2016'


def build(config: dict) -> torch.nn.Module:
  """The row's network, as small as `config` says."""
  folder = Path(mmseg.__file__).parent / '.mim/configs/resnest'
  (path,) = folder.glob(f'*_{config["head"]}_*ade20k*.py')
  model = Config.fromfile(path).model
  model.pretrained = None
  depth = sum(config['stage_sizes'] or (3, 4, 23, 3)) * 3 + 2
  ResNeSt.arch_settings[depth] = (
    Bottleneck,
    tuple(config['stage_sizes'] or (3, 4, 23, 3)),
  )
  width = config['width'] or 64
  model.backbone.update(
    depth=depth,
    base_channels=width,
    stem_channels=2 * (config['stem_width'] or 64),
    norm_cfg={'type': 'BN'},
  )
  for head, channels, stage in (
    (model.decode_head, config['head_channels'], 3),
    (model.auxiliary_head, config['aux_channels'], 2),
  ):
    head.update(
      in_channels=4 * width * 2**stage,
      channels=channels,
      norm_cfg={'type': 'BN'},
      num_classes=config['num_classes'],
    )
  if 'c1_in_channels' in model.decode_head:
    model.decode_head.c1_in_channels = 4 * width
  model.data_preprocessor.pop('size', None)
  return MODELS.build(model).eval()


@torch.inference_mode()
def evaluate(model, transforms, folder: Path, classes: int) -> np.ndarray:
  """One image at a time, as its `test_dataloader` and its test loop do."""
  confusion = np.zeros((classes, classes), np.int64)
  images = sorted((folder / ROOT / 'images/validation').glob('*.jpg'))
  for image in images:
    mask = folder / ROOT / 'annotations/validation' / f'{image.stem}.png'
    data = transforms(
      {
        'img_path': str(image),
        'seg_map_path': str(mask),
        'reduce_zero_label': True,
        'seg_fields': [],
        'label_map': None,
      }
    )
    (sample,) = model.test_step(
      {'inputs': [data['inputs']], 'data_samples': [data['data_samples']]}
    )
    label = sample.gt_sem_seg.data.squeeze().numpy().astype(np.int64)
    found = sample.pred_sem_seg.data.squeeze().numpy()
    inside = label != 255
    index = label[inside] * classes + found[inside]
    confusion += np.bincount(index, minlength=classes**2).reshape(
      classes, classes
    )
  return confusion


def main() -> None:
  folder = Path(sys.argv[1])
  answers = sys.stdout
  sys.stdout = sys.stderr  # Libraries print.
  register_all_modules()
  config = json.loads((folder / 'config.json').read_text())
  model = build(config)
  with np.load(folder / 'weights.npz') as weights:
    state = {name: torch.tensor(weights[name]) for name in weights}
  model.load_state_dict(state)
  # configs/_base_/datasets/ade20k.py.
  transforms = Compose(
    [
      {'type': 'LoadImageFromFile'},
      {'type': 'Resize', 'scale': tuple(config['scale']), 'keep_ratio': True},
      {'type': 'LoadAnnotations', 'reduce_zero_label': True},
      {'type': 'PackSegInputs'},
    ]
  )
  print(f'mmsegmentation {mmseg.__version__}', file=answers, flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    confusion = evaluate(model, transforms, folder, config['num_classes'])
    seconds = time.perf_counter() - start
    np.save(folder / 'confusion.npy', confusion)
    print(seconds, file=answers, flush=True)


if __name__ == '__main__':
  main()
