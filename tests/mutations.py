"""Damages files and values at random, for `fuzz.py`."""

import io
import json
import re
import zipfile
import zlib

from data.pictures import chunk

NUMBERS = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
NAMES = ['', *' .~*#é道\0', '..', '-x', '[a-z]', 'a[', '[red]', 'a\\b', '%s']
NAMES += ['e\u0301', '\u202ex', '\x1b[31m', 'a\nb', '\udcff', '\U0001f600']
NAMES += ['{split}', 'x' * 255, '../x', '/dev/null/x', '9' * 5000]
ODD = [None, True, False, 0, 1, -1, 3, 2**31, 10**30, 0.5, 1e300, -0.0, 'inf']
ODD += ['nan', (), [], {}, (1,), (8, 8), (0, 0), (10**9, 10**9), [[1, 2], 3]]
ODD += [{'a': 1}, '(' * 300, '1,2', '8,8,8', *NAMES]
DEEP = json.loads('[' * 900 + ']' * 900)


def damage(rng, data):
  """Changes a file as its format suggests, or any of its bytes."""
  edits = {rb'\{': _edit_json, rb'\x89PNG': _edit_png, rb'PK\x03': _edit_zip}
  lines = rb'[^\0\x80-\xff]*\n[^\0\x80-\xff]*\Z'
  edits |= {rb'.{8}\{"': _edit_safetensors, lines: _edit_lines}
  fit = [edits[x] for x in edits if re.match(x, data, re.DOTALL)]
  return rng.choice([*fit[:1] * 3, _edit_bytes])(rng, data)


def _edit_bytes(rng, data):
  changed = bytearray(data)
  for _ in range(rng.choice([1, 1, 2, 4, 16])):
    length = max(len(changed), 1)
    # Headers come first.
    place = rng.randrange(min(length, rng.choice([32, 256, length])))
    size = rng.choice([1, 2, 4, 8, rng.randrange(1, 200)])
    number = rng.choice(NUMBERS).to_bytes(4, rng.choice(['little', 'big']))
    number = rng.choice([number, number[:2], number[2:], number + bytes(4)])
    edits = [(1, rng.randbytes(1)), (size, b''), (0, rng.randbytes(size))]
    edits = [*edits, (0, changed[place : place + size])] * 2 + [(length, b'')]
    edits += [(len(number), number)] * 8
    replaced, new = rng.choice(edits)
    changed[place : place + replaced] = new
  return bytes(changed)


def edit_text(rng, text):
  place = rng.randrange(len(text) + 1)
  new = rng.choice(['', chr(rng.randrange(1, 0xD800)), str(rng.choice(ODD))])
  return text[:place] + new + text[place + rng.randrange(2) :]


def _edit_lines(rng, data):
  lines = data.decode().splitlines()
  for _ in range(rng.choice([1, 1, 2, 5])):
    place = rng.randrange(len(lines) or 1)
    words = re.split(r'([\s,:;]+)', ''.join(lines[place : place + 1]))
    words[rng.randrange(len(words))] = str(rng.choice(ODD))
    lines[place : place + 1] = [''.join(words)] * rng.choice([1, 1, 0, 2])
  text = rng.choice(['\n', '\n', '\r\n', '\r', '\x0b']).join(lines)
  return text.encode(rng.choice(['utf-8', 'utf-8', 'utf-16']), 'replace')


def edit_value(rng, value):
  """Changes something in lists and mappings, however deep."""
  if not isinstance(value, dict | list | tuple) or not value:
    odd = [*ODD, float('nan'), DEEP, [value] * 3, {'a': value}]
    return rng.choice([rng.choice(odd), edit_text(rng, str(value))])
  copy = dict(value) if isinstance(value, dict) else list(value)
  place = rng.choice(list(copy if isinstance(copy, dict) else range(len(copy))))
  match rng.randrange(8):
    case 0:
      del copy[place]
    case 1 if isinstance(copy, dict):
      copy[edit_text(rng, str(place))] = copy.pop(place)
    case 2:
      return rng.choice(ODD)
    case _:
      copy[place] = edit_value(rng, copy[place])
  return copy


def _edit_json(rng, data):
  value = json.loads(data)
  for _ in range(rng.choice([1, 1, 2, 4])):
    value = edit_value(rng, value)
  return json.dumps(value).encode()


def _edit_safetensors(rng, data):
  end = 8 + int.from_bytes(data[:8], 'little')
  text, header = _edit_json(rng, data[8:end]), json.loads(data[8:end])
  if rng.random() < 0.6:
    for key, about in (more := header['__metadata__']).items():
      more[key] = damage(rng, about.encode()).decode(errors='replace')
    text = json.dumps(header).encode()
  return len(text).to_bytes(8, 'little') + text + data[end:]


def _edit_zip(rng, data):
  # The checksums are right: what is behind them is reached.
  file, old = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
  names = old.namelist()
  pickles = [name for name in names if name.endswith('data.pkl')] or names
  chosen, what = rng.choice(rng.choice([names, pickles])), rng.random()
  with zipfile.ZipFile(file, 'w') as new:
    new.comment = old.comment if what < 0.8 else damage(rng, old.comment)
    for name in names:
      content = old.read(name)
      if name == chosen and what < 0.6:
        content = damage(rng, content)
      elif name == chosen and what < 0.7:
        name = edit_text(rng, name).encode(errors='replace').decode()
      if name != chosen or what < 0.6 or what > 0.8:
        new.writestr(name, content)
  return file.getvalue()


def _edit_png(rng, data):
  # The checksums are right.
  chunks, place = [], 8
  while place < len(data):
    start, place = place + 8, place + 12 + int.from_bytes(data[place:][:4])
    chunks.append((data[start - 4 : start], data[start : place - 4]))
  place = rng.choice([0, rng.randrange(len(chunks))])
  kind, content = chunks[place]
  if kind == b'IDAT':
    content = zlib.compress(_edit_bytes(rng, zlib.decompress(content)))
  elif kind == b'IHDR':
    at, size = rng.choice([(0, 4), (4, 4), *((x, 1) for x in range(8, 13))])
    number = rng.choice([*NUMBERS, 3, 4, 6, 16, 49, 5000]) % 256**size
    content = content[:at] + number.to_bytes(size) + content[at + size :]
  else:
    content = _edit_bytes(rng, content)
  other = rng.choice([b'PLTE', b'tRNS', b'acTL', b'eXIf', b'IDAT'])
  more = [(other, rng.randbytes(9))] if rng.random() < 0.25 else []
  chunks[place : place + 1] = [*more, (kind, content)]
  return data[:8] + b''.join(chunk(*x) for x in chunks)


def edit_tensors(rng, content):
  import torch

  tensors = dict(content['state_dict'])
  for name in rng.sample(list(tensors), rng.choice([1, 2, 5])):
    x = tensors.pop(name)[None]
    odd = [x, x[0].double(), x.half(), x[:0], x * float('nan'), x.to_sparse()]
    odd += [torch.zeros(1).expand(10**10), torch.empty(9**9, device='meta')]
    odd += [x.to(torch.float8_e4m3fn), x.to(torch.complex64), rng.choice(ODD)]
    name = rng.choice([name, name, edit_text(rng, name), rng.choice(NAMES), 3])
    tensors[name] = rng.choice(odd)
  outer = rng.choice(['state_dict', 'state_dict', 'model', 'net', 'ema'])
  return {'meta': edit_value(rng, content['meta']), outer: tensors}
