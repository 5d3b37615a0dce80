"""The commands of README, CONTRIBUTING and docs."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']
PAGES += sorted((ROOT / 'docs').rglob('*.md'))
_PROGRAM = re.compile(r'(\.venv/bin/)?(python|pip|make|ruff|resnest-jax)\s')
_NEEDS = re.compile(r'<!-- needs: (.+) -->')


class Command(NamedTuple):
  """A line of a block, or inline code.

  Attributes:
    text: as it is typed.
    needs: what stands in a comment before its block, `<!-- needs: ADE20K -->`;
      None: nothing.
  """

  text: str
  needs: str | None

  @property
  def words(self) -> list[str]:
    """Program and arguments; the program without its folder."""
    first, *rest = shlex.split(self.text)
    return [Path(first).name, *rest]


def documented(pages: list[Path] = PAGES) -> list[Command]:
  """All commands, in their order, each once; one comment is enough."""
  found: dict[str, str | None] = {}
  for page in pages:
    for text, needs in _of_page(page.read_text('utf-8')):
      found[text] = found.get(text) or needs
  return [Command(*item) for item in found.items()]


def _of_page(text: str) -> list[tuple[str, str | None]]:
  """Commands with what the comment before their block says."""
  found, needs = [], None
  for token in MarkdownIt('commonmark').enable('table').parse(text):
    if token.type == 'html_block':
      match = _NEEDS.match(token.content)
      needs = match[1] if match else None
      continue
    lines: list[str] = []
    if token.type == 'code_block' or (
      token.type == 'fence' and token.info in ('', 'bash')
    ):
      lines = token.content.replace('\\\n', ' ').splitlines()
    elif token.type == 'inline':
      codes = [x for x in token.children if x.type == 'code_inline']
      lines = [code.content for code in codes]
    found += [(x, needs) for x in lines if _PROGRAM.match(x)]
    # The comment is of one block: a paragraph, a table, code.
    if token.level == 0 and token.nesting <= 0:
      needs = None
  return found
