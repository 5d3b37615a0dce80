r"""Cityscapes, DeepLabV3+, ResNeSt-101-D8, crop 512x1024, 80k steps, batch 8.

Reference: mmsegmentation,
resnest_s101-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024, on four V100:
79.62 mIoU, 80.27 multi-scale + flip, 13.2 GB a GPU, 2.36 images/s in inference.

    python train.py --config configs/cityscapes_deeplabv3plus.py \
      --workdir runs/cityscapes_deeplabv3plus
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  config.name = 'cityscapes_deeplabv3plus'
  config.model.head = 'deeplabv3plus'
  common.cityscapes(config)
  return common.vary(config, argument)
