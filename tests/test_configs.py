"""Configuration files, their checks and the command line that changes them."""

import functools
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from data.refusals import refused
from hosts import ROOT

import resnest_jax as rj
from resnest_jax import config as configs
from resnest_jax.config import flatten, load_config
from resnest_jax.config_keys import FREE_KEYS, HOST_KEYS, KEYS
from resnest_jax.overrides import SYNONYMS

FOLDER = ROOT / 'configs'
FILES = sorted(f for f in FOLDER.glob('*.py') if f.stem != 'common')
OWN = 'folder', 'classify_folder'  # They have no reference.
CLASSIFIERS = [f for f in FILES if f.stem.startswith(('imagenet', 'classify'))]
ROWS = [f for f in FILES if f.stem not in OWN and f not in CLASSIFIERS]
ROW = 'ade20k_pspnet'
# Lines 1 to 3 of a file.
FUNCTION = 'from configs import common\ndef get_config():\n'
FUNCTION += '  c = common.get_config()\n'

MMSEG = [f for f in ROWS if '_encoding_' not in f.stem]

each_file = pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
each_row = pytest.mark.parametrize('path', ROWS, ids=lambda path: path.stem)


@each_file
def test_row_is_named_after_its_file_and_documented(path):
  config, source = load_config(path), path.read_text()
  assert config.name == path.stem
  assert f'--config configs/{path.name}' in source.split('"""')[1]
  whose = "(?:PyTorch-(Encoding)'s )?"
  found = re.search(rf'"""\w+, {whose}([\w+]+), .*, crop (\d+x\d+),', source)
  head = '_'.join(filter(None, found.groups()[:2])).lower()
  assert head.replace('+', 'plus') == config.model.head
  assert found[3] == 'x'.join(map(str, config.data.crop_size))


@each_file
def test_mini_changes_sizes_only(path):
  row, mini = (flatten(load_config(f'{path}{x}')) for x in ('', ':mini'))
  changed = {key for key in row if row[key] != mini[key]}
  name = row['data.name'] + ('' if path.stem in OWN else '_mini')
  assert (mini['model.stage_sizes'], mini['data.name']) == ((1, 1, 1, 1), name)
  assert mini['train.total_steps'] <= max(row['train.total_steps'] / 100, 600)
  assert mini['model.num_classes'] in (0, row['model.num_classes'])
  kept = 'head', 'backbone', 'output_stride', 'dilation_rule', 'dropblock'
  kept = {*(f'model.{x}' for x in kept), 'data.cat_max_ratio'}
  kept |= {'optimizer.momentum', 'optimizer.weight_decay', 'loss.aux_weight'}
  assert not changed & kept


def test_16gb_changes_no_result():
  row, small = flatten(load_config(ROW)), flatten(load_config(f'{ROW}:16gb'))
  changed = {'model.dtype': 'bfloat16', 'train.remat': 'blocks'}
  assert row | changed == small


@each_row
def test_network_can_be_built(path):
  config = load_config(path)
  height, width = config.data.crop_size
  network = rj.create_segmentor(config.model)
  build = functools.partial(network.init_with_output, train=False)
  image = jax.ShapeDtypeStruct((1, height, width, 3), np.float32)
  out, _ = jax.eval_shape(build, jax.random.key(0), image)
  stride = 4 if config.model.head == 'deeplabv3plus' else 8
  for logits, step in ((out.aux_logits, 8), (out.logits, stride)):
    expected = (1, height // step, width // step, config.model.num_classes)
    assert logits.shape == expected


def assert_recipe(path, expected):
  row = flatten(load_config(path))
  assert {key: row[key] for key in expected} == expected


# Long and short edge, crop, classes, steps, batch.
PUBLISHED = {
  'ade20k': ((2048, 512), (512, 512), 150, 160_000, 16),
  'cityscapes': ((2048, 1024), (512, 1024), 19, 80_000, 8),
}
SIZES = 'data.image_scale', 'data.crop_size', 'model.num_classes'
SIZES += 'train.total_steps', 'train.batch_size'
MMSEGS = {
  **{'model.backbone': 'resnest101', 'model.dilation_rule': 'mmseg'},
  **{'model.output_stride': 8, 'data.scale_range': (0.5, 2.0)},
  **{'optimizer.learning_rate': 0.01, 'optimizer.weight_decay': 0.0005},
  'loss.aux_weight': 0.4,
}


@pytest.mark.parametrize('path', MMSEG, ids=lambda path: path.stem)
def test_row_is_the_published_recipe(path):
  name, head = path.stem.split('_')
  sizes = dict(zip(SIZES, PUBLISHED[name], strict=True))
  assert_recipe(path, MMSEGS | sizes | {'data.name': name, 'model.head': head})


# What PyTorch-Encoding's train.py sets, or leaves at its defaults.
AUTHORS = {
  **{'model.num_classes': 150, 'model.output_stride': 8, 'model.dropout': 0.1},
  **{'model.dilation_rule': 'official', 'model.aux_channels': 256},
  **{'data.name': 'ade20k', 'data.augmentation': 'encoding'},
  **{'data.image_scale': (520, 520), 'data.crop_size': (480, 480)},
  **{'data.scale_range': (0.5, 2.0), 'data.photometric': False},
  **{'loss.avg_non_ignore': True, 'loss.aux_weight': 0.2},
  **{'optimizer.learning_rate': 0.004, 'optimizer.min_learning_rate': 0.0},
  **{'optimizer.head_multiplier': 10.0, 'optimizer.weight_decay': 1e-4},
  **{'optimizer.power': 0.9, 'optimizer.decay_norm_bias': True},
  **{'eval.protocol': 'encoding', 'eval.flip': True},
  **{'eval.scales': (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)},
  **{'train.total_steps': 180 * (20_210 // 16), 'train.batch_size': 16},
}


@pytest.mark.parametrize('path', [f for f in ROWS if f not in MMSEG])
def test_row_is_the_authors_recipe(path):
  head, depth = path.stem.split('_')[2:]
  channels = {'fcn': 512, 'deeplabv3': 256}[head]
  its = {'model.head': f'encoding_{head}', 'model.head_channels': channels}
  assert_recipe(path, AUTHORS | its | {'model.backbone': f'resnest{depth}'})


# By depth, as the authors' commands for MXNet have it: crop of training and of
# evaluation, batch and peak rate, images a GPU, dropout, updates an epoch.
COMMANDED = {
  50: (224, 224, 8192, 3.2, 128, 0.0, 156),
  101: (224, 256, 4096, 1.6, 64, 0.0, 312),
  200: (256, 320, 2048, 0.8, 32, 0.2, 625),
  269: (320, 416, 2048, 0.8, 32, 0.2, 625),
}
IN_ALL = {
  **{'model.head': 'classifier', 'model.output_stride': 32},
  **{'model.num_classes': 1000, 'model.dilation_rule': 'official'},
  **{'model.dropblock': 0.1, 'model.biased_variance': True},
  **{'data.name': 'imagenet', 'data.augmentation': 'imagenet'},
  **{'data.policy': 'autoaugment', 'data.center_crop': 'encoding'},
  **{'data.flip_probability': 0.5, 'data.lighting': 0.1},
  **{'data.color_jitter': 0.4, 'loss.mixup': 0.2, 'loss.label_smoothing': 0.1},
  **{'optimizer.name': 'sgd', 'optimizer.nesterov': True},
  **{'optimizer.schedule': 'cosine', 'optimizer.first_count': 1},
  **{'optimizer.momentum': 0.9, 'optimizer.weight_decay': 1e-4},
  **{'optimizer.decay_norm_bias': False, 'optimizer.warmup_ratio': 0.0},
  'optimizer.min_learning_rate': 0.0,
}


@pytest.mark.parametrize('depth', COMMANDED)
def test_classifier_is_the_recipe_of_the_published_weights(depth):
  crop, evaluation, batch, rate, of_gpu, dropout, epoch = COMMANDED[depth]
  way = ('encoding', 'bicubic') if crop >= 320 else ('resized', 'bilinear')
  its = {
    **{'model.backbone': f'resnest{depth}', 'model.dropout': dropout},
    **{'data.crop_size': (crop,) * 2, 'data.image_scale': (evaluation,) * 2},
    **{'data.random_crop': way[0], 'data.interpolation': way[1]},
    **{'optimizer.learning_rate': rate, 'optimizer.warmup_steps': 5 * epoch},
    **{'train.total_steps': 270 * epoch, 'train.batch_size': batch},
    'train.norm_group': of_gpu,
    'train.micro_batch_size': 4 * of_gpu,
  }
  assert_recipe(FOLDER / f'imagenet_resnest{depth}.py', IN_ALL | its)


def test_number_of_classes_is_that_of_the_data():
  config = load_config(FOLDER / 'folder.py')
  assert config.model.num_classes == 0
  refused('0 by the number of the data', rj.create_segmentor, config.model)
  for _ in range(2):
    configs.fit_num_classes(config, 7)
    assert config.model.num_classes == 7
  told = 'folder has 8 classes. Set --config.model.num_classes=8'
  refused(told, configs.fit_num_classes, config, 8)


READ = [
  ('train.total_steps', '20', 20),
  ('optimizer.learning_rate', '1', 1.0),
  ('data.crop_size', '(64, 96)', (64, 96)),
  ('data.crop_size', '64,96', (64, 96)),
  ('data.crop_size', [64, 96], (64, 96)),
  ('data.photometric', 'True', True),
  ('data.data_dir', 'none', 'none'),
  ('model.width', 'none', None),
  ('loss.class_weights', 'median_frequency', 'median_frequency'),
  ('loss.class_weights', [1, 0.5], (1, 0.5)),
  ('loss.class_weights', 'None', None),
  ('train.total_epochs', '3', 3),
  ('seed', str(2**63 - 1), 2**63 - 1),
  ('optimizer.clip_norm', '1e30', 1e30),
]


@pytest.mark.parametrize(('key', 'given', 'value'), READ)
def test_override_is_read_as_the_type_of_its_key(key, given, value):
  result = flatten(load_config(ROW, {key: given}))[key]
  assert (result, type(result)) == (value, type(value))


# Message: keys and values that are refused with it.
WRONG = {
  "a whole number, not '1.5'": 'train.total_steps=1.5',
  'a whole number, not': 'train.total_steps=none',
  r'a whole number, not .1+ \.\.\. 1+.\.': f'seed={"1" * 5000}',
  'true or false': 'data.photometric=1',
  '2 positive whole numbers': 'data.crop_size=64 data.crop_size=64,0',
  'numbers with commas': f'data.crop_size={{[]:1}} data.crop_size={"(" * 3000}',
  r'\(long edge, short edge\)': 'data.image_scale=512,2048',
  'at most 100, the smaller first': (
    'data.scale_range=2.0,0.5 data.scale_range=1,1e9'
  ),
  'from 0 to 1': 'data.flip_probability=1.5',
  r'mmseg, encoding, imagenet \(did you mean mmseg': 'data.augmentation=mseg',
  'one of uniform, repeat_factor, class_bal': 'data.sampling=random',
  '4 positive whole numbers': 'model.stage_sizes=1,1,1',
  'below 1': 'model.dropout=1',
  'at least 1': 'model.radix=0',
  'at least 2, or 0': 'model.num_classes=1',
  'above 0 and below 1': 'data.folder.eval_fraction=1',
  'at least 2': 'train.batch_size=1',
  'above 0': 'optimizer.learning_rate=1e999',
  'one of whole, slide, ms_flip_0x, ms_flip_1x': 'eval.protocol=ms_flip',
  'at most the window, which is 512,512': 'eval.slide_stride=600,512',
  'one or more positive numbers': 'eval.scales=()',
  'at most optimizer.learning_rate': 'optimizer.min_learning_rate=0.5',
  r'sgd, adamw \(did you mean adamw\?\)': 'optimizer.name=adam',
  'below train.total_steps, 160000': 'optimizer.warmup_steps=160000',
  'above 0 and at most 1': 'optimizer.layer_decay=1.1',
  'at least 0': 'loss.terms.dice=-1',
  'numbers of at least 0, not all 0': 'loss.class_weights=0,0',
  r'median_frequency \(did you mean inverse_sqrt\?\)': (
    'loss.class_weights=inv_sqrt'
  ),
  'at most 1e': 'loss.class_weights=1e300,1 eval.fscore_beta=1e300',
  f'at most {2**63 - 1}': f'seed={10**20}',
  f'at most {2**31 - 1}': f'train.total_steps={10**30}',
  'at most 65536': (
    'train.batch_size=1000000000 model.num_classes=1000000000 '
    'data.crop_size=1000000,8 eval.bucket=1000000'
  ),
  'at most 4096': 'data.num_workers=1000000',
  'at most 100': 'eval.scales=1e9',
}


@pytest.mark.parametrize('message', WRONG)
def test_wrong_value_is_refused_by_name(message):
  for key, value in (word.split('=') for word in WRONG[message].split()):
    refused(f'config.{key} .*{message}', load_config, ROW, {key: value})
  refused('number, not True', load_config, ROW, {'train.total_steps': True})


ENCODING = {'data.augmentation': 'encoding', 'data.image_scale': (520, 520)}
ENCODING |= {'data.cat_max_ratio': 1.0}


def test_augmentation_of_pytorch_encoding_needs_values_of_its_own(tmp_path):
  assert flatten(load_config(ROW, ENCODING)).items() >= ENCODING.items()
  for key, accepted in (
    ('data.image_scale', r'\(2048, 512\); it must be one edge twice, as 520,'),
    ('data.cat_max_ratio', '0.75; it must be 1 with data.augmentation=enc'),
  ):
    given = {name: ENCODING[name] for name in ENCODING if name != key}
    refused(f'config.{key} is {accepted}', load_config, ROW, given)
  lines = (f'  c.{key} = {value!r}\n' for key, value in ENCODING.items())
  text = f'{FUNCTION}{"".join(lines)}  return common.mini(c)'
  (tmp_path / 'own.py').write_text(text)
  assert load_config(tmp_path / 'own.py').data.image_scale == (192, 192)


def test_classifiers_see_squares():
  for key in 'data.image_scale', 'data.crop_size':
    told = f'config.{key} is .*one edge twice, as 520,520, with .*imagenet'
    refused(told, load_config, 'imagenet_resnest50', {key: '96,64'})


def test_configuration_without_a_loss_is_refused():
  told = 'no loss: .* cross_entropy, dice'
  refused(told, load_config, ROW, {'loss.terms.cross_entropy': 0})


def test_key_that_a_row_sets_can_be_reset():
  assert load_config(f'{ROW}:mini').model.width == 16
  model = load_config(f'{ROW}:mini', {'model.width': 'none'}).model
  assert (model.width, rj.create_segmentor(model).backbone.width) == (None, 64)


UNEVEN = {
  r'64 channels, .* model.radix \(3\) must divide': {'model.radix': 3},
  '14 channels, .* model.width .7., mod': {'model.width': 7, 'model.groups': 2},
  'stage 1 has 0 channels': {'model.width': 1, 'model.base_width': 1},
  r'32 channels, .* model.groups \(5\)': {'model.groups': 5, 'model.width': 4},
}


@pytest.mark.parametrize('message', UNEVEN)
def test_channels_that_groups_cannot_share_are_refused(message):
  refused(message, rj.create_segmentor, load_config(ROW, UNEVEN[message]).model)


def test_every_key_has_its_facts():
  """Those of sections stand for keys that earlier versions had, too."""
  flat = flatten(load_config(ROW))
  assert KEYS.keys() ^ flat.keys() == {'mesh', 'eval'}
  assert {'mesh', 'eval', 'data.prefetch', *HOST_KEYS} < set(FREE_KEYS)
  assert 'train.batch_size' not in FREE_KEYS
  assert flat.keys() >= set(SYNONYMS.values())


NEAREST = {
  'did you mean model.dropout?': ['model.dropuot'],
  'did you mean eval.batch_size or train.batch_size?': ['batch_size'],
  'keys loss.aux_weight, loss.avg_non_ignore': ['loss'],
  'did you mean loss.terms.lovasz?': ['loss.lovas'],
  'optimizer.warmup_ratio or optimizer.warmup_steps?': ['optimizer.warmup'],
  'did you mean optimizer.learning_rate?': ['optimizer.lr', 'optim.LR', 'lr'],
  'did you mean optimizer.weight_decay?': ['wd'],
  'did you mean pretrained?': ['load_from'],
  'did you mean train.total_steps?': ['train.max_iters'],
  'did you mean train.total_epochs?': ['train.epochs', 'max_epochs'],
  'did you mean model.backbone?': ['model.arch'],
  'configs/common.py': ['xyz'],
  'removed; train.remat=stages': ['train.accumulation'],
}


@pytest.mark.parametrize('nearest', NEAREST)
def test_unknown_key_names_the_nearest(nearest):
  for key in NEAREST[nearest]:
    told = f'unknown config key {key!r}.*{re.escape(nearest)}'
    refused(told, load_config, ROW, {key: '1'})


def test_rows_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in 'folder', 'folder.py', 'configs/folder', 'configs/folder.py':
    assert load_config(f'{name}:mini').name == 'folder_mini', name


def test_files_next_to_a_mistyped_one_are_named_by_path(tmp_path):
  (tmp_path / 'leaves.py').write_text(f'{FUNCTION}  return 1')
  (tmp_path / 'helper.py').write_text('')
  told = rf'did you mean {tmp_path}/leaves.py\?((?!helper).)*$'
  refused(told, load_config, tmp_path / 'leafs.py')
  refused('takes no argument', load_config, f'{tmp_path}/leaves.py:mini')


LACKING = f'{FUNCTION}  c.unlock()\n  del c.eval.flip\n  return c'
MISTAKES = {
  r'own\.py, line 4: SyntaxError': f'{FUNCTION}  x = (',
  r"own\.py, line 4: .*'nmae'; did you mean name": f'{FUNCTION}  c.nmae = 1',
  "'flp'; did you mean eval.flip": f'{FUNCTION}  c.eval.flp',
  "power must be a number, not 'x'": f'{FUNCTION}  c.optimizer.power = "x"',
  'has no function get_config': 'x = 1',
  r'own\.py, line 1: SyntaxError': 'x = "\\0',
  'no whole configuration: name, seed, pret': 'def get_config(): pass',
  'no whole configuration: name, se': f'{FUNCTION}  return common.loss()',
  r'no whole configuration: eval\.flip is missing. Begin with config': LACKING,
  r'own\.py, line 2: RecursionE': 'def get_config():\n  return get_config()',
}
KINDS = {'data.folder.mask_suffix': 'a string', 'eval.flip': 'true or false'}
KINDS |= {'data.crop_size': 'numbers with', 'train.total_steps': 'a whole num'}
MISTAKES |= {
  f'config.{x} is None; it must be {y}': f'{FUNCTION}  c.{x} = None\n  return c'
  for x, y in KINDS.items()
}


@pytest.mark.parametrize('message', MISTAKES)
def test_mistake_in_a_config_file_is_reported(tmp_path, message):
  (tmp_path / 'own.py').write_text(MISTAKES[message])
  refused(message, load_config, tmp_path / 'own.py')


IMPORTS = 'from configs import common', 'import configs.common as common'


@pytest.mark.parametrize('place', ['mine.py', 'configs/mine.py', 'a/b/mine.py'])
@pytest.mark.parametrize('other', ['x.py', 'configs/__init__.py', 'configs.py'])
@pytest.mark.parametrize('line', IMPORTS)
def test_own_file_imports_defaults(place, other, line, tmp_path, monkeypatch):
  """Whatever else is called configs; the clone is not on the path."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
  text = f'{FUNCTION.replace(IMPORTS[0], line)}  return c'
  for path, written in ((Path(other), ''), (Path(place), text)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written)
  before = list(sys.path), sys.modules.keys() - {'configs'}
  assert load_config(place).seed == 0
  assert (sys.path, sys.modules.keys() - {'configs'}) == before


def test_own_defaults_come_before_the_shipped_ones(tmp_path):
  folder = shutil.copytree(FOLDER, tmp_path / 'configs')
  text = (folder / 'common.py').read_text().replace('seed = 0', 'seed = 5')
  (folder / 'common.py').write_text(text)
  found = [load_config(x).seed for x in (folder / 'folder.py', 'folder')]
  assert found == [5, 0]
