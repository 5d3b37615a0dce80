"""How a step's gradients are computed: whole or in parts, and of what."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from resnest_jax.errors import UserError
from resnest_jax.training import accumulation
from resnest_jax.training.freezing import frozen_parameters


class Plan(NamedTuple):
  """Which parts of the batch are computed together, and what stays.

  Attributes:
    micro_batches: into how many equal parts the batch is cut; 1: none.
    freeze: see `frozen_parameters`.
    frozen_norms: likewise `norms`.
    ema_decay: of the moving averages, where the state has them.
  """

  micro_batches: int = 1
  freeze: int = 0
  frozen_norms: str = 'none'
  ema_decay: float = 0.0

  def gradients(self) -> Callable:
    """The function that does it; all of them take and return the same."""
    if self.micro_batches == 1:
      return accumulation.whole_gradients
    return accumulation.mean_gradients

  def frozen(self, params: Any) -> Any:
    """A tree of bools, or None where nothing is frozen."""
    if not self.freeze and self.frozen_norms == 'none':
      return None
    return frozen_parameters(params, self.freeze, self.frozen_norms)


# The batch at once, and all of the network.
WHOLE = Plan()


def create_plan(config: Mapping[str, Any], devices: int) -> Plan:
  """What `config.train` and `config.model` ask for.

  Args:
    config: the whole configuration.
    devices: that share a batch.

  Raises:
    UserError: the devices cannot share a micro-batch, one has too few images,
      or there are no weights of which something could stay.
  """
  train, frozen_bn = config['train'], config['model']['frozen_bn']
  micro = train['micro_batch_size'] or train['batch_size']
  if micro % devices:
    raise UserError(
      f'config.train.micro_batch_size is {micro} and cannot be divided over '
      f'{devices} devices; set it to a multiple of {devices}.'
    )
  if micro < train['batch_size'] and config['mesh']['spatial'] > 1:
    raise UserError(
      'config.train.micro_batch_size and config.mesh.spatial do not go '
      'together yet: set --config.mesh.spatial=1, or '
      '--config.train.micro_batch_size=0; rows over devices save memory as '
      'micro-batches do.'
    )
  if micro == 1 and frozen_bn != 'all':
    raise UserError(
      'config.train.micro_batch_size is 1, and batch normalisation has no '
      'statistics of one image: set it to 2 or more, or to 0 with '
      '--config.train.remat=stages, which fits the whole batch into less '
      'memory, or set --config.model.frozen_bn=all.'
    )
  if train['freeze_norms'] and frozen_bn == 'none':
    raise UserError(
      'config.train.freeze_norms keeps scales and biases where '
      "config.model.frozen_bn keeps the statistics, and that is 'none': set "
      '--config.model.frozen_bn=backbone (or all).'
    )
  if (train['freeze'] or frozen_bn != 'none') and not config['pretrained']:
    raise UserError(
      'config.train.freeze and config.model.frozen_bn keep weights or '
      'statistics as they are, but there are none to start from: set '
      '--config.pretrained=resnest101_d2 or another source of weights.'
    )
  return Plan(
    micro_batches=train['batch_size'] // micro,
    freeze=train['freeze'],
    frozen_norms=frozen_bn if train['freeze_norms'] else 'none',
    ema_decay=train['ema_decay'],
  )


def describe(plan: Plan, batch_size: int) -> str:
  """What a log says about micro-batches; '' where there are none."""
  if plan.micro_batches == 1:
    return ''
  micro = batch_size // plan.micro_batches
  text = f'each batch of {batch_size} in {plan.micro_batches} x {micro} images'
  return (
    f'{text}: batch norm has the statistics of {micro} images, and its running '
    f'statistics are updated {plan.micro_batches} times a step '
    '(--config.train.remat=stages and no micro-batches: those of all '
    f'{batch_size}; docs/memory.md)'
  )
