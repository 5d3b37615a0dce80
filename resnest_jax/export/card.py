"""The model card of a folder of exports."""

import html
import re
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import resources
from typing import Any, NamedTuple

from resnest_jax import __version__
from resnest_jax.config_keys import SHARE, Accepted, at_least, one_of
from resnest_jax.export.program import SIZES
from resnest_jax.export.promise import Written
from resnest_jax.text import percent, plural
from resnest_jax.untrusted import check_fields, numbers, or_none
from resnest_jax.weights.files import ABOUT
from resnest_jax.weights.infer import title_of

# Of the card, with fields that are filled in. The code of StableHLO and ONNX
# must not need this project.
_PARTS = re.split(
  r'^<!-- (.+) -->\n\n',
  resources.files(__package__).joinpath('card.md').read_text('utf-8'),
  flags=re.M,
)
_NAMED = zip(_PARTS[1::2], _PARTS[2::2], strict=True)
TEXTS = {name: f'{text.strip()}\n' for name, text in _NAMED}
_OF_BANDS = ('true', 'pad')  # Code that any picture needs.
FORMATS = ('stablehlo', 'onnx', 'safetensors', 'mmseg', 'web')
# Of classifiers; the last two are PyTorch's.
CLASS_FORMATS = ('stablehlo', 'onnx', 'safetensors', 'timm', 'official')
# What others may have written in its place.
_ENTRY = {
  'file': Accepted(
    'the name of a file', lambda x: re.fullmatch(r'\w[\w.-]{0,99}', x)
  ),
  'format': one_of({*FORMATS, *CLASS_FORMATS}),
  'size': or_none(numbers('height and width', 2, int, low=1, high=2**15)),
  'agreement': SHARE,
  'pictures': at_least(0),
}
_DATE = Accepted('a date', date.fromisoformat)
_WRITTEN = {
  'jax': Accepted('a version', lambda x: re.fullmatch(r'[\w.+-]{1,40}', x)),
  'on': _DATE,
  'released': or_none(_DATE),
  'read_until': or_none(_DATE),
}
PRECISIONS = ('float16', 'int8')


class Export(NamedTuple):
  """A written file that agrees with its checkpoint."""

  file: str
  format: str
  size: tuple[int, int] | None  # Height and width in pixels; None: any.
  # Share of pixels, or of pictures, with the checkpoint's class, 0 to 1; of
  # features 1 less the largest difference, over its level's largest value.
  agreement: float
  pictures: int
  drawn: bool = False  # Whether the pictures were drawn.
  probabilities: bool | None = None  # An output; None: weights, or not known.
  written: Written | None = None  # Of StableHLO alone.
  features: bool = False  # Whether the outputs are features.
  classes: bool = False  # Whether it is of a classifier.
  canvas: bool = False  # Pictures have any size up to `size`; None: any.
  # Of a smaller ONNX file: pairs of itself and that in float32, `bytes` and
  # `milliseconds` a picture; `layers` in float32, and all; the share of each
  # class's held-out pixels that keep it, None without any.
  reduced: Mapping[str, Any] | None = None

  def entry(self) -> dict[str, Any]:
    """Its entry in `about.json`."""
    # _asdict leaves the nested tuple alone.
    return self._asdict() | {'written': self.written and self.written._asdict()}

  @classmethod
  def of(cls, entry: Mapping[str, Any]) -> 'Export':
    """The inverse of `entry`. Older entries lack the last seven fields.

    Raises `UserError` or `TypeError` for what is no entry.
    """
    check_fields(entry, _ENTRY, f'an export in {ABOUT}')
    size, written = entry['size'], entry.get('written')
    if written is not None:
      check_fields(written, _WRITTEN, f'an export in {ABOUT}')
    return cls(**entry)._replace(
      size=size and tuple(size), written=written and Written(**written)
    )


def model_card(about: Mapping[str, Any], exports: Sequence[Export]) -> str:
  """Returns README.md for the content of `about.json` and the exports."""
  config, classes = about['model'], about['classes']
  features = about.get('features')
  canvas = any(each.canvas for each in exports)
  smaller = ', or made smaller to fit its canvas' * canvas
  if features:
    kind = 'image-feature-extraction', 'backbone'
    title = f'features of {title_of(config)}'
    what = f'A backbone: the {len(features)} levels {", ".join(features)}.'
    outputs, gives = ', '.join(features), 'float32, channels last'
    interface = _of_features(about)
  elif about['task'] == 'classifier':
    kind = 2 * ('image-classification',)
    title = f'{title_of(config)}, a classifier'
    what = f'Classification of pictures, {plural(len(classes), "class")}.'
    outputs, gives = '(probabilities,)', f'float32 (1, {len(classes)})'
    interface = _of_classes(about)
  else:
    kind = 'image-segmentation', 'semantic-segmentation'
    title = f'{title_of(config)} with {config["head"]}'
    what = (
      f'Semantic segmentation, {len(classes)} classes: every pixel of a '
      'picture gets a class.'
    )
    probabilities = any(each.probabilities for each in exports)
    outputs = 'labels, probabilities' if probabilities else '(labels,)'
    gives = 'uint8 (1, H, W)'
    interface = _of_label_maps(about, probabilities, canvas)
  parts = [
    TEXTS['front'].format(*kind),
    f'# {title[0].upper()}{title[1:]}\n',
    f'{what} Written by resnest-jax {__version__}.\n',
    '## Files\n',
    _table(exports),
    'Each was read back and compared with the checkpoint in float32, on '
    f'pictures that were stretched to its size{smaller}.\n',
    '## Input and output\n',
    interface,
  ]
  # One section a format: files of several sizes run alike.
  firsts: dict[tuple, Export] = {}
  for each in exports:
    kind = each.format, each.canvas, each.size is None
    firsts.setdefault(kind, each)
  for first in firsts.values():
    filled = _how_to_run(first, about, outputs=outputs, gives=gives)
    parts += [f'## Run {first.file}\n', filled]
  if any(each.format == 'stablehlo' for each in exports):
    parts += ['## How long StableHLO is read\n', _how_long(exports)]
  if not features:
    parts += ['## Classes\n', _classes(classes, about['palette'])]
  if reduced := [each for each in exports if each.reduced]:
    parts += ['## Smaller files\n', _smaller(reduced, classes)]
  parts += ['## Provenance\n', _provenance(about)]
  return '\n'.join(parts)


def _rows(*rows: Sequence[Any]) -> str:
  """A table, whose first row has the titles."""
  lines = [f'| {" | ".join(map(str, row))} |' for row in rows]
  return '\n'.join([lines[0], '|---' * len(rows[0]) + '|', *lines[1:], ''])


def _table(exports: Sequence[Export]) -> str:
  rows = [('file', 'format', 'picture size', 'agreement', 'on')]
  for each in exports:
    size = '{} high, {} wide'.format(*each.size) if each.size else 'any'
    size = f'up to {size}' if each.canvas and each.size else size
    held = 'held-out ' if each.reduced else ''
    on = 'drawn scene' if each.drawn else 'picture'
    on = plural(each.pictures, held + on)
    rows.append((each.file, each.format, size, f'{each.agreement:.4%}', on))
  return _rows(*rows)


def _program(about: Mapping[str, Any], gives: str) -> str:
  normalization = about['normalization']
  takes, order = 'uint8 (b, H, W, 3), RGB from 0 to 255', normalization['order']
  if bands := normalization.get('bands'):
    takes = f'{normalization["dtype"]} (b, H, W, {len(bands)})'
    order = ', '.join(map(_plain, bands))
  if (temperature := about.get('temperature')) and 'probabilities' in gives:
    gives += f', of logits divided by the temperature {temperature:.4g}'
  return (
    f'StableHLO and ONNX take `images`, {takes}, '
    f'any b, H and W as in the table, and give {gives}. Normalisation is '
    f'inside: the channels as {order}, mean '
    f'{normalization["mean"]}, deviation {normalization["std"]}.'
  )


def _of_label_maps(
  about: Mapping[str, Any], probabilities: bool, canvas: bool
) -> str:
  gives, trained = '`labels`, uint8 (b, H, W)', ''
  of_canvas = f'\n{TEXTS["canvas"]}' if canvas else ''
  if probabilities:
    gives += ' and `probabilities`, float32 (b, H, W, classes)'
  if scale := about['image_scale']:
    trained = (
      f' In training pictures were fitted into {scale[0]} x {scale[1]} pixels '
      '(long and short edge, ratio kept) before scaling at random; sizes near '
      'that suit the network best.'
    )
  return (
    f'{_program(about, gives)} Upsampling is inside, too. Protocol: the whole '
    'picture at once, as large as it is given; no windows, no other scales, no '
    f'mirroring.{trained} Scores of another protocol do not hold for these '
    f'files.\n{of_canvas}'
  )


def _of_classes(about: Mapping[str, Any]) -> str:
  crop = about['protocol']
  return (
    f'{_program(about, "`probabilities`, float32 (b, classes)")} Files of '
    'PyTorch want normalised pictures. The network was evaluated on the middle '
    f'of pictures at {crop["size"]} x {crop["size"]} pixels, by the rule '
    f'{crop["rule"]!r}; the code below cuts it out.\n'
  )


def _of_features(about: Mapping[str, Any]) -> str:
  rows = [('output', 'stride', 'shape')]
  for name, level in about['features'].items():
    s, channels = level['stride'], level['channels']
    rows.append((name, s, f'(b, ceil(H / {s}), ceil(W / {s}), {channels})'))
  return (
    f'{_program(about, "float32, channels last")} A file agrees by 100 % less '
    "the largest difference, over its level's largest value.\n\n"
    f'{_rows(*rows)}'
  )


def _how_to_run(export: Export, about: Mapping[str, Any], **texts: str) -> str:
  kind, fields = export.format, export._asdict() | texts
  padded, fit = export.canvas and export.size, ['read', 'fit']
  fields |= {'sizes': '', 'named': '', 'more': TEXTS['cut'] if padded else ''}
  if export.canvas:
    fit = ['read', 'shrink', 'true', 'pad'] if padded else ['read', 'true']
    fields['sizes'] = ''.join(f', {name}' for name in SIZES)
    fields['named'] = ''.join(f", '{name}': {name}" for name in SIZES)
  if export.classes:
    kind += ' of a classifier' * (kind == 'safetensors')
    edge = max(export.size or (about['protocol']['size'],))
    small = about['protocol']['rule'] == 'gluon' and edge < 320
    fit = ['read', 'crop by GluonCV' if small else 'crop']
    fields |= {'more': TEXTS['top'], 'number': len(about['classes'])}
    # As `crops.center_crop` at this size, whose short edge becomes 8 / 7 of it.
    fields |= {'short': -(-8 * edge // 7), 'share': f'{edge} / {edge + 32}'}
  code = [TEXTS[name] for name in fit]
  if bands := about['normalization'].get('bands'):
    code = [x for x, name in zip(code, fit, strict=True) if name in _OF_BANDS]
    code.insert(0, f"image = np.load('scene.npy')  # (H, W, {len(bands)})\n")
  fields['fit'] = ''.join(code)
  if export.size:  # Of a program.
    fields['fit'] = fields['fit'].format(**fields)
  text = TEXTS[kind].format(**fields)
  if bands:
    text = text.replace('\nfrom PIL import Image, ImageOps', '')
    text = text.replace('street.jpg', 'scene.npy')
  return text


def _how_long(exports: Sequence[Export]) -> str:
  said = [f'- {x.file}: {x.written.sentence()}\n' for x in exports if x.written]
  weights = 'the original weights, into a new folder'
  if any(each.size is None and not each.canvas for each in exports):
    weights = 'the weights in this folder: `resnest-jax export --renew .`'
  return (
    'JAX may refuse StableHLO that a much older or a newer release wrote.\n\n'
    f'{"".join(said)}\nThis project writes the files again by the JAX at '
    f'hand, from {weights} (in a clone, `python export.py`). Without it, use '
    'the release that wrote them.\n'
  )


def _smaller(exports: Sequence[Export], classes: Sequence[str]) -> str:
  rows = [('file', 'MB', 'float32', 'ms a picture', 'float32', 'in float')]
  shares = [('class', *(each.file for each in exports))]
  for file, x in ((each.file, each.reduced) for each in exports):
    figures = *(n / 1e6 for n in x['bytes']), *x['milliseconds']
    kept = '{:d} of {:d} layers'.format(*x['layers'])
    rows.append((file, *(f'{n:.1f}' for n in figures), kept))
  found = zip(*(each.reduced['classes'] for each in exports), strict=False)
  for name, row in zip(classes, found, strict=False):
    if {*row} != {None}:
      shares.append((_plain(name), *map(percent, row)))
  return f'{TEXTS["smaller"].format(_rows(*rows))}\n{_rows(*shares)}'


def _classes(
  classes: Sequence[str], palette: Sequence[Sequence[int]] | None
) -> str:
  rows = list(enumerate(map(_plain, classes)))
  if palette is None:
    return _rows(('number', 'class'), *rows)
  codes = ['#{:02x}{:02x}{:02x}'.format(*colour) for colour in palette]
  rows = [(*row, code) for row, code in zip(rows, codes, strict=True)]
  return _rows(('label', 'class', 'colour'), *rows)


def _provenance(about: Mapping[str, Any]) -> str:
  model = about['model']
  keys = ('head', 'output_stride', 'dilation_rule')
  facts = [('backbone', title_of(model))]
  facts += [(key, model[key]) for key in keys if key in model]
  facts += [
    (key, _plain(str(value)))
    for key, value in about['provenance'].items()
    if isinstance(value, str | int) and key != 'backbone_known'
  ]
  return ''.join(f'- {key.replace("_", " ")}: {x}\n' for key, x in facts)


def _plain(text: str) -> str:
  """Text that Markdown and the HTML in it show as it is, in one line."""
  # Line breaks end a row of a table; other control characters are not shown.
  text = ''.join(x if x.isprintable() else ' ' for x in text)
  return re.sub(r'([\\`*_[\]|~$#])', r'\\\1', html.escape(text, quote=False))
