r"""Cityscapes, FCN, ResNeSt-101-D8, crop 512x1024, 80k steps, batch 8.

Reference: mmsegmentation,
resnest_s101-d8_fcn_4xb2-80k_cityscapes-512x1024, on four V100:
77.56 mIoU, 78.98 multi-scale + flip, 11.4 GB a GPU, 2.39 images/s in inference.

    python train.py --config configs/cityscapes_fcn.py \
      --workdir runs/cityscapes_fcn
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  config.name = 'cityscapes_fcn'
  config.model.head = 'fcn'
  common.cityscapes(config)
  return common.vary(config, argument)
