"""Finds the network in what a weight file holds, whatever is around it.

Trainings nest state dicts, keep averages of the weights next to them, and
wrap the network in modules whose names precede all of its names.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from resnest_jax.errors import UserError
from resnest_jax.text import listed
from resnest_jax.weights.names import head_modules

# Every ResNeSt has both, in others' names or ours.
_STEM = re.compile(
  r'(.*?)((params/)?(backbone[./](bottom_up\.)?|pretrained\.)?)'
  r'((stem|conv1)\.0\.weight|stem\.conv1_1\.weight|stem_conv1/kernel)'
)
_BLOCKS = (
  *('layer1.0.conv1.weight', 'res2.0.conv1.weight', 'layer1_0/conv1/kernel'),
)
_AVERAGE = re.compile(r'ema|averag|swa|teacher|momentum|target', re.I)


class Network(NamedTuple):
  """A network in a file."""

  part: str  # The way to it: keys of mappings, then modules, joined by '/'.
  # Its own, and those outside of it in the same mapping, unless they are of
  # another network or single numbers, such as an average's counter.
  tensors: dict[str, Any]
  in_encoder: bool  # Of segmentation_models.pytorch, whose ResNeSt is timm's.


def find_network(
  content: Mapping[Any, Any], part: str | None
) -> tuple[Network | None, list[Network]]:
  """The network called `part`, or the likeliest, and all; or a `UserError`."""
  found = [
    network
    for path, tensors in _state_dicts(content, (), set())
    for network in _networks(path, tensors)
  ]
  # The weights themselves before averages of them, as in mmsegmentation.
  firsts = {'state_dict': 0, 'model': 1}
  found.sort(key=lambda x: firsts.get(x.part.partition('/')[0], 2))
  found.sort(key=lambda x: bool(_AVERAGE.search(x.part)))
  if part is None:
    return (found[0] if found else None), found
  for network in found:
    if network.part == part:
      return network, found
  names = listed((x.part or "''" for x in found), 12) or 'no network'
  raise UserError(f'there is no part {part!r} of the file; it has {names}.')


def _state_dicts(
  content: Any, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
  """Mappings in mappings that have arrays, by the keys that lead to them."""
  # A pickle may hold one mapping in many places, even in itself.
  if not isinstance(content, Mapping) or id(content) in seen:
    return
  seen.add(id(content))
  tensors = {
    name: value
    for name, value in content.items()
    if isinstance(name, str) and hasattr(value, 'shape')
  }
  if tensors:
    yield path, tensors
  for key, value in content.items():
    yield from _state_dicts(value, (*path, str(key)), seen)


def _networks(
  path: tuple[str, ...], tensors: Mapping[str, Any]
) -> Iterator[Network]:
  stems = filter(None, map(_STEM.fullmatch, tensors))
  prefixes = dict.fromkeys(
    x[1] for x in stems if any(x[1] + x[2] + y in tensors for y in _BLOCKS)
  )
  owner = {
    name: max((x for x in prefixes if name.startswith(x)), key=len, default='')
    for name in tensors
  }
  around = {
    name: value
    for name, value in tensors.items()
    if owner[name] not in prefixes and value.shape not in ((), (1,))
  }
  for prefix in prefixes:
    inside = {
      name.removeprefix(prefix): value
      for name, value in tensors.items()
      if owner[name] == prefix and name.startswith(prefix)
    }
    # The backbone itself may have another name next to mmsegmentation's heads.
    if 'stem.0.weight' in inside and head_modules(around):
      inside = {f'backbone.{name}': value for name, value in inside.items()}
    part = '/'.join(filter(None, (*path, prefix.rstrip('.'))))
    in_encoder = re.search(r'(^|\.)encoder\.(model\.)?$', prefix) is not None
    yield Network(part, around | inside, in_encoder)
