r"""ADE20K, DeepLabV3, ResNeSt-101-D8, crop 512x512, 160k steps, batch 16.

Reference: mmsegmentation,
resnest_s101-d8_deeplabv3_4xb4-160k_ade20k-512x512, on four V100:
45.71 mIoU, 46.59 multi-scale + flip, 14.6 GB a GPU, 9.28 images/s in inference.

    python train.py --config configs/ade20k_deeplabv3.py \
      --workdir runs/ade20k_deeplabv3
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()  # mmseg's 160k schedule on ADE20K
  config.name = 'ade20k_deeplabv3'
  config.model.head = 'deeplabv3'
  return common.vary(config, argument)
