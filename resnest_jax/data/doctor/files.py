"""Rules about the files themselves: readable, of the right kind and size."""

import shlex

import numpy as np

from resnest_jax.data.doctor.observe import Observation, Survey, names
from resnest_jax.data.images import is_turned
from resnest_jax.findings import Finding
from resnest_jax.text import listed, share_of

REWRITE = 'For each of them: mask = cv2.imread(path, cv2.IMREAD_UNCHANGED); '


def unreadable(s: Survey) -> Finding | None:
  """missing, truncated or damaged images and masks"""
  bad = [o for o in s.seen if o.error]
  if not bad:
    return None
  # Prepared data puts the command that repairs it on further lines.
  _, _, advice = bad[0].error.partition('\n')
  return Finding(
    f'{share_of(bad, s.seen, "sample")} cannot be read: files are missing, '
    'truncated or damaged.',
    names(bad),
    advice
    or 'Copy or download these files again, or remove both image and mask.',
  )


def damaged_jpeg(s: Survey) -> Finding | None:
  """JPEGs that the decoder complains about: perhaps damaged inside"""
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
    'is grey, shifted or discoloured, the file is damaged: copy or '
    'download it again, or remove both image and mask. A few extraneous '
    'bytes in a picture that looks right do no harm.',
  )


def image_depth(s: Survey) -> Finding | None:
  """16-bit images"""
  bad = [o for o in s.readable if o.image_type != 'uint8']
  if not bad:
    return None
  return Finding(
    f'{share_of(bad, s.readable, "image", "are")} {_types(bad, "image_type")}; '
    'the network takes 8 bits per channel.',
    names(bad),
    'Convert them, for example with ImageMagick: mogrify -depth 8 FILES. If '
    'the results are dark, the images use only their lower bits: scale them '
    'first.',
  )


def mask_depth(s: Survey) -> Finding | None:
  """masks of 16 bits, or of numbers with fractions"""
  # PNGs of 1, 2 or 4 bits are not among them: OpenCV decodes them to uint8.
  bad = [
    o
    for o in s.readable
    if len(o.mask_shape) == 2 and o.mask_type not in ('uint8', 'bool')
  ]
  if not bad:
    return None
  # Masks of floats have no values here; see `observe._values`.
  values = np.concatenate([o.values for o in bad])
  has = ''
  if values.size:
    has = f' with values from {values.min()} to {values.max()}'
  return Finding(
    f'{share_of(bad, s.readable, "mask", "are")} {_types(bad, "mask_type")}'
    f'{has}; masks have 8 bits.',
    names(bad),
    _convert(
      s, ' --indices', f"{REWRITE}cv2.imwrite(path, mask.astype('uint8')). "
    )
    + 'Map values above 255 to classes first: masks that contain them are '
    'usually instance masks or belong to another release.',
  )


def _convert(s: Survey, flags: str, otherwise: str) -> str:
  """The command that converts a user's own masks, or words for other data."""
  if not s.classes_file:
    return otherwise
  new = f'{s.masks}_ids'
  words = ['--masks', s.masks, '--classes', s.classes_file, '--out', new]
  return (
    'This converts all files there to index masks:\n  python -m '
    f'resnest_jax.data.prepare palette2id {shlex.join(words)}{flags}\n'
    f'Then move {new} to {s.masks}, or name it in '
    'config.data.folder.masks. '
  )


def _types(observations: list[Observation], attribute: str) -> str:
  return listed(sorted({getattr(o, attribute) for o in observations}))


def size_mismatch(s: Survey) -> Finding | None:
  """masks of another size than their image"""
  bad = [o for o in s.readable if o.image_size != o.mask_shape[:2]]
  if not bad:
    return None
  swapped = [o for o in bad if o.image_size == o.mask_shape[1::-1]]
  first = bad[0]
  return Finding(
    f'{share_of(bad, s.readable, "mask", "have")} a different size from their '
    f'image; {first.name}: image {_size(first.image_size)}, mask '
    f'{_size(first.mask_shape)} (width x height).',
    names(bad),
    f'{_exchanged(swapped) if swapped else ""}Give each mask the size of its '
    'image. If one of the two was resized, resize the mask with '
    'interpolation=cv2.INTER_NEAREST and no other. If they belong to different '
    'pictures, pair them anew.',
  )


def _exchanged(swapped: list[Observation]) -> str:
  """Explains exchanged heights and widths, by EXIF data where it exists."""
  # Prepared data has no EXIF data left: both causes are named as possible.
  turned = [o for o in swapped if o.files and is_turned(o.files[0])]
  upright = [o for o in swapped if o.files and o not in turned]
  words = f'In {len(swapped)} of them height and width are exchanged. '
  if len(upright) < len(swapped):
    number = f'In {len(turned)} the' if turned else 'Perhaps the'
    words += (
      f'{number} camera noted a rotation in the EXIF data, which applies to '
      'images, and the mask was drawn without it. Write the images upright, '
      'for example with ImageMagick: mogrify -auto-orient FILES, and rotate '
      'masks that then do not fit. '
    )
  if len(turned) < len(swapped):
    number = f'In {len(upright)} the' if upright else 'Or the'
    why = ' (the image has no rotation in its EXIF data)' if upright else ''
    words += f'{number} mask is transposed{why}: mask.T undoes that. '
  return words


def _size(shape: tuple[int, ...]) -> str:
  return f'{shape[1]} x {shape[0]}'


def colour_masks(s: Survey) -> Finding | None:
  """RGB or palette masks instead of class numbers"""
  bad = [o for o in s.readable if len(o.mask_shape) == 3 and not _is_grey(o)]
  if not bad:
    return None
  # Thousands of others than the palette's come from JPEG or interpolation.
  colours = {tuple(colour) for o in bad for colour in o.colours.tolist()}
  known = colours & {tuple(colour) for colour in s.labels.palette.tolist()}
  return Finding(
    f'{share_of(bad, s.readable, "mask", "are")} colour pictures (RGB, or PNG '
    f'with a palette) instead of class numbers; {len(known)} of their '
    f"{len(colours)} colours are in this data set's palette.",
    names(bad),
    _convert(
      s,
      '',
      'Turn colours into class numbers: python -m resnest_jax.data.prepare '
      'palette2id --masks FOLDER --classes FILE --out NEW_FOLDER. ',
    )
    + 'If there are far more colours than classes, the masks were saved as '
    'JPEG, were resized with interpolation, or are instance masks: use the '
    'originals.',
  )


def grey_masks_in_colour(s: Survey) -> Finding | None:
  """class numbers repeated in several channels"""
  bad = [o for o in s.readable if len(o.mask_shape) == 3 and _is_grey(o)]
  if not bad:
    return None
  return Finding(
    f'{share_of(bad, s.readable, "mask", "have")} '
    f'{listed(sorted({o.mask_shape[2] for o in bad}))} channels with equal '
    'numbers; masks have one channel.',
    names(bad),
    f'{REWRITE}cv2.imwrite(path, mask[..., 0]).',
  )


def _is_grey(o: Observation) -> bool:
  # Also true of two channels, for which `observe._colours` finds nothing.
  return bool((o.colours == o.colours[:, :1]).all())
