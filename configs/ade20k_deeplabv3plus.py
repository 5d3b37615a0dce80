r"""ADE20K, DeepLabV3+, ResNeSt-101-D8, crop 512x512, 160k steps, batch 16.

Reference: mmsegmentation,
resnest_s101-d8_deeplabv3plus_4xb4-160k_ade20k-512x512, on four V100:
46.47 mIoU, 47.27 multi-scale + flip, 16.2 GB a GPU, 11.96 images/s in
inference.

    python train.py --config configs/ade20k_deeplabv3plus.py \
      --workdir runs/ade20k_deeplabv3plus
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()  # mmseg's 160k schedule on ADE20K
  config.name = 'ade20k_deeplabv3plus'
  config.model.head = 'deeplabv3plus'
  return common.vary(config, argument)
