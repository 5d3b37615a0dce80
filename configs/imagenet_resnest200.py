r"""ImageNet, classifier, ResNeSt-200, crop 256x256, 270 epochs, batch 2048.

Reference: the published weights, trained by the authors in MXNet:
83.84 top-1 at 320x320 (their PyTorch twin), 96.86 top-5 (GluonCV).

    python train.py --config configs/imagenet_resnest200.py \
      --workdir runs/imagenet_resnest200
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.imagenet(config, 200)
  return common.vary(config, argument)
