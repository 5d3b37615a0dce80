r"""ADE20K, PyTorch-Encoding's DeepLabV3, ResNeSt-50, crop 480x480, 180 epochs.

Reference: PyTorch-Encoding, deeplab_resnest50_ade:
45.12 mIoU and 81.17 pixel accuracy, at several scales and mirrored, in the
authors' protocol, with the mean over all 150 classes; 44.00 M parameters.

    python train.py --config configs/ade20k_encoding_deeplabv3_50.py \
      --workdir runs/ade20k_encoding_deeplabv3_50
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.encoding(config, 'deeplabv3_50', 'resnest50', 'deeplabv3')
  return common.vary(config, argument)
