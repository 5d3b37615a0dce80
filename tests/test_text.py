"""Numbers and lists in words."""

import math

import pytest

from resnest_jax import text
from resnest_jax.errors import UserError


def test_numbers_and_lists():
  assert text.plural(1, 'mask', 'have') == '1 mask has'
  assert text.plural(2, 'class') == '2 classes'
  assert text.share(1, 3, 'mask', 'are') == '1 of 3 masks is'
  assert text.share_of('ab', 'abcd', 'mask', 'do') == '2 of 4 masks do'
  assert text.listed([3, 1, 2], 3) == '3, 1, 2'
  assert text.listed('abcd', 2) == 'a, b and 2 more'
  assert text.percent(0.12345) == '12.35'
  assert text.percent(0.12345, 1) == '12.3'
  assert text.percent(None) == '-'
  assert text.percent(math.nan, undefined='none') == 'none'
  durations = [text.duration(seconds) for seconds in (3723.4, 59.7, 7)]
  assert durations == ['1:02:03', '1:00', '0:07']


SHOWN = {
  'https://me:secret@host/x.pth': 'https://host/x.pth',
  'https://hf_secret@host:81/x.pth': 'https://host:81/x.pth',
  'http://me:sec@ret@host/x': 'http://host/x',
  'HTTPS://host/a/x.pth?sv=1&sig=secret%3D': 'HTTPS://host/a/x.pth?...',
  'https://host/x#access_token=secret': 'https://host/x?...',
  'a ("s3://key:secret@bucket/x?secret") b': 'a ("s3://bucket/x?...") b',
  'ftp://u:secret@h, http://h/y?secret: no': 'ftp://h, http://h/y?... no',
  # Nothing to hide.
  'hf://owner/name@v1/x.pth': 'hf://owner/name@v1/x.pth',
  'see https://host/a.html#part.': 'see https://host/a.html#part.',
  'runs/a?b#c=d and me@host': 'runs/a?b#c=d and me@host',
}


@pytest.mark.parametrize(('given', 'shown'), SHOWN.items())
def test_secrets_in_addresses_are_cut_out(given, shown):
  assert text.without_secrets(given) == shown
  assert str(UserError(f'{given} is gone')) == f'{shown} is gone'


def test_names_in_messages_neither_fill_nor_steer_the_terminal():
  told = str(UserError('no \x1b[31mred\x9b\r\x00, é 道路\n\tb'))
  assert told == r'no \x1b[31mred\x9b\x0d\x00, é 道路' + '\n\tb'
  told = str(UserError(f'there is no {"9" * 5000}; {"a b " * 500}is'))
  assert 0 < told.index(' ... ') < 200
  assert told.count('9') < 300
  assert told.endswith(f'; {"a b " * 500}is')
