"""Every key of a configuration, with its meaning and default.

A row file calls `get_config()` and sets what its row needs. The keys are
fixed (a misspelt one is an error) and so are their types. Which values they
accept, and which may change while a run continues, is in
`resnest_jax/config_keys.py`. "mmseg" names the source of a default:
mmsegmentation 1.2.2, `configs/_base_`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from resnest_jax.errors import UserError


def get_config() -> ConfigDict:
  """The defaults: mmseg's 160k schedule on ADE20K with a ResNeSt-101."""
  config = ConfigDict()
  config.name = ''  # the row, written into logs and results
  config.seed = 0  # of weights, dropout, order and augmentation
  # Weights to start from: '' for none, a published name (docs/weights.md), an
  # address, hf://owner/repository/file, a path, or the workdir of a training.
  # mmseg: 'resnest101_d2'.
  config.pretrained = ''
  config.model = model()
  config.data = data()

  config.loss = loss()
  config.optimizer = optimizer()

  # Sharing of the work among all devices of all hosts; docs/scale.md.
  config.mesh = ConfigDict()
  config.mesh.data = -1  # devices that share the batch; -1: all there are
  config.mesh.spatial = 1  # devices that share the rows of each image

  config.train = ConfigDict()
  config.train.total_steps = 160_000  # optimiser steps (mmseg)
  # Instead, if given: as many steps as show each training image so often.
  config.train.total_epochs = placeholder(int)
  config.train.batch_size = 16  # images per step, over all devices (mmseg: 4x4)
  config.train.log_steps = 50  # steps between two log lines (mmseg)
  config.train.eval_steps = 16_000  # steps between evaluations (mmseg)
  # Ends the run after so many evaluations without a better score; 0: never.
  config.train.early_stop = 0
  config.train.checkpoint_steps = 2_000  # at most this many steps are lost
  config.train.keep_checkpoints = 3  # the newest; the best mIoU is kept too
  config.train.pictures = 2  # of each evaluation, for TensorBoard; 0 for none
  config.train.wandb = ''  # project of Weights & Biases; '': not used
  # Memory (docs/memory.md) and the parts that are trained (docs/training.md).
  # Images per micro-batch, over all devices; 0: the whole batch. Each
  # micro-batch has its own batch norm statistics.
  config.train.micro_batch_size = 0
  # classifier: images that share batch norm statistics, mixup's weight and
  # DropBlock's masks, as those of a GPU did; 0: the whole batch.
  config.train.norm_group = 0
  # Features that the backward pass recomputes instead of keeping: 'none',
  # 'blocks', 'stages', or parts such as 'stem,layer1'. It changes no result.
  config.train.remat = 'none'
  # Number of parts of the backbone, from the input on, that are not trained: 1
  # the stem, 2 also stage 1, ..., 5 all of it.
  config.train.freeze = 0
  # True: scales and biases are not trained where model.frozen_bn keeps the
  # statistics.
  config.train.freeze_norms = False
  # Decay of the moving averages that are evaluated and exported; 0: none.
  config.train.ema_decay = 0.0  # 0 to 1 (excluded), such as 0.999

  config.eval = ConfigDict()
  config.eval.batch_size = 8  # images of one padded shape, over all devices
  config.eval.bucket = 64  # pixels: padded shapes are multiples of this
  config.eval.overlays = 8  # pictures to draw, 0 for none
  config.eval.report_images = 6  # worst and best ones in report.html, each
  config.eval.boundary_iou = False  # how well outlines fit; docs/metrics.md
  config.eval.fscore_beta = 1.0  # recall counts beta times as much, > 0 (mmseg)
  # Protocol of eval.py (docs/evaluation.md): 'whole', 'slide' in windows,
  # 'ms_flip_0x' or 'ms_flip_1x' at several scales and mirrored; 0x scales
  # data.image_scale, 1x the original image; 'encoding' is the authors' own, in
  # windows of several scales. Training uses 'whole'.
  config.eval.protocol = 'whole'
  # slide, encoding: pixels (height, width) of a window, and from one to the
  # next.
  config.eval.slide_crop = placeholder(tuple)  # None: data.crop_size
  config.eval.slide_stride = placeholder(tuple)  # None: two thirds of it
  # ms_flip_*, encoding: scales, and whether each is also mirrored (mmseg).
  config.eval.scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
  config.eval.flip = True
  return config.lock()


def loss() -> ConfigDict:
  """The loss; docs/training.md has the formulas."""
  config = ConfigDict()
  config.terms = ConfigDict()  # factor of each term, >= 0; 0: left out
  config.terms.cross_entropy = 1.0
  config.terms.ohem = 0.0  # cross entropy of the hard pixels
  config.terms.focal = 0.0
  config.terms.dice = 0.0
  config.terms.lovasz = 0.0
  config.aux_weight = 0.4  # of the auxiliary head's loss, >= 0 (mmseg)
  # cross_entropy, ohem, focal. False: mean over all pixels, ignored ones count
  # as 0 (mmseg). True: mean over the pixels that have a label.
  config.avg_non_ignore = False
  # cross_entropy, ohem: a number >= 0 for each class, None: all 1. Of the
  # training split's pixels: 'inverse_sqrt' or 'median_frequency'.
  config.class_weights = placeholder(object)
  config.label_smoothing = 0.0  # cross_entropy, ohem; 0 to 1 (excluded)
  # classifier: alpha of mixup's Beta distribution, >= 0; 0: not mixed.
  config.mixup = 0.0
  # ohem: pixels are hard if their class has a smaller probability, at least
  # ohem_min_kept an image. None: those ohem_min_kept with the largest loss.
  config.ohem_threshold = placeholder(float)
  config.ohem_min_kept = 100_000  # (mmseg)
  config.focal_gamma = 2.0  # >= 0 (mmseg)
  config.focal_alpha = 0.5  # of the right class, 0 to 1; only sigmoid (mmseg)
  config.focal_activation = 'sigmoid'  # (mmseg) or 'softmax'
  config.lovasz_per_image = False  # True: a loss for each image, averaged
  return config


def optimizer() -> ConfigDict:
  """The optimizer; the defaults are mmseg's SGD and poly schedule."""
  config = ConfigDict()
  config.name = 'sgd'  # or 'adamw'
  config.learning_rate = 0.01  # at step 0, for the global batch
  config.min_learning_rate = 1e-4  # at the last step
  config.schedule = 'poly'  # or 'cosine': from the former to the latter
  config.power = 0.9  # of poly, > 0
  # Before the schedule, as part of train.total_steps: a linear rise to
  # learning_rate, from warmup_ratio times that.
  config.warmup_steps = 0
  config.warmup_ratio = 1e-6  # 0 to 1
  config.momentum = 0.9  # sgd: 0 to 1 (excluded)
  config.nesterov = False  # sgd
  # What the first update is for the schedule: 0 (PyTorch) or 1 (MXNet).
  config.first_count = 0
  config.beta1 = 0.9  # adamw: 0 to 1 (excluded)
  config.beta2 = 0.999  # adamw: 0 to 1 (excluded)
  config.epsilon = 1e-8  # adamw: > 0
  # >= 0. sgd: added to the gradient; adamw: decoupled, times the rate.
  config.weight_decay = 5e-4
  config.decay_norm_bias = True  # False: only convolution kernels decay
  # Multiplies the rate of stage 4 relative to the heads, that of stage 3
  # relative to stage 4, and so on to the stem; > 0 to 1.
  config.layer_decay = 1.0
  config.head_multiplier = 1.0  # multiplies the heads' rate, > 0
  config.clip_norm = placeholder(float)  # longest gradient, > 0; None: any
  return config


def model() -> ConfigDict:
  """The network. None: the backbone's name decides."""
  config = ConfigDict()
  config.backbone = 'resnest101'  # an unknown name lists the known ones
  config.in_channels = 3  # follows data.bands
  config.stage_sizes = placeholder(tuple)  # blocks of each of the 4 stages
  config.stem_width = placeholder(int)  # channels of the first convolution
  config.width = placeholder(int)  # channels of stage 1, doubled each stage
  config.radix = placeholder(int)  # splits of the split attention
  config.groups = placeholder(int)  # cardinality
  config.base_width = placeholder(int)  # channels of a group where width is 64
  config.output_stride = 8  # pixels per feature of the last stage: 8, 16, 32
  # In the block that gave its stride to dilation, 'mmseg' drops the average
  # pool, 'official' keeps it at stride 1, 'timm' pools the shortcut. Weights
  # load under any rule and give wrong results under another than their own.
  config.dilation_rule = 'mmseg'
  # mmsegmentation's 'fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus', or the
  # authors' 'encoding_fcn', 'encoding_pspnet', 'encoding_deeplabv3' (of
  # PyTorch-Encoding), which are other networks. 'classifier': one class for
  # each image; docs/classify.md.
  config.head = 'pspnet'
  config.head_channels = 512  # inside the head (mmseg); encoding_deeplabv3: 256
  config.aux_channels = 256  # inside the auxiliary head on stage 3 (mmseg)
  config.num_classes = 150  # 0: as many as the data set has
  # Before both classifiers, 0 to 1 (excluded) (mmseg). encoding_deeplabv3 has
  # another one of 0.5 behind its pyramid, unless this is 0.
  config.dropout = 0.1
  # Batch norms that use the running statistics in training and keep them:
  # 'none', 'backbone' (mmseg's norm_eval) or 'all'.
  config.frozen_bn = 'none'
  # Whether running variances are means of the biased variance (MXNet, the
  # authors), not of the unbiased one (PyTorch). None: with an encoding_ head.
  config.biased_variance = placeholder(bool)
  # classifier: share of stages 3 and 4 that DropBlock leaves out at the last
  # step, from nearly 0 on; 0 to 1 (excluded).
  config.dropblock = 0.0
  # Type of activations; parameters, statistics and loss are at least float32.
  config.dtype = 'float32'  # or 'bfloat16', 'float64'
  return config


def data() -> ConfigDict:
  """The images and their augmentation."""
  config = ConfigDict()
  config.name = 'ade20k'
  config.data_dir = 'data'  # where resnest_jax.data.prepare wrote it
  config.folder = folder()  # for 'folder' and 'class_folder': your own data
  # Names of all bands of your own images, in their order: red,green,blue,nir.
  # 1 to 16 bands of 8 or 16 bits or floats; docs/bands.md. (): 8-bit RGB.
  config.bands = ()
  config.train_split = 'train'
  config.eval_split = 'validation'
  # Choice of samples. 'uniform': each once an epoch (mmseg). 'repeat_factor':
  # samples with rare classes more often. 'class_balanced': the classes take
  # turns, whatever their number of images.
  config.sampling = 'uniform'
  # Classes in a smaller share of the images are repeated (repeat_factor).
  config.repeat_threshold = 0.05  # 0 to 1
  # Whose way training resizes, crops and mirrors: 'mmseg' (mmsegmentation) or
  # 'encoding' (PyTorch-Encoding); docs/data.md. 'imagenet': for classifiers.
  config.augmentation = 'mmseg'
  # Pixels (long edge, short edge): images are resized to fit, keeping their
  # shape, in training and in evaluation (mmseg). 'encoding': both are the long.
  # 'imagenet': both are the edge of the crop in evaluation.
  config.image_scale = (2048, 512)
  config.scale_range = (0.5, 2.0)  # image_scale times a uniform draw (mmseg)
  config.crop_size = (512, 512)  # pixels (height, width) (mmseg)
  # A crop is drawn again, up to 10 times, while one class covers more than
  # this share of its labelled pixels; 1 takes the first (mmseg). 'encoding': 1.
  config.cat_max_ratio = 0.75
  config.flip_probability = 0.5  # left to right, 0 to 1 (mmseg)
  config.photometric = True  # random brightness, contrast, saturation, hue
  # The next six come on top, whatever the augmentation; docs/data.md. Angles
  # are drawn between -rotation and rotation, in degrees; 0 to 180.
  config.rotation = 0.0
  config.quarter_turns = False  # by 0, 90, 180 or 270 degrees
  config.vertical_flip_probability = 0.0  # top to bottom, 0 to 1
  config.blur_probability = 0.0  # 0 to 1
  config.erase_probability = 0.0  # of a rectangle; 0 to 1
  # Your own, of Albumentations: FILE.py:FUNCTION, or '' for none.
  config.transform = ''
  # The next six are of 'imagenet'. Random operations on the whole picture:
  # 'autoaugment', 'randaugment' or 'none'.
  config.policy = 'none'
  # 'resized': 8 % to all of the picture (torchvision). 'encoding': 10 % to all,
  # drawn as PyTorch-Encoding does.
  config.random_crop = 'resized'
  config.interpolation = 'bilinear'  # of crops in training; or 'bicubic'
  config.color_jitter = 0.0  # of brightness, contrast, saturation; 0 to 1
  config.lighting = 0.0  # deviation of the shift along ImageNet's colours
  # The crop of evaluation: 'encoding', whose share of the short edge is
  # size / (size + 32), or 'gluon', 0.875 below 320 pixels.
  config.center_crop = 'encoding'
  # Samples of both splits that are examined before the first step, 0 for
  # none; docs/doctor.md.
  config.doctor_samples = 50
  # Unreadable samples in training. False: stop with the name. True: take
  # another sample, count it and say so. Evaluation always stops.
  config.skip_unreadable = False
  # A picture or mask of more pixels, as its header says, is unreadable: files
  # of a few kilobytes can decode to gigabytes.
  config.max_pixels = 10**8
  # Only speed: these change no batch.
  config.num_workers = 0  # processes that read and augment; 0: this process
  config.num_threads = 0  # readers per process; 0: one per core, 16 at most
  config.prefetch = 4  # batches ready in advance, in each process
  # Seconds that training waits for a batch before it saves its state and stops.
  # After a tenth of that it names the sample it waits for.
  config.timeout = 600.0
  return config


def folder() -> ConfigDict:
  """Your own files; paths are relative to `data_dir`.

  Splits are given if `images` has a sub folder with a split's name ('train'),
  or another form of it (Train, training, val2017, valid), or a path has {split}
  in it, which stands for that name. Otherwise they are drawn.
  """
  config = ConfigDict()
  config.classes = 'classes.txt'  # names and colours; see docs/own-data.md
  config.images = 'images'  # folder of JPEG, PNG, ... files and sub folders
  config.masks = 'masks'  # folder of 8-bit PNG files of the same names
  # Endings of the names, if images and masks differ: '_rgb.jpg', '_mask'. Files
  # with other endings are skipped. '': only the extension.
  config.image_suffix = ''
  config.mask_suffix = ''
  config.image_prefix = ''  # as the endings, for how names begin: 'img_'
  config.mask_prefix = ''
  # Instead of folders: files of lines "image mask", relative to the file, or of
  # names in the folders; 'lists/{split}.txt' for one per split.
  config.lists = ''
  config.eval_fraction = 0.2  # share drawn for val, by name and seed
  config.split_seed = 0
  return config


def cityscapes(config: ConfigDict) -> None:
  """Applies mmseg's 80k schedule, which all rows on Cityscapes share."""
  config.model.num_classes = 19
  config.data.name = 'cityscapes'
  config.data.image_scale = (2048, 1024)  # the size of all its images
  config.data.crop_size = (512, 1024)
  config.train.total_steps = 80_000
  config.train.batch_size = 8
  config.train.eval_steps = 8_000
  config.eval.batch_size = 1  # images have six times the pixels of ADE20K's


def encoding(
  config: ConfigDict, name: str, backbone: str, head: str
) -> ConfigDict:
  """Applies the authors' own recipe, of PyTorch-Encoding's `train.py`."""
  config.name = f'ade20k_encoding_{name}'
  config.model.backbone = backbone
  config.model.dilation_rule = 'official'
  config.model.head = f'encoding_{head}'
  config.model.head_channels = {'fcn': 512, 'deeplabv3': 256}[head]
  config.data.augmentation = 'encoding'
  config.data.image_scale = (520, 520)  # the base size, of the long edge
  config.data.crop_size = (480, 480)
  config.data.cat_max_ratio = 1.0
  config.data.photometric = False
  config.eval.protocol = 'encoding'
  config.loss.avg_non_ignore = True
  config.loss.aux_weight = 0.2
  config.optimizer.learning_rate = 0.004
  config.optimizer.min_learning_rate = 0.0
  config.optimizer.head_multiplier = 10.0
  config.optimizer.weight_decay = 1e-4
  epoch = 1263  # steps of 16 of the 20,210 images
  config.train.total_steps = 180 * epoch
  config.train.eval_steps = 10 * epoch
  return config


def classifier(config: ConfigDict) -> ConfigDict:
  """What all classifiers share: the authors' network and augmentation."""
  config.model.head = 'classifier'
  config.model.output_stride = 32
  config.model.dilation_rule = 'official'
  config.model.dropout = 0.0
  config.data.augmentation = 'imagenet'
  config.data.image_scale = (224, 224)
  config.data.crop_size = (224, 224)
  config.loss.aux_weight = 0.0
  config.loss.label_smoothing = 0.1
  config.optimizer.schedule = 'cosine'
  config.optimizer.min_learning_rate = 0.0
  config.optimizer.warmup_ratio = 0.0
  config.optimizer.nesterov = True
  config.optimizer.weight_decay = 1e-4
  config.optimizer.decay_norm_bias = False
  config.eval.batch_size = 64
  return config


# By depth: edge of the crop in training and in evaluation, images a step and a
# GPU, share that is dropped before the last layer.
_IMAGENET = {
  50: (224, 224, 8192, 128, 0.0),
  101: (224, 256, 4096, 64, 0.0),
  200: (256, 320, 2048, 32, 0.2),
  269: (320, 416, 2048, 32, 0.2),
}


def imagenet(config: ConfigDict, depth: int) -> ConfigDict:
  """Applies the recipe of the published weights, the authors' in MXNet."""
  train, evaluation, batch, of_gpu, dropout = _IMAGENET[depth]
  classifier(config)
  config.name = f'imagenet_resnest{depth}'
  config.model.backbone = f'resnest{depth}'
  config.model.num_classes = 1000
  config.model.dropout = dropout
  config.model.dropblock = 0.1
  config.model.biased_variance = True
  config.data.name = 'imagenet'
  config.data.crop_size = (train, train)
  config.data.image_scale = (evaluation, evaluation)
  config.data.policy = 'autoaugment'
  if train >= 320:
    config.data.random_crop = 'encoding'
    config.data.interpolation = 'bicubic'
  config.data.color_jitter = 0.4
  config.data.lighting = 0.1
  config.loss.mixup = 0.2
  config.optimizer.learning_rate = 0.1 * batch / 256
  config.optimizer.first_count = 1
  epoch = 1_281_167 // batch
  config.optimizer.warmup_steps = 5 * epoch
  config.train.total_steps = 270 * epoch
  config.train.batch_size = batch
  config.train.norm_group = of_gpu
  # What four chips of 16 GB hold of a batch that was shared by 64 GPUs.
  config.train.micro_batch_size = 4 * of_gpu
  config.train.eval_steps = 10 * epoch
  config.train.checkpoint_steps = epoch
  return config


def vary(config: ConfigDict, argument: str | None) -> ConfigDict:
  """Applies the argument after the colon of `configs/x.py:argument`.

  None and '' are the row itself, 'mini' its small twin, '16gb' a segmentor's
  row on one device of 16 GB.

  Raises:
    UserError: another argument.
  """
  if argument == 'mini':
    return mini(config)
  if argument == '16gb':  # The same but for rounding.
    config.model.dtype = 'bfloat16'
    config.train.remat = 'blocks'
  elif argument:
    raise UserError(
      f'unknown argument {argument!r} after the colon of the config; '
      "accepted: 'mini', '16gb' (or no colon at all for the full row)."
    )
  return config


def mini(config: ConfigDict) -> ConfigDict:
  """The same code, small enough that two CPU cores train it in minutes."""
  config.name += '_mini'
  config.model.stage_sizes = (1, 1, 1, 1)
  config.model.stem_width = 16
  config.model.width = 16
  config.model.head_channels = 128
  config.model.aux_channels = 64
  config.optimizer.learning_rate = 0.05
  config.optimizer.min_learning_rate = 5e-4
  if config.model.head == 'classifier':
    return _mini_classifier(config)
  if config.data.name == 'cityscapes':
    config.data.image_scale = (256, 128)
    config.data.crop_size = (96, 192)
  else:
    config.data.image_scale = (512, 128)
    config.data.crop_size = (128, 128)
  if config.data.augmentation == 'encoding':
    config.data.image_scale = (192, 192)
    config.optimizer.learning_rate = 0.01  # ten times that in the heads
    config.optimizer.min_learning_rate = 0.0
  if config.data.name != 'folder':  # There is no small twin of your own data.
    config.data.name += '_mini'
  config.data.scale_range = (0.75, 1.5)  # narrower: it trains from scratch
  config.train.total_steps = 300
  config.train.batch_size = 16
  config.train.log_steps = 10
  config.train.eval_steps = 75
  config.train.checkpoint_steps = 25
  config.eval.batch_size = 8
  config.eval.bucket = 128  # few shapes: compiling dominates here
  return config


def _mini_classifier(config: ConfigDict) -> ConfigDict:
  config.data.image_scale = config.data.crop_size = (64, 64)
  # Less is changed: it trains from scratch, for few steps.
  config.data.policy = 'none'
  config.loss.mixup = 0.0
  if config.data.name == 'imagenet':
    config.data.name = 'imagenet_mini'
    config.model.num_classes = 0  # as many as were drawn
    config.train.norm_group = 16
    config.train.micro_batch_size = 0
  config.pretrained = ''  # Of other sizes.
  config.model.frozen_bn = 'none'
  config.optimizer.learning_rate = 0.03
  config.optimizer.warmup_steps = 30
  config.train.total_steps = 600
  config.train.batch_size = 32
  config.train.log_steps = 10
  config.train.eval_steps = 150
  config.train.checkpoint_steps = 25
  return config
