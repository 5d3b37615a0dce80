"""Where the scripts and `configs/` are: in the clone, or in a wheel.

The wheel has them in `resnest_jax/scripts`, laid out as in the root of the
repository; pyproject.toml says so.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(path: str | Path) -> Path:
  """The path of 'train.py', 'configs/common.py', ... that came with this code.

  Args:
    path: relative to the root of the repository.

  Returns:
    The absolute path; whether there is such a file is not looked at.
  """
  scripts = _PACKAGE / 'scripts'
  return (scripts if scripts.is_dir() else _PACKAGE.parent) / path


def command(script: str) -> str:
  """How a user starts 'train.py', ...: in the clone, or from a wheel."""
  if (_PACKAGE / 'scripts').is_dir():
    return f'resnest-jax {Path(script).stem}'
  return f'python {script}'
