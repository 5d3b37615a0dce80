"""Calls that end with an error for users."""

import pytest

from resnest_jax.errors import UnreadableSample, UserError


def refused(message, call, *arguments, **options):
  """The call raises a `UserError` whose message matches."""
  with pytest.raises(UserError, match=message):
    call(*arguments, **options)


def unreadable(message, call, *arguments):
  """As `refused`, with the error of a file that cannot be read."""
  with pytest.raises(UnreadableSample, match=message):
    call(*arguments)
