"""Links, keys of the configuration and rows that the pages name exist."""

import functools
import re
from pathlib import Path

import pytest

from resnest_jax.config import flatten, load_config

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / 'docs').rglob('*.md'))
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *DOCS]
CONFIG = load_config(ROOT / 'configs' / 'folder.py')
# The first names of keys, as pages write them without `config.`.
SECTIONS = '|'.join(
  key for key, value in CONFIG.items() if hasattr(value, 'items')
)
# `config.json` and `train.txt` look like keys.
FILE_NAME = re.compile(r'(^|\.)(json|pth|py|safetensors|txt)$')

each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def _prose(text: str) -> str:
  """The text without blocks of code and inline code."""
  text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
  text = re.sub(r'^    .*$', '', text, flags=re.MULTILINE)
  return re.sub(r'`[^`\n]+`', '`', text)


@functools.cache
def _anchors(page: Path) -> set[str]:
  """What can follow # in an address, as GitHub makes it from headings."""
  text = page.read_text('utf-8')
  text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
  anchors: set[str] = set()
  for heading in re.findall(r'^#+ (.+)$', text, re.MULTILINE):
    heading = re.sub(r'\]\([^)]*\)', '', heading).lower()
    slug = re.sub(r'[^\w\- ]', '', heading).replace(' ', '-')
    number = 0
    while (name := f'{slug}-{number}' if number else slug) in anchors:
      number += 1
    anchors.add(name)
  return anchors


def _leads_somewhere(page: Path, link: str) -> bool:
  path, _, anchor = link.partition('#')
  target = (page.parent / path).resolve() if path else page
  if not target.is_file() or not target.is_relative_to(ROOT):
    return False
  return not anchor or anchor in _anchors(target)


def _is_key(name: str) -> bool:
  """Whether this is a key, or a section of keys."""
  flat = flatten(CONFIG)
  return name in flat or any(key.startswith(f'{name}.') for key in flat)


@each_page
def test_relative_links_lead_to_a_file_and_a_heading(page):
  links = re.findall(r'\]\(([^)\s]+)\)', _prose(page.read_text('utf-8')))
  links = [link for link in links if '://' not in link]
  assert [link for link in links if not _leads_somewhere(page, link)] == []


@each_page
def test_keys_of_the_configuration_exist(page):
  text = page.read_text('utf-8')
  # With `config.` (not the module resnest_jax.config), and in inline code also
  # without: `eval.protocol=slide`.
  names = re.findall(r'(?<!_jax\.)\bconfig\.([a-z]\w*(?:\.\w+)*)', text)
  short = rf'`((?:{SECTIONS})\.[a-z]\w*(?:\.\w+)*)(?=[`= ])'
  names += re.findall(short, text)
  names = [name for name in names if not FILE_NAME.search(name)]
  assert [name for name in names if not _is_key(name)] == []


def test_the_index_names_every_page():
  index = (ROOT / 'docs' / 'index.md').read_text('utf-8')
  linked = set(re.findall(r'\]\((\w[\w/-]*\.md)\)', index))
  pages = {page.relative_to(ROOT / 'docs').as_posix() for page in DOCS}
  assert linked == pages - {'index.md'}


def test_every_picture_of_the_docs_is_shown():
  shown = {
    (page.parent / link).resolve()
    for page in PAGES
    for link in re.findall(r'!\[[^]]*\]\(([^)]+)\)', page.read_text('utf-8'))
  }
  assert set((ROOT / 'docs' / 'images').iterdir()) <= shown


def test_anchors_are_those_of_github(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text(
    '# Where `a.b` is, and *why*\n## 2. The file\n```\n# no heading\n```\n'
    '## The file\n## The file\n## A [link](x.md) - here\n'
  )
  assert _anchors(page) == {
    *('where-ab-is-and-why', '2-the-file', 'the-file', 'the-file-1'),
    'a-link---here',
  }


def test_readme_says_which_rows_have_a_config():
  readme = (ROOT / 'README.md').read_text()
  cells = r'^\| ((?:cityscapes|ade20k)_\w+) \| (\w+) \|'
  rows = dict(re.findall(cells, readme, re.MULTILINE))
  assert len(rows) == 8
  files = {path.stem for path in (ROOT / 'configs').glob('*.py')}
  with_config = {name for name, config in rows.items() if config == 'yes'}
  assert with_config == files - {'common', 'folder'}


@pytest.mark.parametrize(
  'head', ['deeplabv3', 'deeplabv3plus', 'fcn', 'pspnet']
)
def test_configs_name_the_rows_of_mmsegmentation(head):
  """As `configs/resnest/metafile.yaml` of 1.2.2 has them."""
  # The one name of theirs without a hyphen.
  hyphen = '' if head == 'pspnet' else '-'
  for name, theirs in (
    ('ade20k', '4xb4-160k_ade20k-512x512'),
    ('cityscapes', f'4xb2-80k_cityscapes{hyphen}512x1024'),
  ):
    text = (ROOT / 'configs' / f'{name}_{head}.py').read_text()
    (found,) = re.findall(r'[\w-]*s101-d8_[\w-]+', text)
    assert found == f'resnest_s101-d8_{head}_{theirs}'
