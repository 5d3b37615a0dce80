"""Finds the scripts and `configs/`, in a clone or in an installed wheel."""

from pathlib import Path

# pyproject.toml maps the root of the repository to scripts/ in the wheel.
_PACKAGE = Path(__file__).resolve().parent


def shipped(path: str | Path) -> Path:
  """The absolute path of 'train.py', 'configs/x.py', ...; it may not exist."""
  scripts = _PACKAGE / 'scripts'
  return (scripts if scripts.is_dir() else _PACKAGE.parent) / path


def command(script: str) -> str:
  """The command line that starts 'train.py', ..., for messages."""
  if (_PACKAGE / 'scripts').is_dir():
    return f'resnest-jax {Path(script).stem}'
  return f'python {script}'
