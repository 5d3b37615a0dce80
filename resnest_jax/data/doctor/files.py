"""Rules about the files themselves: readable, of the right kind and size."""

from resnest_jax.data.doctor.observe import Observation, Survey, names
from resnest_jax.data.headers import BANDS, left_out, to_8_bits
from resnest_jax.data.images import is_turned
from resnest_jax.data.own.masks import INDEX_MASKS
from resnest_jax.findings import Finding
from resnest_jax.labels import IGNORE
from resnest_jax.text import listed, plural, share, share_of

REWRITE = (
  'For each of them, into a new folder: mask = cv2.imread(old, '
  'cv2.IMREAD_UNCHANGED); '
)


def unreadable(s: Survey) -> Finding | None:
  """missing, truncated or damaged images and masks, and those of kinds that
  cannot be decoded
  """
  if not (bad := [o for o in s.seen if o.error]):
    return None
  # Prepared data puts the command that repairs it on further lines.
  _, _, advice = bad[0].error.partition('\n')
  return Finding(
    f'{share_of(bad, s.seen, "sample")} cannot be read.',
    names(bad),
    advice
    or 'Do what their lines say, copy or download these files again, or '
    'remove both image and mask.',
  )


def damaged_jpeg(s: Survey) -> Finding | None:
  """JPEGs that the decoder complains about: perhaps damaged inside"""
  if not (bad := [o for o in s.readable if o.damage]):
    return None
  return Finding(
    f'The JPEGs of {len(bad)} of {len(s.readable)} samples can be decoded, but '
    f'the decoder complains; {bad[0].name}: "{bad[0].damage}".',
    names(bad),
    'Look at them (--out DIR draws the first, in doctor.png). If a part is '
    'grey, shifted or discoloured, copy or download the file again, or remove '
    'both image and mask. A few extraneous bytes alone do no harm.',
  )


def image_depth(s: Survey) -> Finding | None:
  """16-bit images; with data.bands images of several types"""
  types = [o.image_type for o in s.readable]
  usual = max(types, key=types.count) if s.bands and types else 'uint8'
  if not (bad := [o for o in s.readable if o.image_type != usual]):
    return None
  return Finding(
    f'{share_of(bad, s.readable, "image", "are")} '
    f'{listed(sorted({o.image_type for o in bad}))}; the network takes {usual}'
    f'{", as the others are" if s.bands else ""}.',
    names(bad),
    'Write these in the same way as the others.'
    if s.bands
    else f'{to_8_bits(max(o.white for o in bad))} {BANDS}',
  )


def image_channels(s: Survey) -> Finding | None:
  """images with a channel that is not used, such as transparency or infrared"""
  if not (bad := [o for o in s.readable if left_out(o.channels)]):
    return None
  numbers = sorted({o.channels for o in bad})
  return Finding(
    f'{share_of(bad, s.readable, "image", "have")} '
    f'{" or ".join(map(left_out, numbers))}.',
    names(bad),
    'The network sees red, green and blue. If these are other channels of the '
    f'file, write the three that it should see into new files. {BANDS}',
  )


def mask_depth(s: Survey) -> Finding | None:
  """masks of 1, 2 or 4 bits, of prepared data also of 16, or of fractions"""
  # Bits only show in the file: OpenCV decodes fewer than 8 to uint8.
  bad = [
    o
    for o in s.readable
    if len(o.mask_shape) == 2
    and o.kind not in INDEX_MASKS
    and (o.mask_type not in ('uint8', 'bool') or o.kind.endswith('-bit grey'))
  ]
  if not bad:
    return None
  kinds = sorted({o.kind or o.mask_type for o in bad})
  remedy = f"{REWRITE}cv2.imwrite(new, mask.astype('uint8')). "
  if s.conversion:
    remedy = s.conversion.command('mask_values')
  if s.conversion and s.unknown_values.size:  # Which are refused.
    remedy = f'Name their values in {s.classes_file} first. {remedy}'
  # Masks of floats have no values here; see `observe._values`.
  if max(o.values.max(initial=0) for o in bad) > IGNORE:
    remedy = (
      'Map values above 255 to classes first: masks that contain them are '
      f'usually instance masks or belong to another release. {remedy}'
    )
  return Finding(
    f'{share_of(bad, s.readable, "mask", "are")} {listed(kinds)}; masks have 8 '
    'bits.',
    names(bad),
    remedy.rstrip(),
  )


def size_mismatch(s: Survey) -> Finding | None:
  """masks of another size than their image"""
  if not (bad := [o for o in s.readable if o.image_size != o.mask_shape[:2]]):
    return None
  swapped = [o for o in bad if o.image_size == o.mask_shape[1::-1]]
  size, mask_size = bad[0].image_size, bad[0].mask_shape
  return Finding(
    f'{share_of(bad, s.readable, "mask", "have")} a different size from their '
    f'image; {bad[0].name}: image {size[1]} x {size[0]}, mask '
    f'{mask_size[1]} x {mask_size[0]} (width x height).',
    names(bad),
    f'{_exchanged(swapped)}Give each mask the size of its '
    'image. If one of the two was resized, resize the mask with '
    'interpolation=cv2.INTER_NEAREST and no other. If they belong to different '
    'pictures, pair them anew.',
  )


def _exchanged(swapped: list[Observation]) -> str:
  """Explains exchanged heights and widths, by EXIF data where it exists."""
  if not swapped:
    return ''
  # Prepared data has none left.
  turned = sum(is_turned(o.file) for o in swapped if o.file)
  return (
    f'In {len(swapped)} of them height and width are exchanged. '
    f'{share(turned, len(swapped), "image", "have")} a rotation in the EXIF '
    'data, which applies to images, and the mask was drawn without it: write '
    'the images upright into a new folder, for example with ImageMagick: '
    'mogrify -path NEW_FOLDER -auto-orient FILES, and rotate masks that then '
    'do not fit. Otherwise the mask is transposed: mask.T undoes that. '
  )


def colour_masks(s: Survey) -> Finding | None:
  """RGB or palette masks instead of class numbers"""
  bad = [o for o in s.readable if len(o.mask_shape) == 3 and not _is_grey(o)]
  if not bad:
    return None
  colours = {tuple(colour) for o in bad for colour in o.colours.tolist()}
  known = colours & {tuple(colour) for colour in s.labels.palette.tolist()}
  indices = ()
  if all(o.indices for o in bad):
    indices = sorted({index for o in bad for index in o.indices})
  remedy = (
    'Turn colours into class numbers: python -m resnest_jax.data.prepare '
    'own FOLDER --format mask_colours --classes FILE --data_dir NEW_FOLDER.'
  )
  if s.conversion:
    remedy = s.conversion.of_colours(colours, indices)
  # Thousands of others than the palette's come from JPEG or interpolation.
  if len(colours) > IGNORE:
    remedy = (
      'There are far more colours than classes: the masks were saved as '
      'JPEG, were resized with interpolation, or number objects. Use the '
      f'originals. {remedy}'
    )
  return Finding(
    f'{share_of(bad, s.readable, "mask", "have")} colours (RGB, or PNG with a '
    f'palette) instead of class numbers; {len(known)} of the '
    f'{plural(len(colours), "colour")} are those of a class.',
    names(bad),
    remedy,
  )


def grey_masks_in_colour(s: Survey) -> Finding | None:
  """class numbers repeated in several channels"""
  bad = [o for o in s.readable if len(o.mask_shape) == 3 and _is_grey(o)]
  if not bad:
    return None
  # OpenCV makes four channels of two.
  numbers = {2 if 'grey' in o.kind else o.mask_shape[2] for o in bad}
  return Finding(
    f'{share_of(bad, s.readable, "mask", "have")} {listed(sorted(numbers))} '
    'channels with equal numbers; masks have one channel.',
    names(bad),
    s.conversion.command('mask_values')
    if s.conversion
    else f'{REWRITE}cv2.imwrite(new, mask[..., 0]).',
  )


def refused(s: Survey) -> Finding | None:
  """samples that training refuses for another reason"""
  if not (bad := [o for o in s.readable if o.refused]):
    return None
  what, _, remedy = bad[0].refused.partition('\n')
  return Finding(
    f'Training refuses {share_of(bad, s.readable, "sample")}: {what}',
    names(bad),
    remedy or 'Repair these samples, or remove them.',
  )


def _is_grey(o: Observation) -> bool:
  # Also true of two channels, for which `observe._colours` finds nothing.
  return bool((o.colours == o.colours[:, :1]).all())
