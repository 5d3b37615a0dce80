"""Training steps of networks whose speed on TPUs others have published.

They hold the compiler's clock against a real one (`tpu_clock.py`).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from resnest_jax.errors import UserError

SIZE, CLASSES = 224, 1000


class Block(nn.Module):
  """1x1, 3x3 with the stride and 1x1 convolution, and the shortcut."""

  planes: int
  stride: int
  project: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv, norm = _layers(self.dtype)
    stride = (self.stride, self.stride)
    y = nn.relu(norm()(conv(self.planes, (1, 1))(x)))
    y = nn.relu(norm()(conv(self.planes, (3, 3), stride)(y)))
    y = norm()(conv(4 * self.planes, (1, 1))(y))
    if self.project:
      x = norm()(conv(4 * self.planes, (1, 1), stride)(x))
    return nn.relu(x + y)


class ResNet50(nn.Module):
  """The network of Flax's ImageNet example, with Flax's layers."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv, norm = _layers(self.dtype)
    x = nn.relu(norm()(conv(64, (7, 7), (2, 2), [(3, 3)] * 2)(x)))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for stage, blocks in enumerate((3, 4, 6, 3)):
      for i in range(blocks):
        stride = 2 if stage and not i else 1
        name = f'layer{stage + 1}_{i}'
        block = Block(64 * 2**stage, stride, not i, self.dtype, name=name)
        x = block(x)
    return nn.Dense(CLASSES, dtype=self.dtype)(jnp.mean(x, (1, 2)))


def _layers(dtype: Any) -> tuple[Any, Any]:
  options = {'use_running_average': False, 'momentum': 0.9, 'dtype': dtype}
  conv = partial(nn.Conv, use_bias=False, dtype=dtype)
  return conv, partial(nn.BatchNorm, **options)


def _jax_resnet(dtype: Any) -> nn.Module:
  try:
    import jax_resnet
  except ImportError as error:
    raise UserError(
      '--row jax_resnest50 needs jax-resnet, which is not among the '
      'requirements: pip install --no-deps jax-resnet==0.0.4.'
    ) from error
  options = {
    'conv_cls': partial(nn.Conv, dtype=dtype),
    'norm_cls': partial(nn.BatchNorm, momentum=0.9, dtype=dtype),
  }
  return jax_resnet.ResNeSt50(n_classes=CLASSES, **options)


NETWORKS = {'flax_resnet50': ResNet50, 'jax_resnest50': _jax_resnet}


def lower_training(name: str, batch_size: int, dtype: str, device: Any) -> Any:
  """A step of SGD with momentum and weight decay on one device, lowered."""
  dtype = jnp.dtype(dtype)
  model = NETWORKS[name](dtype)
  optimizer = optax.sgd(0.1, momentum=0.9, nesterov=True)

  def loss_of(params, statistics, images, labels):
    logits, changed = model.apply(
      {'params': params, 'batch_stats': statistics},
      images,
      mutable=['batch_stats'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.float32), labels
    )
    kernels = (x for x in jax.tree.leaves(params) if x.ndim > 1)
    decay = 1e-4 / 2 * sum(jnp.sum(jnp.square(x)) for x in kernels)
    return jnp.mean(losses) + decay, changed['batch_stats']

  def train_step(params, statistics, momentum, images, labels):
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, statistics), gradients = gradient(params, statistics, images, labels)
    updates, momentum = optimizer.update(gradients, momentum, params)
    return optax.apply_updates(params, updates), statistics, momentum, loss

  images = jax.ShapeDtypeStruct((batch_size, SIZE, SIZE, 3), dtype)
  labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  params, statistics = variables['params'], variables['batch_stats']
  state = params, statistics, jax.eval_shape(optimizer.init, params)
  placed = jax.sharding.SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
    (*state, images, labels),
  )
  return jax.jit(train_step, donate_argnums=(0, 1, 2)).lower(*arguments)
