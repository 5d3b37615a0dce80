"""Listening to libjpeg: what is kept, what is passed on, what is restored."""

import os
import sys

import pytest

from resnest_jax.data.doctor.decoder_warnings import jpeg_warnings

COMPLAINT = b'Corrupt JPEG data: 213 extraneous bytes before marker 0xd9\n'


def test_complaints_are_kept_and_the_rest_is_passed_on(capfd):
  with jpeg_warnings() as found:
    os.write(2, b'another message\n' + COMPLAINT + b'no end of line')
    assert capfd.readouterr().err == ''
  assert found == [COMPLAINT.decode().rstrip()]
  assert capfd.readouterr().err == 'another message\nno end of line'


def test_error_output_is_restored_after_an_error(capfd):
  with pytest.raises(KeyError), jpeg_warnings():
    raise KeyError
  os.write(2, COMPLAINT)
  assert capfd.readouterr().err == COMPLAINT.decode()
  before = len(os.listdir('/proc/self/fd')) if sys.platform == 'linux' else 0
  for _ in range(3):
    with jpeg_warnings() as found:
      pass
    assert found == []
  if before:
    assert len(os.listdir('/proc/self/fd')) == before
