r"""ImageNet, classifier, ResNeSt-269, crop 320x320, 270 epochs, batch 2048.

Reference: the published weights, trained by the authors in MXNet:
84.54 top-1 at 416x416 (their PyTorch twin), 96.98 top-5 (GluonCV).

    python train.py --config configs/imagenet_resnest269.py \
      --workdir runs/imagenet_resnest269
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.imagenet(config, 269)
  return common.vary(config, argument)
