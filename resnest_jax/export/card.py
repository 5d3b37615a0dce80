"""The model card of a folder of exports."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

from resnest_jax import __version__
from resnest_jax.config_keys import SHARE, Accepted, at_least, one_of
from resnest_jax.export.program import SIZES
from resnest_jax.export.promise import Written
from resnest_jax.text import percent, plural
from resnest_jax.untrusted import check_fields, list_of, numbers, or_none
from resnest_jax.weights.files import ABOUT
from resnest_jax.weights.infer import title_of

FRONT = """---
library_name: resnest-jax
pipeline_tag: {}
tags: [jax, resnest, {}]
---
"""
READ = (
  "image = ImageOps.exif_transpose(Image.open('street.jpg')).convert('RGB')"
)
FIT = f'{READ}\nimage = image.resize(({{size[1]}}, {{size[0]}}))'
# On a canvas; a free one is as large as the picture.
SHRINK = f'{READ}\nimage.thumbnail(({{size[1]}}, {{size[0]}}))  # If too large.'
TRUE = """
heights, widths = (np.int32([x]) for x in np.shape(image)[:2])"""
PAD = """
beyond = (0, {size[0]} - heights[0]), (0, {size[1]} - widths[0]), (0, 0)
image = np.pad(image, beyond)"""
CUT = 'labels = labels[:, : heights[0], : widths[0]]  # Beyond they are 255.\n'
_OURS = """\
With resnest-jax, which {}, from this folder:

```python
import resnest_jax as rj

model = rj.from_checkpoint('.')
{}
```
"""
CANVAS = """
Files named `canvas` take pictures of any size up to theirs, and `canvas_free`
up to H and W of `images`, whatever these are. Each picture lies in the upper
left corner, with any finite values around it; `heights` and `widths`, int32
(b,), are its size. It gets the labels that it would get alone. Those around it
are 255, and probabilities there 0.
"""
SMALLER = """\
Files in float16 and int8 take and give the same as those in float32. Half of
the pictures calibrated those in int8; the others, held out, decided that the
files were written. Times are medians of the machine that wrote them, in
onnxruntime on its CPU, both files in turn. Rounding differs between processors.

{}
Of the held-out pixels of each class in float32, those that keep it, in percent:

{}"""
# How to run each format, with fields that `model_card` fills in. The code of
# StableHLO and ONNX must not need this project.
HOW_TO_RUN = {
  'stablehlo': """\
With `pip install jax flatbuffers numpy pillow`; this project is not needed.
It runs on CPU, CUDA and TPU:

```python
import jax, numpy as np
from jax import export
from PIL import Image, ImageOps

with open('{file}', 'rb') as file:
  program = jax.jit(export.deserialize(bytearray(file.read())).call)
{fit}
{outputs} = program(np.asarray(image)[None]{sizes})  # {gives}
{more}```
""",
  'onnx': """\
With `pip install onnxruntime numpy pillow`:

```python
import numpy as np, onnxruntime
from PIL import Image, ImageOps

providers = onnxruntime.get_available_providers()
session = onnxruntime.InferenceSession('{file}', providers=providers)
{fit}
{outputs} = session.run(
  None, {{'images': np.asarray(image)[None]{named}}}
)
{more}```
""",
  'web': """\
In a browser, from any server of static files; pictures stay on the device.
Serve the folder by `python -m http.server`, say, and open its address. Browsers
give the camera and WebGPU to pages of https or localhost alone.
""",
  'safetensors': _OURS.format(
    'resizes pictures as in training and gives label maps of\ntheir own size',
    "labels = model.predict('street.jpg').labels  # uint8 (H, W)",
  ),
  'mmseg': """\
With mmsegmentation and its configuration of the same network (`model.pth` has
the class names and colours in its meta):

```python
from mmseg.apis import inference_model, init_model

model = init_model('CONFIG.py', 'model.pth')
labels = inference_model(model, 'street.jpg').pred_sem_seg.data
```
""",
}
# Of a classifier. Programs run as above, on the middle of a picture.
CROP = (
  f'{READ}\n'
  + """\
side = {share} * min(image.size)  # The middle of the picture.
left, top = (round((length - side) / 2) for length in image.size)
image = image.crop((left, top, left + side, top + side))
image = image.resize(({size[1]}, {size[0]}), Image.Resampling.BICUBIC)"""
)
CROP_OF_GLUON = (
  f'{READ}\n'
  + """\
new = tuple({short} * length // min(image.size) for length in image.size)
box, bilinear = (0, 0, *image.size), Image.Resampling.BILINEAR  # As OpenCV.
image = image.transform(new, Image.Transform.EXTENT, box, bilinear)
left, top = (n // 2 for n in (new[0] - {size[1]}, new[1] - {size[0]}))
image = image.crop((left, top, left + {size[1]}, top + {size[0]}))"""
)
TOP = """\
best = np.argsort(-np.asarray(probabilities)[0])[:5]  # Class numbers.
"""
_TORCH = """\
With PyTorch and the same network, say `MODEL, num_classes={number})`:

```python
import torch

model.load_state_dict(torch.load('{file}')['state_dict'])
```
"""
HOW_TO_CLASSIFY = {
  'safetensors': _OURS.format(
    'crops pictures as in its evaluation',
    "print(model.predict('street.jpg').top())  # Names and probabilities.",
  ),
  'timm': _TORCH.replace('MODEL', "timm.create_model('resnest50d'"),
  'official': _TORCH.replace(
    'MODEL', 'resnest.torch.resnest50(pretrained=False'
  ),
}
# What others may have written in its place.
_ENTRY = {
  'file': Accepted(
    'the name of a file', lambda x: re.fullmatch(r'\w[\w.-]{0,99}', x)
  ),
  'format': one_of({**HOW_TO_RUN, **HOW_TO_CLASSIFY}),
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
# Of a smaller ONNX file and that in float32.
_PAIR = numbers('two numbers', 2, int, float, low=0, high=2**50)
_REDUCED = {
  'bytes': _PAIR,
  'milliseconds': _PAIR,  # A picture, where they were written.
  # Of the held-out pixels of each class, the share that keeps it.
  'classes': list_of(
    'shares or nothing', lambda x: x is None or SHARE.holds(x)
  ),
  # Names of layers that compute in float32, of so many.
  'kept': list_of('names', lambda x: re.fullmatch(r'[\w./:-]{1,200}', x)),
  'layers': at_least(0),
}


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
  reduced: Mapping[str, Any] | None = None  # `_REDUCED`, of smaller files.

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
    if entry.get('reduced') is not None:
      check_fields(entry['reduced'], _REDUCED, f'an export in {ABOUT}')
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
    FRONT.format(*kind),
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
    size = f'up to {size}' if each.canvas else size
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
    f'files.\n{CANVAS * canvas}'
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
  how, fields = HOW_TO_RUN, export._asdict() | texts
  padded = export.canvas and export.size
  fields |= {'fit': FIT, 'more': CUT if padded else ''}
  fields |= {'sizes': '', 'named': ''}
  if export.canvas:
    fields['fit'] = SHRINK if padded else READ
    fields['sizes'] = ''.join(f', {name}' for name in SIZES)
    fields['named'] = ''.join(f", '{name}': {name}" for name in SIZES)
  if export.classes:
    how = HOW_TO_RUN | HOW_TO_CLASSIFY
    # As `crops.center_crop` at this size.
    edge = max(export.size or (about['protocol']['size'],))
    small = about['protocol']['rule'] == 'gluon' and edge < 320
    fields |= {'fit': CROP_OF_GLUON if small else CROP, 'more': TOP}
    short = math.ceil(edge / 0.875)
    fields |= {'short': short, 'share': f'{edge} / {edge + 32}'}
    fields |= {'number': len(about['classes'])}
  if bands := about['normalization'].get('bands'):
    fields['fit'] = f"image = np.load('scene.npy')  # (H, W, {len(bands)})"
  if export.canvas:
    fields['fit'] += TRUE + (PAD if padded else '')
  if export.size:  # Of a program.
    fields['fit'] = fields['fit'].format(**fields)
  text = how[export.format].format(**fields)
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
    kept = ', '.join([f'{len(x["kept"])} of {x["layers"]}', *x['kept']])
    rows.append((file, *(f'{n:.1f}' for n in figures), kept))
  found = zip(*(each.reduced['classes'] for each in exports), strict=False)
  for name, row in zip(classes, found, strict=False):
    if {*row} != {None}:
      shares.append((_plain(name), *map(percent, row)))
  return SMALLER.format(_rows(*rows), _rows(*shares))


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
