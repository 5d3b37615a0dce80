"""Keys of the configuration, rows and pictures that the pages name exist."""

import re

import pytest
from pages import ROOT

from resnest_jax.config import flatten, load_config

DOCS = sorted((ROOT / 'docs').rglob('*.md'))
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *DOCS]
FILES = sorted((ROOT / 'configs').glob('*_*.py'))
ROWS = [x for x in FILES if x.stem.startswith(('ade20k', 'cityscapes'))]
CONFIG = load_config(ROOT / 'configs' / 'folder.py')
# The first names of keys, as pages write them without `config.`.
SECTIONS = '|'.join(k for k, x in CONFIG.items() if hasattr(x, 'items'))
# `config.json` and `train.txt` look like keys.
FILE_NAME = re.compile(r'(^|\.)(json|pth|py|safetensors|txt)$')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_keys_of_the_configuration_exist(page):
  text = page.read_text('utf-8')
  # With `config.` (not the module resnest_jax.config), and in inline code also
  # without: `eval.protocol=slide`.
  names = re.findall(r'(?<!_jax\.)\bconfig\.([a-z]\w*(?:\.\w+)*)', text)
  short = rf'`((?:{SECTIONS})\.[a-z]\w*(?:\.\w+)*)(?=[`= ])'
  names += re.findall(short, text)
  keys = [name for name in names if not FILE_NAME.search(name)]
  # Of a section, too.
  known = [f'{key}.' for key in flatten(CONFIG)]
  lost = [k for k in keys if not any(x.startswith(f'{k}.') for x in known)]
  assert lost == []


def test_the_index_names_every_page():
  index = (ROOT / 'docs' / 'index.md').read_text('utf-8')
  linked = set(re.findall(r'\]\((\w[\w/-]*\.md)\)', index))
  pages = {page.relative_to(ROOT / 'docs').as_posix() for page in DOCS}
  assert linked == pages - {'index.md'}


def test_every_picture_of_the_docs_is_shown():
  link = re.compile(r'!\[[^]]*\]\(([^)]+)\)')
  links = {page: link.findall(page.read_text('utf-8')) for page in PAGES}
  shown = {(x.parent / y).resolve() for x in PAGES for y in links[x]}
  assert set((ROOT / 'docs' / 'images').iterdir()) <= shown


def test_readme_says_which_rows_have_a_config():
  cells = r'^\| ((?:cityscapes|ade20k|imagenet)_\w+) \| ([\w-]+) \|'
  rows = dict(re.findall(cells, (ROOT / 'README.md').read_text(), re.MULTILINE))
  assert len(rows) == 8 + 5 + 4
  # The authors' tables have heads and backbones in the second column.
  marks = re.compile('yes|FCN|DeepLabV3|ResNeSt-.*')
  with_config = {name for name, mark in rows.items() if marks.fullmatch(mark)}
  assert with_config == {path.stem for path in FILES} - {'classify_folder'}


MMSEG = [
  x for x in ROWS if re.fullmatch('(ade20k|cityscapes)_[a-z0-9]+', x.stem)
]


@pytest.mark.parametrize('path', MMSEG, ids=lambda path: path.stem)
def test_configs_name_the_rows_of_mmsegmentation(path):
  """As `configs/resnest/metafile.yaml` of 1.2.2 has them."""
  data, head = path.stem.split('_')
  # The one name of theirs without a hyphen.
  hyphen = '' if head == 'pspnet' else '-'
  theirs = {
    'ade20k': '4xb4-160k_ade20k-512x512',
    'cityscapes': f'4xb2-80k_cityscapes{hyphen}512x1024',
  }
  found = re.findall(r'[\w-]*s101-d8_[\w-]+', path.read_text())
  assert found == [f'resnest_s101-d8_{head}_{theirs[data]}']
