"""The site of `make docs`: its pages, links, pictures and docstrings."""

import functools
import inspect
import pkgutil
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import resnest_jax as rj

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
# Pages of the repository's root and their place in the site.
OTHERS = {
  'README.md': 'overview.html',
  'CONTRIBUTING.md': 'contributing.html',
  'CHANGELOG.md': 'changelog.html',
}
REFERENCE = sorted((DOCS / 'reference').iterdir())
BLOCKS = ('blockquote', 'h1', 'h2', 'h3', 'img', 'li', 'p', 'pre', 'td', 'tr')
BLOCKS += ('em', 'strong')


@pytest.fixture(scope='module')
def site(run_script, tmp_path_factory):
  """The folder of the built site.

  A link or an anchor that leads nowhere and a page that is not in the
  navigation are warnings, which end the build; `--quiet` would drop them.
  """
  path = tmp_path_factory.mktemp('site')
  run_script(
    *('-m', 'mkdocs', 'build', '--strict', '--site-dir', path),
    environment={'NO_MKDOCS_2_WARNING': '1'},
  )
  return path


class Parsed(HTMLParser):
  """Tags, ids, text, and what a page loads."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.ids, self.loads, self.texts = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.append(tag)
    self.ids += [attributes[k] for k in ('id', 'name') if k in attributes]
    if 'src' in attributes:
      self.loads.append(attributes['src'])
    if tag == 'link' and attributes.get('rel') in ('stylesheet', 'icon'):
      self.loads.append(attributes['href'])

  def handle_data(self, data):
    self.texts.append(data)

  @property
  def text(self):
    return re.sub(r'\s+', ' ', ''.join(self.texts))


@functools.cache
def parsed(path):
  return Parsed(path.read_text('utf-8'))


def place(page):
  """Where a page of the repository is in the site."""
  if page.parent == ROOT:
    return OTHERS[page.name]
  return page.relative_to(DOCS).with_suffix('.html').as_posix()


def test_what_lies_outside_of_docs_has_a_page(site):
  keys = parsed(site / 'source' / 'configs' / 'common.py.html')
  assert 'config.train.total_steps' in keys.text


def test_pages_load_nothing_from_elsewhere(site):
  loads = [link for page in site.rglob('*.html') for link in parsed(page).loads]
  assert len(loads) > 100
  assert [link for link in loads if re.match(r'(\w+:)?//', link)] == []


@pytest.mark.parametrize(
  'page',
  [*DOCS.glob('*.md'), *(ROOT / name for name in OTHERS)],
  ids=lambda page: page.name,
)
def test_page_has_the_blocks_that_github_shows(page, site):
  """Two readers of Markdown, which differ in lists and tables."""
  html = (site / place(page)).read_text('utf-8')
  article = Parsed(html[html.index('<article') : html.index('</article>')])
  # Badges, which other hosts draw, are text in the site.
  text = page.read_text('utf-8')
  text = re.sub(r'!(\[[^]]*\])\(https://[^)]*\)', r'\1', text)
  reader = MarkdownIt('commonmark').enable('table')
  expected = Parsed(reader.render(text))
  for tag in BLOCKS:
    assert article.tags.count(tag) == expected.tags.count(tag), tag


def test_every_public_name_is_in_the_reference(site):
  ids = parsed(site / 'reference' / 'package.html').ids
  for name, module in rj._EXPORTS.items():
    assert f'resnest_jax.{module}.{name}' in ids


@pytest.mark.parametrize('page', REFERENCE, ids=lambda page: page.stem)
def test_reference_has_the_docstrings(page, site):
  html = parsed(site / place(page))
  paths = re.findall(r'^::: (\S+)$', page.read_text(), re.MULTILINE)
  assert paths
  for path in paths:
    first, *_ = inspect.getdoc(pkgutil.resolve_name(path)).split('\n\n')
    plain = re.sub(r'\s+', ' ', first).replace('`', '')
    assert plain in html.text, path
    assert path in html.ids, path
