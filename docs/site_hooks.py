"""The site also has what the pages link to outside of docs/.

On GitHub `../README.md` and `../configs/common.py` lead to files of the
repository. Here these files become pages, and the links lead to them.
"""

import functools
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
      is_outside = target.exists() and not target.is_relative_to(DOCS)
      if is_outside and files.get_file_from_path(_site_path(target)) is None:
        files.append(_page(target, config))
        if target.suffix in _TEXTS:
          pages.append(target)  # Whose links are seen later.
  return files


def on_page_markdown(
  markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Turns links to files of the repository into links to their pages."""
  origin = _origins().get(page.file.src_uri)
  if origin is not None and origin.suffix not in _TEXTS:
    return markdown  # Code, which links to nothing.
  folder = (origin or DOCS / page.file.src_uri).parent
  here = Path(page.file.src_uri).parent

  def relink(match: re.Match) -> str:
    target = (folder / match[2]).resolve()
    if not target.exists() or not target.is_relative_to(ROOT):
      return match[0]
    path = os.path.relpath(_site_path(target), here)
    return f'{match[1]}{Path(path).as_posix()}{match[3]}'

  markdown = _FAR_PICTURE.sub(r'\1', markdown.replace(_ELSEWHERE, ''))
  parts = _FENCE.split(markdown)
  parts[::2] = [_LINK.sub(relink, part) for part in parts[::2]]
  return ''.join(parts)


@functools.cache
def _origins() -> dict[str, Path]:
  """Page of the site -> file of the repository; filled by `_page`."""
  return {}


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


def _page(target: Path, config: MkDocsConfig) -> File:
  path = _site_path(target)
  _origins()[path] = target
  file = File.generated(config, path, content=_content(target))
  if path not in PAGES.values():
    file.inclusion = InclusionLevel.NOT_IN_NAV
  return file


def _content(target: Path) -> str:
  """A page as it is, of other files their text in a page."""
  if target.suffix == '.md':
    return target.read_text('utf-8')
  title = f'# {target.relative_to(ROOT).as_posix()}\n\n'
  if target.is_dir():
    names = sorted(path.name for path in target.iterdir() if path.is_file())
    return title + '\n'.join(f'- `{name}`' for name in names)
  if target.suffix == '.ipynb':
    return _notebook(target)
  language = {'.py': 'python', '.sh': 'bash'}.get(target.suffix, 'text')
  return f'{title}```{language}\n{target.read_text("utf-8")}```\n'


def _notebook(target: Path) -> str:
  """Its texts, its code, and what that printed and drew."""
  cells = json.loads(target.read_text('utf-8'))['cells']
  parts = []
  for cell in cells:
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
