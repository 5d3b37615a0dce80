"""Writes the repository's address where notebooks and pages name it.

    python notebooks/address.py https://github.com/NAME/resnest-jax

Notebooks and README get badges that open the branch `main` in Colab. An address
that was written before is replaced.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLAB = 'https://colab.research.google.com'
BADGE = r'\[!\[Open in Colab\]\S+'


def main() -> None:
  """Writes the only argument."""
  address = sys.argv[1] if len(sys.argv) == 2 else ''
  if not re.fullmatch(r'https://github\.com/[\w-]+/[\w.-]+(?<!\.git)', address):
    sys.exit(
      f'error: the arguments are {sys.argv[1:]}. Give one address, '
      'https://github.com/NAME/REPOSITORY, without .git or a slash at its end: '
      'Colab opens notebooks of GitHub.'
    )
  for path in sorted(ROOT.glob('notebooks/*.ipynb')):
    badge = badge_of(address, path.stem)
    top = rf'\A([^#]*?")({BADGE}\\n",\n *"\\n",\n *")?# '
    replace(path, top, rf'\1{badge}\\n",\n    "\\n",\n    "# ')
    replace(path, r"(?<=\"repository = ').*(?=')", address)
    row = rf'^(\| \[{path.stem}\]\(notebooks/.+?)( {BADGE})? \|$'
    replace(ROOT / 'README.md', row, rf'\1 {badge} |')
  clone = f'!git clone -q --depth 1 {address} resnest-jax'
  fetch = r'(unzip -q resnest-jax\.zip|git clone .* resnest-jax)$'
  replace(ROOT / 'docs/install.md', f'^!{fetch}', clone)
  first = f'git clone {address} resnest-jax'
  replace(ROOT / 'docs/start.md', f'^{fetch}', first)
  section = r'^(\[project\.urls\]\n.*\n\n)?\[project\.scripts\]'
  urls = f'[project.urls]\nRepository = "{address}"\n\n[project.scripts]'
  replace(ROOT / 'pyproject.toml', section, urls)
  print(f'{address} is in README.md, docs/, notebooks/ and pyproject.toml')


def badge_of(address: str, notebook: str) -> str:
  """A picture in Markdown that opens the notebook in Colab."""
  repository = address.removeprefix('https://github.com/')
  target = f'{COLAB}/github/{repository}/blob/main/notebooks/{notebook}.ipynb'
  return f'[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({target})'


def replace(path: Path, pattern: str, new: str) -> None:
  """Writes `new` in the one place that the pattern finds."""
  text, number = re.subn(pattern, new, path.read_text('utf-8'), flags=re.M)
  if number != 1:
    sys.exit(f'error: {path} has {number} places for {new!r}; leave one there.')
  path.write_text(text, 'utf-8')


if __name__ == '__main__':
  main()
