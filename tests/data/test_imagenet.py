"""ImageNet from archives in the layout of the release, to samples."""

import io
import json
import tarfile

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from data.refusals import refused
from PIL import Image

from resnest_jax.config import load_config
from resnest_jax.data import imagenet, prepare, tfds_layouts
from resnest_jax.data.datasets import DATASETS, Dataset, open_split, open_splits
from resnest_jax.data.images import decode_image
from resnest_jax.data.mini import imagenet_mini
from resnest_jax.labels import IMAGENET, SYNSETS, class_names

CLASSES = {'n01440764': 'tench', 'n02105855': 'Shetland sheepdog'}
CONFIG = imagenet.ImagenetConfig(
  name='release',
  description='Two classes.',
  counts={'train': 4, 'validation': 2},
  classes=CLASSES,
)


def photograph(seed, mode='RGB', kind='JPEG', **options):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(60, 200, (3, 4, 3)).repeat(8, 0).repeat(8, 1)
  file = io.BytesIO()
  picture = Image.fromarray(coarse.astype(np.uint8)).convert(mode)
  picture.save(file, kind, **options)
  return file.getvalue()


def tar(files, comment=''):
  file = io.BytesIO()
  imagenet_mini._write(file, files.items(), comment)
  return file.getvalue()


PICTURES = {
  'n01440764_10026.JPEG': photograph(0),
  'n01440764_7.JPEG': photograph(1, 'L'),
  'n02105855_2933.JPEG': photograph(2, kind='PNG'),
  'n02105855_5.JPEG': photograph(0, 'CMYK'),
}
TURNED = Image.Exif()
TURNED[0x0112] = 6
# By tfds' list the first two are of these classes.
VALIDATION = {
  'ILSVRC2012_val_00000002.JPEG': photograph(4),
  'ILSVRC2012_val_00000001.JPEG': photograph(3, exif=TURNED),
}


def train_tar(pictures=PICTURES, classes=CLASSES, comment=''):
  inner = {
    f'{x}.tar': tar({n: y for n, y in pictures.items() if n.startswith(x)})
    for x in classes
  }
  return tar(inner, comment)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder of both archives."""
  labels = ['n02105855', 'n01440764']
  monkeypatch.setattr(imagenet, 'validation_classes', lambda *_: labels)
  monkeypatch.setattr(imagenet.Imagenet2012, 'BUILDER_CONFIGS', [CONFIG])
  # Which tfds keeps, once any test has looked at them.
  known = {CONFIG.name: CONFIG}
  monkeypatch.setattr(imagenet.Imagenet2012, 'builder_configs', known)
  dataset = Dataset(
    imagenet.Imagenet2012,
    CONFIG,
    class_names('imagenet', CLASSES.values()),
    theirs=tfds_layouts.IMAGENET,
  )
  monkeypatch.setitem(DATASETS, 'imagenet', dataset)
  path = tmp_path / 'archives'
  path.mkdir()
  (path / imagenet.TRAIN).write_bytes(train_tar())
  (path / imagenet.VALIDATION).write_bytes(tar(VALIDATION))
  return path


def prepared(folder):
  data_dir = folder.parent / 'data'
  prepare.prepare(DATASETS['imagenet'], data_dir, folder)
  return data_dir


def pillow(encoded):
  return np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB'))


def test_samples_are_the_pictures_of_the_archives(folder):
  data_dir = prepared(folder)
  train = open_split('imagenet', data_dir, 'train')
  assert [x['name'] for x in train] == list(PICTURES)
  assert [x['label'] for x in train] == [0, 0, 1, 1]
  assert [train.label(i) for i in range(4)] == [0, 0, 1, 1]
  for sample, encoded in zip(train, PICTURES.values(), strict=True):
    assert sample['image'].shape == (24, 32, 3)
    difference = np.abs(sample['image'] - np.float64(pillow(encoded)))
    # Those that Pillow has written anew have its losses of quality 100.
    assert difference.max() <= (0 if sample['label'] == 0 else 8)
  validation = open_split('imagenet', data_dir, 'validation')
  assert [x['label'] for x in validation] == [0, 1]
  # Not turned, as in everybody's evaluation.
  assert validation[1]['image'].shape == (24, 32, 3)
  assert validation.labels.classes == ('tench', 'Shetland sheepdog')
  assert train.fingerprint == validation.fingerprint


def test_stored_pictures_are_rgb_or_grey_jpegs(folder):
  read = imagenet.read_example
  for (name, encoded), kept in zip(
    PICTURES.items(), [True, True, False, False], strict=True
  ):
    example = read(imagenet.Picture(name, 'n01440764', encoded))
    assert (example['image'] == encoded) == kept
    picture = Image.open(io.BytesIO(example['image']))
    assert (picture.format, picture.mode in ('RGB', 'L')) == ('JPEG', True)
    assert example['file_name'] == name


def test_picture_that_pillow_cannot_read_is_refused(monkeypatch):
  """It would be stored as no bytes if it is to be written anew."""
  monkeypatch.setattr(imagenet, 'by_pillow', lambda *_: None)
  picture = imagenet.Picture('a', 'n01440764', PICTURES['n02105855_5.JPEG'])
  refused('a cannot be decoded', imagenet.read_example, picture)


def test_data_that_tfds_has_prepared(folder):
  """Its builder has our features, a version of its own and no config."""
  ours = prepared(folder)
  source = ours / 'imagenet2012/release/1.0.0'
  theirs = folder.parent / 'theirs' / 'imagenet2012/5.1.0'
  theirs.parent.mkdir(parents=True)
  source.rename(theirs)
  info = json.loads((theirs / 'dataset_info.json').read_text())
  info |= {'version': '5.1.0', 'configName': '', 'moduleName': ''}
  (theirs / 'dataset_info.json').write_text(json.dumps(info))
  split = open_split('imagenet', theirs.parent.parent, 'train')
  assert [x['name'] for x in split] == list(PICTURES)
  assert split.directory == theirs
  refused('is not prepared', open_split, 'imagenet', ours, 'train')


COMMENT = '{"images": {"train": 4, "validation": 2}}'
WRONG = {
  r'has no ILSVRC2012_img_val\.tar; there is ILSVRC2012_img_tr.*Register': (
    {imagenet.VALIDATION: None}
  ),
  'must have an archive for each of 2 classes.* missing is n02105855.tar': (
    {imagenet.TRAIN: train_tar(classes=['n01440764'])}
  ),
  'has 2 files, such as ILSVRC2012_val_00000002.JPEG': (
    {imagenet.TRAIN: tar(VALIDATION)}
  ),
  'is no whole tar archive .*interrupted download': (
    {imagenet.TRAIN: b'<html>' * 200}
  ),
  'has 3 pictures, expected 4. It is another release or incomplete': (
    {imagenet.TRAIN: train_tar(dict([*PICTURES.items()][:3]))}
  ),
  r'img_val\.tar is no whole tar archive': (
    {imagenet.VALIDATION: tar(VALIDATION)[:1000]}
  ),
  'has n01440764_10026.JPEG; its pictures are called ILSVRC2012_val': (
    {imagenet.VALIDATION: tar(PICTURES)}
  ),
  'n01440764_7.JPEG cannot be decoded: its archive is damaged': (
    {imagenet.TRAIN: train_tar(PICTURES | {'n01440764_7.JPEG': b'\xff\xd8x'})}
  ),
  'was drawn: prepare imagenet_mini.*Register': (
    {imagenet.TRAIN: train_tar(comment=COMMENT)}
  ),
}


@pytest.mark.parametrize('told', WRONG)
def test_wrong_archives_are_refused_and_nothing_stays(folder, told):
  for name, content in WRONG[told].items():
    (folder / name).unlink()
    if content is not None:
      (folder / name).write_bytes(content)
  refused(f'(?s){told}', prepared, folder)
  assert not list((folder.parent / 'data').rglob('*.array_record*'))


def test_classes_and_labels_are_those_of_everybody():
  path = tfds.core.tfds_path('datasets/imagenet2012/labels.txt')
  assert list(SYNSETS) == path.read_text().split()
  assert len({*IMAGENET.classes}) == 1000
  known = {0: 'tench', 217: 'English Springer Spaniel', 879: 'umbrella'}
  known |= {134: 'crane (bird)', 517: 'crane (machine)', 999: 'toilet paper'}
  assert {i: IMAGENET.classes[i] for i in known} == known
  labels = imagenet.validation_classes(imagenet.RELEASE, 50_000)
  assert np.unique(labels, return_counts=True)[1].tolist() == 1000 * [50]
  # https://github.com/pytorch/vision's ground truth of the first three.
  assert labels[:3] == ['n01751748', 'n09193705', 'n02105855']


# ---- Drawn -----------------------------------------------------------------


def test_drawn_pictures_are_in_the_layout_of_the_release(
  mini_imagenet_data_dir,
):
  drawn = mini_imagenet_data_dir
  (folder,) = (drawn / 'downloads').iterdir()
  with tarfile.open(folder / imagenet.TRAIN) as archive:
    names = archive.getnames()
    with tarfile.open(fileobj=archive.extractfile(names[1])) as inner:
      numbers = [x.split('_')[1] for x in inner.getnames()]
  assert numbers == ['2.JPEG', '14.JPEG', '26.JPEG']
  assert names == [f'n9{i:07d}.tar' for i in range(12)]
  config = load_config(
    'configs/imagenet_resnest50.py:mini', {'data.data_dir': str(drawn)}
  )
  splits = open_splits(config)
  assert config.model.num_classes == 12
  assert splits.train.labels.classes == imagenet.DRAWN
  labels = [splits.eval.label(i) for i in range(16)]
  assert labels == [*range(12), *range(4)]
  assert [splits.train.label(i) for i in range(30)] == sorted(
    [*range(12), *range(12), *range(6)]
  )
  sizes = {x['image'].shape for x in splits.train}
  assert len(sizes) > 10
  assert json.dumps(splits.facts())


def test_pictures_are_functions_of_kind_and_seed():
  first, again, other = (
    imagenet_mini.draw_jpeg(k, (0, 0, 5)) for k in (6, 6, 7)
  )
  assert first == again != other
  assert decode_image(first, cv2.IMREAD_COLOR_RGB).std() > 10


FITTING = {
  ('imagenet_resnest50', 'ade20k_mini'): 'ade20k_mini has masks, and config.mod'
  "el.head is 'classifier'.*a row",
  ('ade20k_pspnet', 'imagenet_mini'): 'one class for each image.*classify_fol',
}


@pytest.mark.parametrize(('row', 'name'), FITTING)
def test_head_and_data_have_to_fit(row, name):
  config = load_config(f'{row}:mini', {'data.name': name})
  refused(FITTING[row, name], open_splits, config)
