"""What is wrong on a command line is said before anything is measured."""

import argparse
import importlib
import sys

import pytest

from benchmarks import flags
from resnest_jax.errors import UserError


def test_memory_has_a_unit():
  assert flags.gigabytes('16GB') == 16
  assert flags.gigabytes('80 GiB') == pytest.approx(80 * 2**30 / 1e9)
  assert flags.gigabytes('900MB') == pytest.approx(0.9)
  for text in ('16', 'GB', '-1GB', '16TBX', '0GB'):
    with pytest.raises(argparse.ArgumentTypeError, match='as 16GB or 80GiB'):
      flags.gigabytes(text)


@pytest.mark.parametrize(
  ('command', 'words'),
  [
    ('conv_forms --rounds 0', '--rounds: 0, and has to be 1 or more'),
    ('loss_memory --timed -1', '--timed: -1, and has to be 0 or more'),
    ('loss_memory --out README.md/new', 'README.md/new is or lies below'),
    ('compile_ahead --topologies cpu --effort 3', 'has to be from -1 to 0'),
    ('train_step --config no.json', '--config no.json cannot be'),
    ('scale_model --results docs', '--results docs has no compile'),
  ],
)
def test_scripts_say_it(command, words, monkeypatch, capsys):
  script, *_ = arguments = command.split()
  monkeypatch.setattr(sys, 'argv', arguments)
  with pytest.raises((SystemExit, UserError)) as error:
    importlib.import_module(f'benchmarks.{script}').main()
  assert words in capsys.readouterr().err + str(error.value)
