"""Folder, DeepLabV3+, ResNeSt-101-D8, crop 512x512, 40k steps, batch 8.

Your own images and masks in two folders (docs/own-data.md). There is no
reference.

    python train.py --config configs/folder.py --config.data.data_dir=mydata \
      --workdir runs/own
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  config.name = 'folder'
  config.model.head = 'deeplabv3plus'
  config.model.num_classes = 0  # as many as the classes file has
  config.data.name = 'folder'
  config.data.eval_split = 'val'
  config.train.total_steps = 40_000
  config.train.batch_size = 8
  config.train.eval_steps = 4_000
  return common.vary(config, argument)
