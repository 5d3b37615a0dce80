r"""ADE20K, PyTorch-Encoding's FCN, ResNeSt-50, crop 480x480, 180 epochs.

Reference: PyTorch-Encoding, fcn_resnest50_ade:
42.94 mIoU and 80.18 pixel accuracy, at several scales and mirrored, in the
authors' protocol, with the mean over all 150 classes; 37.35 M parameters.

    python train.py --config configs/ade20k_encoding_fcn_50.py \
      --workdir runs/ade20k_encoding_fcn_50
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.encoding(config, 'fcn_50', 'resnest50', 'fcn')
  return common.vary(config, argument)
