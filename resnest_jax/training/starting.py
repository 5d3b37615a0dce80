"""How a training begins that begins with weights."""

import jax
import numpy as np
from jax.sharding import Mesh

from resnest_jax.models import forms
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import Segmentor, scanned
from resnest_jax.models.stacking import stack, unstack
from resnest_jax.training.averages import start_average
from resnest_jax.training.sharding import replicate
from resnest_jax.training.step import TrainState
from resnest_jax.weights.fetch import fetch
from resnest_jax.weights.start import start_from


def check_pretrained(model: Segmentor, source: str) -> None:
  """Raises now what `start_from` would raise once all else is made.

  Args:
    model: the segmentor.
    source: `config.pretrained`.
  """
  fetch(source)  # Whether it is there takes no model to see.
  by_name = scanned(model, False)
  blank = jax.tree.map(
    lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
    variable_shapes(by_name),
  )
  start_from(by_name, blank, source)


def describe_forms(model: Segmentor) -> str:
  """A line on forms that the environment chooses; '' where it does not."""
  choice = forms.of_process()
  if not choice:
    return ''
  line = f'{forms.VARIABLE}: ' + ' '.join('='.join(x) for x in choice.items())
  if choice.get('blocks') == 'scanned' and not model.backbone.stacked():
    line += ' (blocks: no stage here is run as a loop)'
  return line


def start_from_weights(
  model: Segmentor, state: TrainState, source: str, mesh: Mesh
) -> tuple[TrainState, list[str]]:
  """A fresh state with weights.

  Args:
    model: the segmentor.
    state: of `create_state`.
    source: `config.pretrained`.
    mesh: of the training.

  Returns:
    The state, and sentences that say what was done.

  Raises:
    UserError: see `start_from`.
  """
  counts = model.backbone.stacked()
  fresh = unstack(jax.device_get(state.variables()), counts)
  variables, notes = start_from(scanned(model, False), fresh, source)
  variables = replicate(stack(variables, counts), mesh)
  averages = None if state.ema is None else start_average(variables)
  return state.replace(**variables, ema=averages), notes
