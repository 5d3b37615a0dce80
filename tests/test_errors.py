"""How scripts end: one line and a status."""

import jax.numpy as jnp
import pytest

from resnest_jax.errors import UserError, run


def out_of_memory():
  jnp.zeros((2**20, 2**24))  # 70 TB


def refuse():
  raise UserError('there is no x; give y.')


def stop():
  raise KeyboardInterrupt


@pytest.mark.parametrize(
  ('main', 'status', 'line'),
  [
    (out_of_memory, 1, 'error: the device has too little memory (RESOURCE_'),
    (refuse, 1, 'error: there is no x; give y.'),
    (stop, 130, 'stopped; the same command'),
  ],
)
def test_script_ends_with_one_line_and_its_status(main, status, line, capsys):
  with pytest.raises(SystemExit) as ended:
    run(main)
  assert ended.value.code == status
  (said,) = capsys.readouterr().err.splitlines()
  assert said.startswith(line)


def test_other_errors_come_through():
  with pytest.raises(ZeroDivisionError):
    run(lambda: 1 / 0)
