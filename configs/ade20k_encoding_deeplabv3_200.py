r"""ADE20K, PyTorch-Encoding's DeepLabV3, ResNeSt-200, crop 480x480, 180 epochs.

Reference: PyTorch-Encoding, deeplab_resnest200_ade:
48.36 mIoU and 82.45 pixel accuracy, at several scales and mirrored, in the
authors' protocol, with the mean over all 150 classes; 86.71 M parameters.

    python train.py --config configs/ade20k_encoding_deeplabv3_200.py \
      --workdir runs/ade20k_encoding_deeplabv3_200
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.encoding(config, 'deeplabv3_200', 'resnest200', 'deeplabv3')
  return common.vary(config, argument)
