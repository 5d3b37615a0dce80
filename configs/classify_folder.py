r"""Folders, classifier, ResNeSt-50, crop 224x224, 100 steps, batch 16.

Your own pictures in a folder for each class (docs/classify.md), from the
published weights on. There is no reference. 100 steps are about 20 epochs of 90
pictures; raise train.total_steps with more pictures.

    python train.py --config configs/classify_folder.py \
      --config.data.data_dir=mydata --workdir runs/own
"""

from configs import common


def get_config(argument=None):
  config = common.get_config()
  common.classifier(config)
  config.name = 'classify_folder'
  config.pretrained = 'resnest50'
  config.model.backbone = 'resnest50'
  config.model.num_classes = 0  # as many as there are folders
  config.model.dropout = 0.2
  # Few pictures a step would give noisier statistics than those of ImageNet.
  config.model.frozen_bn = 'backbone'
  config.data.name = 'class_folder'
  config.data.eval_split = 'val'
  config.data.color_jitter = 0.2
  config.optimizer.learning_rate = 0.005
  config.optimizer.head_multiplier = 10.0
  config.optimizer.warmup_steps = 10
  config.train.total_steps = 100
  config.train.batch_size = 16
  config.train.log_steps = 5
  config.train.eval_steps = 25
  config.train.checkpoint_steps = 25
  config.eval.batch_size = 16
  return common.vary(config, argument)
