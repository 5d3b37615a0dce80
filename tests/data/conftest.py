"""What tests of data share."""

import sys

import pytest


@pytest.fixture
def call(monkeypatch):
  """`call(main, '--flag', value)`: a command, in this process."""

  def call(main, *words):
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, words)])
    main()

  return call
