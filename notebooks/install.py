"""Installs what the project needs where a notebook runs, and says what changed.

    python notebooks/install.py
    %run notebooks/install.py

The second is for a notebook: it also sees whether the session has imported a
package that was replaced. Nothing is done where the bounds of pyproject.toml
are met. Where they are not, JAX becomes the tested version, with what the TPU
or GPU needs; other packages are replaced only if they do not fit.
"""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# PCI numbers of TPU v2 to v7, as JAX has them: Google's vendor number alone is
# that of network cards as well.
GOOGLE = '0x1ae0'
TPUS = ('0x0027', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076')
# Drivers from which on a CUDA runs, and the oldest GPUs of CUDA 13: a T4 has
# 7.5, a P100 6.0.
CUDA13_DRIVER, CUDA12_DRIVER = 580, 525
CUDA13_CAPABILITY = (7, 5)


def main() -> None:
  """Installs, lists the changes, and ends with an error where to restart."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))
  needed = project['project']['dependencies']
  if all(map(is_met, needed)):
    print('nothing to change: all that the project needs is installed')
    return
  jax = jax_requirement(choose_extra(has_tpu(), *nvidia()))
  print(f'installing {jax} and what the project needs', flush=True)
  before = installed()
  pip('install', '--quiet', *needed, jax)
  after = installed()
  new = [f'{name} {after[name]}' for name in after if name not in before]
  print('new:', ', '.join(new) or 'nothing')
  replaced = [x for x in after if before.get(x, after[x]) != after[x]]
  print('replaced:', '' if replaced else 'nothing')
  for name in replaced:
    print(f'  {name} {before[name]} -> {after[name]}')
  if old := imported(replaced):
    sys.exit(
      f'restart the session now, because it has imported {", ".join(old)} as '
      'they were (Colab: Runtime > Restart session; Kaggle: Run > Restart; '
      'Jupyter: Kernel > Restart). Then run the notebook from its first cell.'
    )


def is_met(needed: str) -> bool:
  """Whether a package is installed in a version that fits, like 'jax>=0.10'."""
  requirement = Requirement(needed)
  try:
    version = metadata.version(requirement.name)
  except metadata.PackageNotFoundError:
    return False
  return requirement.specifier.contains(version, prereleases=True)


def installed() -> dict[str, str]:
  """Version by name."""
  listed = json.loads(pip('list', '--format=json'))
  return {canonicalize_name(x['name']): x['version'] for x in listed}


def imported(names: list[str]) -> list[str]:
  """Those packages of which this process has loaded a file."""
  importlib.invalidate_caches()
  modules = list(sys.modules.values())
  loaded = {getattr(module, '__file__', None) for module in modules}
  found = []
  for name in names:
    files = metadata.distribution(name).files or ()
    if any(str(file.locate()) in loaded for file in files):
      found.append(name)
  return found


def choose_extra(
  tpu: bool, driver: int | None, capability: tuple[int, ...] = ()
) -> str:
  """The extra of the package jax: 'tpu', 'cuda13', 'cuda12', or ''.

  Args:
    tpu: whether there is one.
    driver: of the NVIDIA GPU; None: there is none.
    capability: of the GPU, such as (7, 5).
  """
  if tpu:
    return 'tpu'
  if driver is None:
    return ''
  if driver >= CUDA13_DRIVER and capability >= CUDA13_CAPABILITY:
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


def nvidia() -> tuple[int | None, tuple[int, ...]]:
  """Driver and capability, such as (580, (7, 5)); (None, ()) without a GPU."""
  query = ('--query-gpu=driver_version,compute_cap', '--format=csv,noheader')
  try:
    said = subprocess.run(
      ['nvidia-smi', *query], capture_output=True, text=True, check=True
    ).stdout
  except (OSError, subprocess.CalledProcessError):
    return None, ()
  found = re.match(r'(\d+)\.\S*, (\d+)\.(\d+)', said)
  if found is None:
    return None, ()
  driver, *capability = map(int, found.groups())
  return driver, tuple(capability)


def jax_requirement(extra: str) -> str:
  """Such as 'jax[tpu]==0.12.0.1': of requirements.txt, for this Python."""
  for line in (ROOT / 'requirements.txt').read_text('utf-8').splitlines():
    if line.startswith('jax=='):
      pin = Requirement(line)
      if pin.marker is None or pin.marker.evaluate():
        return f'{f"jax[{extra}]" if extra else "jax"}{pin.specifier}'
  sys.exit('error: requirements.txt has no line jax== for this Python.')


def pip(*arguments: str) -> str:
  """What pip in this Python prints; what it complains about is shown."""
  command = [sys.executable, '-m', 'pip', *arguments]
  done = subprocess.run(command, capture_output=True, text=True)
  # Not every notebook shows what a process writes by itself.
  print(done.stderr, end='')
  if done.returncode:
    sys.exit('error: pip has failed; its reasons stand above.')
  return done.stdout


if __name__ == '__main__':
  main()
