r"""ImageNet, classifier, ResNeSt-50, crop 224x224, 270 epochs, batch 8192.

Reference: the published weights, trained by the authors in MXNet:
81.03 top-1 at 224x224 (their PyTorch twin), 95.42 top-5 (GluonCV).

    python train.py --config configs/imagenet_resnest50.py \
      --workdir runs/imagenet_resnest50
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.imagenet(config, 50)
  return common.vary(config, argument)
