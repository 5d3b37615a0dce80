"""ADE20K, PSPNet, ResNeSt-101-D8, crop 512x512, 160k steps, batch 16.

Reference: mmsegmentation,
resnest_s101-d8_pspnet_4xb4-160k_ade20k-512x512, on four V100:
45.44 mIoU, 46.28 multi-scale + flip, 14.2 GB a GPU, 13.02 images/s in
inference.

    python train.py --config configs/ade20k_pspnet.py --workdir runs/pspnet
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()  # mmseg's 160k schedule on ADE20K
  config.name = 'ade20k_pspnet'
  config.model.head = 'pspnet'
  return common.vary(config, argument)
