"""Installs this checkout where a notebook runs: its first cell on Colab does.

    python notebooks/install.py

JAX is the tested version, with what the machine's TPU or GPU needs; other
packages are replaced only where they are too old.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# PCI numbers of TPU v2 to v7, as JAX has them: Google's vendor number alone is
# that of network cards as well.
GOOGLE = '0x1ae0'
TPUS = ('0x0027', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076')
# Drivers from which on a CUDA runs.
CUDA13_DRIVER, CUDA12_DRIVER = 580, 525
TORCH = 'torch --index-url https://download.pytorch.org/whl/cpu'


def main() -> None:
  """Installs, and says for which device."""
  extra = choose_extra(has_tpu(), driver_version())
  requirements = [str(ROOT), jax_requirement(extra)]
  print(f'installing {requirements[1]} and what the project needs', flush=True)
  pip('-e', *requirements)
  if importlib.util.find_spec('torch') is None:  # Reads published weights.
    pip(*TORCH.split())


def choose_extra(tpu: bool, driver: int | None) -> str:
  """The extra of the package jax: 'tpu', 'cuda13', 'cuda12', or ''.

  Args:
    tpu: whether there is one.
    driver: of the NVIDIA GPU; None: there is none.
  """
  if tpu:
    return 'tpu'
  if driver is None:
    return ''
  if driver >= CUDA13_DRIVER:
    return 'cuda13'
  if driver >= CUDA12_DRIVER:
    return 'cuda12'
  sys.exit(
    f'error: the NVIDIA driver is {driver}, and JAX needs {CUDA12_DRIVER} or '
    'newer. Choose another runtime, or one without a GPU.'
  )


def has_tpu(devices: Path = Path('/sys/bus/pci/devices')) -> bool:
  """Whether a TPU is among the devices of the PCI bus."""
  for vendor in devices.glob('*/vendor'):
    device = vendor.with_name('device').read_text().strip()
    if vendor.read_text().strip() == GOOGLE and device in TPUS:
      return True
  return False


def driver_version() -> int | None:
  """The main number of the NVIDIA driver, such as 580; None without a GPU."""
  query = ('--query-gpu=driver_version', '--format=csv,noheader')
  try:
    said = subprocess.run(
      ['nvidia-smi', *query], capture_output=True, text=True, check=True
    ).stdout
  except (OSError, subprocess.CalledProcessError):
    return None
  found = re.match(r'(\d+)\.', said)
  return int(found[1]) if found else None


def jax_requirement(extra: str) -> str:
  """'jax[tpu]==0.10.2': the version of requirements.txt."""
  pins = (ROOT / 'requirements.txt').read_text()
  version = re.search(r'^jax==(\S+)', pins, re.MULTILINE)[1]
  return f'jax[{extra}]=={version}' if extra else f'jax=={version}'


def pip(*arguments: str) -> None:
  """Runs `pip install` in this Python; what it complains about is shown."""
  command = [sys.executable, '-m', 'pip', 'install', '--quiet', *arguments]
  if subprocess.run(command).returncode:
    sys.exit('error: pip has failed; its reasons stand above.')


if __name__ == '__main__':
  main()
