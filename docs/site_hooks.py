"""The site also has what the pages link to outside of docs/.

On GitHub `../README.md` and `../configs/common.py` lead to files of the
repository. Here these files become pages, and the links lead to them.
"""

import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
# File of the repository -> page of the site. README.md would become a second
# index.
PAGES = {
  'README.md': 'overview.md',
  'CONTRIBUTING.md': 'contributing.md',
  'CHANGELOG.md': 'changelog.md',
  'LICENSE': 'license.md',
}
_TEXTS = ('.md', '.ipynb')
_LINK = re.compile(r'(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))')
# What a page of docs/reference says on GitHub, where it shows no docstrings.
_ELSEWHERE = '> The docstrings are on the site, which `make docs` builds.\n'
# Pictures of other hosts (badges), which a page is not to load.
_FAR_PICTURE = re.compile(r'!\[([^\]]*)\]\(https?://[^)]*\)')
_FENCE = re.compile(r'^(```.*?^```)', re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages of PAGES and of all other files that a page links to."""
  pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
  for name in PAGES:
    pages.append(ROOT / name)
    files.append(_page(ROOT / name, config))
  for page in pages:
    for target in _links(_content(page), page.parent):
      is_outside = target.is_file() and not target.is_relative_to(DOCS)
      if is_outside and files.get_file_from_path(_site_path(target)) is None:
        files.append(_page(target, config))
        if target.suffix in _TEXTS:
          pages.append(target)  # Whose links are seen later.
  return files


def on_page_markdown(
  markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Turns links to files of the repository into links to their pages.

  A link that leads to no file becomes one that leads to no page, which mkdocs
  tells, also where the site would have a page of its name.
  """
  origin = _origin(page.file.src_uri)
  if origin.suffix not in _TEXTS:
    return markdown  # Code, which links to nothing.
  here = Path(page.file.src_uri).parent

  def relink(match: re.Match) -> str:
    target = (origin.parent / match[2]).resolve()
    if not target.is_relative_to(ROOT):
      return match[0]
    path = os.path.relpath(_site_path(target), here)
    return f'{match[1]}{Path(path).as_posix()}{match[3]}'

  markdown = _FAR_PICTURE.sub(r'\1', markdown.replace(_ELSEWHERE, ''))
  parts = _FENCE.split(markdown)
  parts[::2] = [_LINK.sub(relink, part) for part in parts[::2]]
  return ''.join(parts)


def _links(text: str, folder: Path) -> list[Path]:
  prose = ''.join(_FENCE.split(text)[::2])
  targets = [(folder / x[2]).resolve() for x in _LINK.finditer(prose)]
  return [target for target in targets if target.is_relative_to(ROOT)]


def _site_path(target: Path) -> str:
  """Where a file of the repository is in the site, as mkdocs names sources."""
  if target.is_relative_to(DOCS):
    return target.relative_to(DOCS).as_posix()
  name = target.relative_to(ROOT).as_posix()
  return PAGES.get(name, f'source/{name}.md')


def _origin(path: str) -> Path:
  """The file whose `_site_path` this is."""
  for name, page in PAGES.items():
    if path == page:
      return ROOT / name
  if path.startswith('source/'):
    return ROOT / path.removeprefix('source/').removesuffix('.md')
  return DOCS / path


def _page(target: Path, config: MkDocsConfig) -> File:
  path = _site_path(target)
  file = File.generated(config, path, content=_content(target))
  if path not in PAGES.values():
    file.inclusion = InclusionLevel.NOT_IN_NAV
  return file


def _content(target: Path) -> str:
  """A page as it is, of other files their text in a page."""
  text = target.read_text('utf-8')
  if target.suffix == '.md':
    return text
  if target.suffix == '.ipynb':
    return _notebook(text)
  language = 'python' if target.suffix == '.py' else 'text'
  title = target.relative_to(ROOT).as_posix()
  return f'# {title}\n\n```{language}\n{text}```\n'


def _notebook(text: str) -> str:
  """Its texts, its code, and what that printed and drew."""
  parts = []
  for cell in json.loads(text)['cells']:
    text = ''.join(cell['source']).rstrip()
    is_code = cell['cell_type'] == 'code'
    parts.append(f'```python\n{text}\n```' if is_code else text)
    parts += [_output(output) for output in cell.get('outputs', ())]
  return '\n\n'.join(parts) + '\n'


def _output(output: dict) -> str:
  """Text or a picture; what is HTML stays in the notebook."""
  data = output.get('data', {})
  for kind in ('image/png', 'image/jpeg'):
    if kind in data:
      encoded = ''.join(data[kind]).replace('\n', '')
      return f'![Output](data:{kind};base64,{encoded})'
  if 'text/html' in data:
    return '*Shown in the notebook itself.*'
  text = ''.join(output.get('text', data.get('text/plain', '')))
  return f'```text\n{text.rstrip()}\n```'
