"""The site of `make docs`: its pages, links, pictures and docstrings."""

import inspect
import pkgutil
import re
from html import unescape

import pytest
from hosts import ROOT
from markdown_it import MarkdownIt

import resnest_jax as rj

DOCS = ROOT / 'docs'
REFERENCE = sorted((DOCS / 'reference').iterdir())
BLOCKS = ('blockquote', 'h1', 'h2', 'h3', 'img', 'li', 'p', 'pre', 'td', 'tr')
BLOCKS += ('em', 'strong')


@pytest.fixture(scope='module')
def site(run_script, tmp_path_factory):
  """The folder of the built site."""
  path = tmp_path_factory.mktemp('site')
  # A link or an anchor that leads nowhere and a page that is not in the
  # navigation are warnings, which end the build; `--quiet` would drop them.
  command = '-m', 'mkdocs', 'build', '--strict', '--site-dir', path
  run_script(*command, environment={'NO_MKDOCS_2_WARNING': '1'})
  return path


def loads_of(html):
  """The addresses of scripts, pictures, styles and icons."""
  links = r'<link [^>]*rel="(?:stylesheet|icon)"[^>]*>'
  styles = re.findall(r' href="([^"]*)"', ''.join(re.findall(links, html)))
  return styles + re.findall(r'<[^>]*\ssrc="([^"]*)"', html)


def text_of(html):
  return re.sub(r'\s+', ' ', unescape(re.sub(r'</?[a-z][^>]*>', '', html)))


def blocks_of(html):
  return {tag: len(re.findall(rf'<{tag}\b', html)) for tag in BLOCKS}


def place(page):
  """Where a page of the repository is in the site."""
  if page.parent == ROOT:
    return f'{page.stem.lower().replace("readme", "overview")}.html'
  return page.relative_to(DOCS).with_suffix('.html')


def test_what_lies_outside_of_docs_has_a_page(site):
  html = (site / 'source/configs/common.py.html').read_text('utf-8')
  assert 'config.train.total_steps' in text_of(html)


def test_pages_load_nothing_from_elsewhere(site):
  texts = [page.read_text('utf-8') for page in site.rglob('*.html')]
  loads = [link for text in texts for link in loads_of(text)]
  assert len(loads) > 100
  assert [link for link in loads if re.match(r'(\w+:)?//', link)] == []


PAGES = [*DOCS.glob('*.md'), *ROOT.glob('*.md')]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_page_has_the_blocks_that_github_shows(page, site):
  """Two readers of Markdown, which differ in lists and tables."""
  html = (site / place(page)).read_text('utf-8')
  article = html[html.index('<article') : html.index('</article>')]
  # Badges, which other hosts draw, are text in the site.
  badge = r'!(\[[^]]*\])\(https://[^)]*\)'
  text = re.sub(badge, r'\1', page.read_text('utf-8'))
  shown = MarkdownIt('commonmark').enable('table').render(text)
  assert blocks_of(article) == blocks_of(shown)


def test_every_public_name_is_in_the_reference(site):
  html = (site / 'reference/package.html').read_text('utf-8')
  for name, module in rj._EXPORTS.items():
    assert f' id="resnest_jax.{module}.{name}"' in html


@pytest.mark.parametrize('page', REFERENCE, ids=lambda page: page.stem)
def test_reference_has_the_docstrings(page, site):
  html = (site / place(page)).read_text('utf-8')
  text = text_of(html)
  paths = re.findall(r'^::: (\S+)$', page.read_text(), re.MULTILINE)
  assert paths
  for path in paths:
    first, *_ = inspect.getdoc(pkgutil.resolve_name(path)).split('\n\n')
    assert re.sub(r'\s+', ' ', first).replace('`', '') in text, path
    assert f' id="{path}"' in html
