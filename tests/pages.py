"""Pages that are followed: their commands and code, run in this process."""

import contextlib
import importlib
import re
import runpy
import sys
from pathlib import Path

import jax
import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = re.compile(r'(\.venv/bin/)?(python|pip|make|ruff|resnest-jax)\s')


def commands_of(page):
  """The lines of its blocks and its inline code that run a program."""
  found = []
  for token in MarkdownIt('commonmark').enable('table').parse(page.read_text()):
    is_fence = token.type == 'fence' and token.info in ('', 'bash')
    if token.type == 'code_block' or is_fence:
      found += token.content.replace('\\\n', ' ').splitlines()
    inside = token.children or ()  # Of paragraphs, headings and cells.
    found += [x.content for x in inside if x.type == 'code_inline']
  return [x.removeprefix('.venv/bin/') for x in found if PROGRAM.match(x)]


def blocks_of(name, language='python'):
  text = (ROOT / 'docs' / name).read_text('utf-8')
  return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def run_python(words, monkeypatch):
  """Runs the script or the module, `-m NAME`, with its flags."""
  words = words[1:] if words[0] == '-m' else words
  monkeypatch.setattr(sys, 'argv', words)
  program = words[0]
  if program.endswith('.py'):
    runpy.run_path(str(ROOT / program))['main']()
  else:
    module = importlib.import_module(program)
    if hasattr(module, '__path__'):  # A package: `python -m` runs __main__.
      module = importlib.import_module(f'{program}.__main__')
    module.main()


@contextlib.contextmanager
def inside(folder):
  """Changes to the folder, compiles quickly, and gives a monkeypatch."""
  quick = 'jax_disable_most_optimizations'
  jax.config.update(quick, True)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.chdir(folder)
    yield monkeypatch
  jax.config.update(quick, False)
