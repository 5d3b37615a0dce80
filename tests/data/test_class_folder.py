"""Pictures in a folder for each class."""

import pickle

import cv2
import numpy as np
import pytest
from data.pictures import exif_of
from data.refusals import refused, unreadable
from data.small_archives import encode
from PIL import Image

from resnest_jax.config import load_config
from resnest_jax.data import sampling
from resnest_jax.data.datasets import describe, open_data, open_splits

ROW = 'configs/classify_folder.py:mini'


def write(folder, **classes):
  """Grey pictures, whose brightness tells the class."""
  for value, (name, number) in enumerate(classes.items()):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(number):
      picture = np.full((8, 9 + i, 3), 40 * value, np.uint8)
      cv2.imwrite(str(folder / name / f'{i}.png'), picture)
  return folder


def configured(folder, **changes):
  values = {'data.data_dir': str(folder)}
  values |= {f'data.{key}': value for key, value in changes.items()}
  return load_config(ROW, values)


def opened(folder, split='val', **changes):
  return open_data(configured(folder, **changes).data, split)


def names(split):
  return [sample['name'] for sample in split]


def test_held_out_pictures_are_drawn_from_each_class(tmp_path):
  write(tmp_path, ant=20, bee=10, cow=6)
  config = configured(tmp_path)
  splits = open_splits(config)
  assert config.model.num_classes == 3
  assert splits.train.labels.classes == ('ant', 'bee', 'cow')
  for split, numbers in zip(splits, ([16, 8, 5], [4, 2, 1]), strict=True):
    labels = [split.label(i) for i in range(len(split))]
    assert np.bincount(labels).tolist() == numbers
  assert not {*names(splits.train)} & {*names(splits.eval)}
  for sample in splits.eval:
    assert (sample['image'] == 40 * sample['label']).all()
    name = sample['name'].split('/')[0]
    assert name == splits.eval.labels.classes[sample['label']]
  assert names(pickle.loads(pickle.dumps(splits.eval))) == names(splits.eval)
  # By name: what is added moves nothing between the splits.
  cv2.imwrite(str(tmp_path / 'ant/new.png'), np.zeros((8, 8), np.uint8))
  before, after = {*names(splits.eval)}, {*names(opened(tmp_path))}
  assert len(before ^ after) <= 2
  assert opened(tmp_path).fingerprint != splits.eval.fingerprint
  more = opened(tmp_path, **{'folder.eval_fraction': 0.5})
  assert len(more) == 11 + 5 + 3


def test_splits_that_are_given(tmp_path, capsys):
  write(tmp_path / 'train', ant=3, bee=7, cow=1)
  write(tmp_path / 'validation', ant=2, cow=1)
  for other in 'loose.png', 'ant/one.heic', 'cow/notes.txt':
    (tmp_path / 'validation' / other).touch()
  train, val = opened(tmp_path, 'train'), opened(tmp_path)
  assert len(train) == 11
  assert names(val) == ['ant/0.png', 'ant/1.png', 'cow/0.png']
  assert [sample['label'] for sample in val] == [0, 0, 2]
  said = capsys.readouterr().out
  assert f"{tmp_path / 'validation'} is the split 'val'" in said
  assert f'pictures of classes in {tmp_path / "train"}: ant (3), cow' in said
  assert f'{tmp_path / "validation"} has no pictures of: bee' in said
  assert 'in folders of classes: 1 .heic, 1 .txt, 1 .png\n' in said
  write(tmp_path / 'test', ant=1)
  assert names(opened(tmp_path, 'test')) == ['ant/0.png']
  write(tmp_path / 'validation', dog=1)
  refused('has folders that .*train has not: dog', opened, tmp_path)


def test_classes_may_be_called_as_splits_are(tmp_path):
  write(tmp_path, train=4, train_station=4, test=5)
  split = opened(tmp_path, 'train')
  assert split.labels.classes == ('test', 'train', 'train_station')
  assert len(split) == 10


def test_photographs_are_upright_and_of_any_kind(tmp_path):
  write(tmp_path, ant=0, bee=5)
  turned = Image.new('CMYK', (20, 10))
  turned.save(tmp_path / 'ant/1.jpg', exif=exif_of(6))
  Image.new('L', (7, 5)).save(tmp_path / 'ant/2.JPEG')
  (tmp_path / 'ant/sub').mkdir()
  Image.new('RGBA', (6, 5)).save(tmp_path / 'ant/sub/3.webp')
  (tmp_path / 'ant/notes.txt').write_text('no picture')
  split = opened(tmp_path, 'train', **{'folder.eval_fraction': 0.01})
  shapes = {x['name']: x['image'].shape[:2] for x in split if x['label'] == 0}
  every = {'ant/1.jpg': (20, 10), 'ant/2.JPEG': (5, 7)}
  every['ant/sub/3.webp'] = 5, 6
  assert shapes.items() < every.items()
  assert len(shapes) == 2


def test_unreadable_files_are_named(tmp_path):
  write(tmp_path, ant=4, bee=4)
  split = opened(tmp_path, 'train')
  path = tmp_path / split.pictures[1].name
  path.write_bytes(path.read_bytes()[:50])
  told = f'{path} cannot be decoded.*Repair it, or remove it\\.'
  unreadable(told, split.__getitem__, 1)
  path.write_bytes(encode(np.full((8, 8, 3), 1000, np.uint16)))
  refused(f'{path} has 16 bits per channel', split.__getitem__, 1)
  path.unlink()
  unreadable(f'{path} cannot be read', split.__getitem__, 1)
  assert split.location(1) == str(path)
  with pytest.raises(IndexError):
    split[-1]


WRONG = {
  r'too few folders to be classes: ant\. Make a folder': {'ant': 3},
  r'too few folders to be classes: none': {},
  r'has 2 classes without a picture: bee, cow\. A': dict(ant=1, bee=0, cow=0),
}


@pytest.mark.parametrize('told', WRONG)
def test_folders_that_are_no_classes_are_refused(tmp_path, told):
  refused(told, opened, write(tmp_path, **WRONG[told]))


def test_missing_folders_are_refused(tmp_path):
  refused('set config.data.data_dir', opened, tmp_path, data_dir='nowhere')
  write(tmp_path / 'train', ant=1, bee=1)
  refused("no folder .*val, the split 'val'. In .*: train", opened, tmp_path)
  (tmp_path / 'val').mkdir()
  refused("val, the split 'val', has no folders of cl", opened, tmp_path)
  write(tmp_path / 'val', ant=1)
  refused("the split 'night'", opened, tmp_path, 'night')


def test_classes_take_turns(tmp_path):
  """Sampling counts an image's class as its only pixel."""
  write(tmp_path, ant=20, bee=5)
  config = configured(tmp_path, sampling='class_balanced')
  split = open_data(config.data, 'train')
  sampler, table = sampling.open_sampler(config.data, split, 0, None)
  classes = [split.label(sampler(i)) for i in range(40)]
  assert np.bincount(classes).tolist() == [20, 20]
  shares = [' '.join(x.cells) for x in table.columns[2:]]
  assert shares == ['80.00 20.00', '50.00 50.00']
  assert describe({'it': split})['images in it'] == 20
