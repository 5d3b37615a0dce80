"""Calls that end with an error for users."""

import pytest

from resnest_jax.errors import UnreadableSample, UserError


def refused(message, call, *arguments, kind=UserError, **options):
  """The message of the error that the call raises, which has to match."""
  with pytest.raises(kind, match=message) as error:
    call(*arguments, **options)
  return str(error.value)


def unreadable(message, call, *arguments):
  """As `refused`, with the error of a file that cannot be read."""
  return refused(message, call, *arguments, kind=UnreadableSample)
