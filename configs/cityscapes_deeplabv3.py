r"""Cityscapes, DeepLabV3, ResNeSt-101-D8, crop 512x1024, 80k steps, batch 8.

Reference: mmsegmentation,
resnest_s101-d8_deeplabv3_4xb2-80k_cityscapes-512x1024, on four V100:
79.67 mIoU, 80.51 multi-scale + flip, 11.9 GB a GPU, 1.88 images/s in inference.

    python train.py --config configs/cityscapes_deeplabv3.py \
      --workdir runs/cityscapes_deeplabv3
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  config.name = 'cityscapes_deeplabv3'
  config.model.head = 'deeplabv3'
  common.cityscapes(config)
  return common.vary(config, argument)
