"""The temperature of a network's probabilities, kept next to its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from resnest_jax.config_keys import TEMPERATURE
from resnest_jax.errors import ending
from resnest_jax.files import read_bounded, write_json
from resnest_jax.untrusted import check_fields, parse_json


class Place(NamedTuple):
  """Where `eval.py --calibrate` keeps it, and of which weights it is."""

  file: Path
  digest: str  # Other weights may come to lie there.

  def read(self, default: float) -> float:
    """The temperature of these weights, or the default; `UserError`: damage."""
    if not self.file.exists():
      return default
    with ending('Remove it; eval.py --calibrate fits it again.'):
      found = parse_json(read_bounded(self.file, 2**20), str(self.file))
      check_fields(found, {'temperature': TEMPERATURE}, str(self.file))
    ours = found.get('digest') == self.digest
    return found['temperature'] if ours else default

  def write(self, temperature: float, data: Mapping[str, Any]) -> None:
    """`data` is the split on which it was fitted, JSON-able."""
    kept = {'temperature': temperature, 'digest': self.digest, 'data': data}
    write_json(self.file, kept)
