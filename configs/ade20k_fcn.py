"""ADE20K, FCN, ResNeSt-101-D8, crop 512x512, 160k steps, batch 16.

Reference: mmsegmentation,
resnest_s101-d8_fcn_4xb4-160k_ade20k-512x512, on four V100:
45.62 mIoU, 46.16 multi-scale + flip, 14.2 GB a GPU, 12.86 images/s in
inference.

    python train.py --config configs/ade20k_fcn.py --workdir runs/ade20k_fcn
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()  # mmseg's 160k schedule on ADE20K
  config.name = 'ade20k_fcn'
  config.model.head = 'fcn'
  return common.vary(config, argument)
