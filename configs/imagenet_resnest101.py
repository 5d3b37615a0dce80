r"""ImageNet, classifier, ResNeSt-101, crop 224x224, 270 epochs, batch 4096.

Reference: the published weights, trained by the authors in MXNet:
82.83 top-1 at 256x256 (their PyTorch twin), 96.42 top-5 (GluonCV).

    python train.py --config configs/imagenet_resnest101.py \
      --workdir runs/imagenet_resnest101
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.imagenet(config, 101)
  return common.vary(config, argument)
