r"""Cityscapes, PSPNet, ResNeSt-101-D8, crop 512x1024, 80k steps, batch 8.

Reference: mmsegmentation,
resnest_s101-d8_pspnet_4xb2-80k_cityscapes512x1024, on four V100:
78.57 mIoU, 79.19 multi-scale + flip, 11.8 GB a GPU, 2.52 images/s in inference.

    python train.py --config configs/cityscapes_pspnet.py \
      --workdir runs/cityscapes_pspnet
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  config.name = 'cityscapes_pspnet'
  config.model.head = 'pspnet'
  common.cityscapes(config)
  return common.vary(config, argument)
