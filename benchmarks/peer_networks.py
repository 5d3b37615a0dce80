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


class ResNet50(nn.Module):
  """The network of Flax's ImageNet example, with its own layers."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = partial(
      nn.BatchNorm, use_running_average=False, momentum=0.9, dtype=self.dtype
    )
    x = conv(64, (7, 7), (2, 2), [(3, 3)] * 2, name='stem_conv')(x)
    x = nn.relu(norm(name='stem_bn')(x))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for stage, blocks in enumerate((3, 4, 6, 3)):
      planes = 64 * 2**stage
      for block in range(blocks):
        name = f'layer{stage + 1}_{block}'
        stride = (2, 2) if stage and not block else (1, 1)
        y = nn.relu(
          norm(name=f'{name}_bn1')(
            conv(planes, (1, 1), name=f'{name}_conv1')(x)
          )
        )
        y = conv(planes, (3, 3), stride, name=f'{name}_conv2')(y)
        y = nn.relu(norm(name=f'{name}_bn2')(y))
        y = norm(name=f'{name}_bn3')(
          conv(4 * planes, (1, 1), name=f'{name}_conv3')(y)
        )
        if not block:
          x = conv(4 * planes, (1, 1), stride, name=f'{name}_shortcut')(x)
          x = norm(name=f'{name}_bn4')(x)
        x = nn.relu(x + y)
    x = jnp.mean(x, (1, 2))
    return nn.Dense(CLASSES, dtype=self.dtype, name='head')(x)


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
