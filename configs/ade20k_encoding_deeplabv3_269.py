r"""ADE20K, PyTorch-Encoding's DeepLabV3, ResNeSt-269, crop 480x480, 180 epochs.

Reference: PyTorch-Encoding, deeplab_resnest269_ade:
47.60 mIoU and 82.62 pixel accuracy, at several scales and mirrored, in the
authors' protocol, with the mean over all 150 classes; 127.44 M parameters.

    python train.py --config configs/ade20k_encoding_deeplabv3_269.py \
      --workdir runs/ade20k_encoding_deeplabv3_269
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.encoding(config, 'deeplabv3_269', 'resnest269', 'deeplabv3')
  return common.vary(config, argument)
