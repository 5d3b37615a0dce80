"""mmsegmentation's training transforms, timed for `pipeline.py`.

Runs in a Python that has mmsegmentation, not in ours. Reads lines "NUMBER
WORKERS" and answers each with the seconds that so many samples took, without
worker processes (0) or in so many of a torch DataLoader.
"""

import sys
import time
from pathlib import Path

import cv2
import mmseg
import mmseg.datasets
import torch
from mmengine.dataset import Compose
from mmseg.utils import register_all_modules


class Samples(torch.utils.data.Dataset):
  """Augmented samples of the files in a folder."""

  def __init__(self, data: str, folder: Path, number: int):
    ade20k = data == 'ade20k'
    self.number = number
    self.zero_label = ade20k
    if ade20k:
      self.files = [
        (path, path.with_suffix('.png'))
        for path in sorted(folder.glob('*.jpg'))
      ]
    else:
      self.files = [
        (path.with_name(path.name.replace('_label', '')), path)
        for path in sorted(folder.glob('*_label.png'))
      ]
    # configs/_base_/datasets/ade20k.py and cityscapes.py.
    edge = 512 if ade20k else 1024
    self.transforms = Compose(
      [
        {'type': 'LoadImageFromFile'},
        {'type': 'LoadAnnotations', 'reduce_zero_label': ade20k},
        {
          'type': 'RandomResize',
          'scale': (2048, edge),
          'ratio_range': (0.5, 2.0),
          'keep_ratio': True,
        },
        {'type': 'RandomCrop', 'crop_size': (512, edge), 'cat_max_ratio': 0.75},
        {'type': 'RandomFlip', 'prob': 0.5},
        {'type': 'PhotoMetricDistortion'},
        {'type': 'PackSegInputs'},
      ]
    )

  def __len__(self) -> int:
    return self.number

  def __getitem__(self, index: int):
    image, mask = self.files[index % len(self.files)]
    return self.transforms(
      {
        'img_path': str(image),
        'seg_map_path': str(mask),
        'reduce_zero_label': self.zero_label,
        'seg_fields': [],
        'label_map': None,
      }
    )


def main() -> None:
  data, folder = sys.argv[1], Path(sys.argv[2])
  answers = sys.stdout
  sys.stdout = sys.stderr  # Libraries print.
  register_all_modules()
  cv2.setNumThreads(0)  # As mmengine does in training.
  print(f'mmsegmentation {mmseg.__version__}', file=answers, flush=True)
  for line in sys.stdin:
    number, workers = map(int, line.split())
    steps = -(-number // 4)
    loader = torch.utils.data.DataLoader(
      Samples(data, folder, 4 * (1 + steps + 8)),
      batch_size=4,
      num_workers=workers,
      collate_fn=list,
    )
    batches = iter(loader)
    next(batches)  # Worker processes take seconds to start.
    start = time.perf_counter()
    for _ in range(steps):
      next(batches)
    print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == '__main__':
  main()
