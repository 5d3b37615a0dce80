"""Rules about the files themselves: can they be read, are they of one kind."""

import shlex

import numpy as np

from resnest_jax.data.doctor.observe import Observation, Survey, names
from resnest_jax.data.images import is_turned
from resnest_jax.findings import Finding
from resnest_jax.text import listed, share_of

_REWRITE = 'For each of them: mask = cv2.imread(path, cv2.IMREAD_UNCHANGED); '


def unreadable(s: Survey) -> Finding | None:
  bad = [o for o in s.seen if o.error]
  if not bad:
    return None
  _, _, advice = bad[0].error.partition('\n')
  return Finding(
    f'{share_of(bad, s.seen, "sample")} cannot be read: files are missing, '
    'truncated or damaged.',
    names(bad),
    advice
    or 'Copy or download these files again, or take both image and mask away.',
  )


def damaged_jpeg(s: Survey) -> Finding | None:
  bad = [o for o in s.readable if o.damage]
  if not bad:
    return None
  first = bad[0]
  return Finding(
    f'The JPEGs of {len(bad)} of {len(s.readable)} samples can be decoded, but '
    f'the decoder complains; {first.files[0] if first.files else first.name}: '
    f'"{first.damage}".',
    names(bad),
    'Look at them (doctor.png shows the first; --out DIR draws it). If a part '
    'is grey, shifted or of other colours, the file was damaged: copy or '
    'download it again, or take both image and mask away. A few extraneous '
    'bytes in a picture that looks right do no harm.',
  )


def image_depth(s: Survey) -> Finding | None:
  bad = [o for o in s.readable if o.image_type != 'uint8']
  if not bad:
    return None
  return Finding(
    f'{share_of(bad, s.readable, "image", "are")} {_types(bad, "image_type")}; '
    'the network takes 8 bits a channel.',
    names(bad),
    'Convert them, for instance with ImageMagick: mogrify -depth 8 FILES. If '
    'they look dark then, they use only the lower bits: scale them first.',
  )


def mask_depth(s: Survey) -> Finding | None:
  bad = [
    o
    for o in s.readable
    if len(o.mask_shape) == 2 and o.mask_type not in ('uint8', 'bool')
  ]
  if not bad:
    return None
  values = [o.values for o in bad if o.values.size]
  has = ''
  if values:
    has = f' with values from {min(v.min() for v in values)} to '
    has += f'{max(v.max() for v in values)}'
  return Finding(
    f'{share_of(bad, s.readable, "mask", "are")} {_types(bad, "mask_type")}'
    f'{has}; masks have 8 bits.',
    names(bad),
    (
      _convert(s, ' --indices')
      or f"{_REWRITE}cv2.imwrite(path, mask.astype('uint8')). "
    )
    + 'Values above 255 have to be mapped to classes first: masks that have '
    'them are usually instance masks or those of another release.',
  )


def _convert(s: Survey, flags: str = '') -> str:
  """The command for a user's own masks; '' if the data is another."""
  if not s.classes_file:
    return ''
  new = f'{s.masks}_ids'
  words = ['--masks', s.masks, '--classes', s.classes_file, '--out', new]
  return (
    'This writes index masks of all files there:\n  python -m '
    f'resnest_jax.data.prepare palette2id {shlex.join(words)}{flags}\n'
    f'Put {new} in the place of {s.masks} then, or name it in '
    'config.data.folder.masks. '
  )


def _types(observations: list[Observation], attribute: str) -> str:
  return listed(sorted({getattr(o, attribute) for o in observations}))


def size_mismatch(s: Survey) -> Finding | None:
  bad = [o for o in s.readable if o.image_size != o.mask_shape[:2]]
  if not bad:
    return None
  swapped = [o for o in bad if o.image_size == o.mask_shape[1::-1]]
  first = bad[0]
  remedy = (
    'Give each mask the size of its image. If one of both was resized, resize '
    'the mask with interpolation=cv2.INTER_NEAREST, never with another. If '
    'they belong to different pictures, pair them anew.'
  )
  if swapped:
    remedy = _exchanged(swapped) + remedy
  return Finding(
    f'{share_of(bad, s.readable, "mask", "have")} another size than their '
    f'image; {first.name}: image {_size(first.image_size)}, mask '
    f'{_size(first.mask_shape)} (width x height).',
    names(bad),
    remedy,
  )


def _exchanged(swapped: list[Observation]) -> str:
  """Why height and width of some images are those of their masks, reversed."""
  turned = [o for o in swapped if o.files and is_turned(o.files[0])]
  upright = [o for o in swapped if o.files and o not in turned]
  words = f'In {len(swapped)} of them height and width are exchanged. '
  if len(upright) < len(swapped):
    number = f'In {len(turned)} the' if turned else 'Perhaps the'
    words += (
      f'{number} camera noted a rotation in the EXIF data, which is obeyed for '
      'images and which the mask was drawn without. Write the images upright, '
      'for instance with ImageMagick: mogrify -auto-orient FILES, and turn '
      'masks that then do not fit. '
    )
  if len(turned) < len(swapped):
    number = f'In {len(upright)} the' if upright else 'Or the'
    words += (
      f'{number} mask is transposed'
      f'{" (the image has no rotation in its EXIF data)" if upright else ""}: '
      'mask.T undoes that. '
    )
  return words


def _size(shape: tuple[int, ...]) -> str:
  return f'{shape[1]} x {shape[0]}'


def colour_masks(s: Survey) -> Finding | None:
  bad = [o for o in s.readable if len(o.mask_shape) == 3 and not _is_grey(o)]
  if not bad:
    return None
  colours = np.unique(np.concatenate([o.colours for o in bad]), axis=0)
  palette = {tuple(colour) for colour in s.labels.palette.tolist()}
  known = sum(tuple(colour) in palette for colour in colours.tolist())
  return Finding(
    f'{share_of(bad, s.readable, "mask", "are")} colour pictures (RGB, or PNG '
    f'with a palette) instead of class numbers; {known} of their '
    f"{len(colours)} colours are those of this data set's classes.",
    names(bad),
    (
      _convert(s)
      or 'Turn colours into class numbers: python -m resnest_jax.data.prepare '
      'palette2id --masks FOLDER --classes FILE --out NEW_FOLDER. '
    )
    + 'If there are far more colours than classes, the masks were saved as '
    'JPEG, resized with interpolation or are instance masks, and the originals '
    'are needed.',
  )


def grey_masks_in_colour(s: Survey) -> Finding | None:
  bad = [o for o in s.readable if len(o.mask_shape) == 3 and _is_grey(o)]
  if not bad:
    return None
  return Finding(
    f'{share_of(bad, s.readable, "mask", "have")} '
    f'{listed(sorted({o.mask_shape[2] for o in bad}))} channels with the same '
    'numbers in each; masks have one.',
    names(bad),
    f'{_REWRITE}cv2.imwrite(path, mask[..., 0]).',
  )


def _is_grey(o: Observation) -> bool:
  """Whether a mask of several channels has the same in all of them."""
  return bool((o.colours == o.colours[:, :1]).all())
