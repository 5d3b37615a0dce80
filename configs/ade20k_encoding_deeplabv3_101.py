r"""ADE20K, PyTorch-Encoding's DeepLabV3, ResNeSt-101, crop 480x480, 180 epochs.

Reference: PyTorch-Encoding, deeplab_resnest101_ade:
46.91 mIoU and 82.07 pixel accuracy, at several scales and mirrored, in the
authors' protocol, with the mean over all 150 classes; 64.79 M parameters.

    python train.py --config configs/ade20k_encoding_deeplabv3_101.py \
      --workdir runs/ade20k_encoding_deeplabv3_101
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.encoding(config, 'deeplabv3_101', 'resnest101', 'deeplabv3')
  return common.vary(config, argument)
