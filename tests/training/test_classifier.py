"""The step of a classifier: groups, mixup, DropBlock, on any devices."""

import functools

import jax
import numpy as np
import pytest
from collectives import assert_local, mesh_of
from flax.traverse_util import flatten_dict
from golden.reference import QUICK
from lengths import others_long
from training.one_step import assert_close

from resnest_jax.checkpoints.state import create_state
from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.models import implementations
from resnest_jax.models.classifier import create_network
from resnest_jax.models.initial import initial_variables, variable_shapes
from resnest_jax.models.stacking import stacked, unstack
from resnest_jax.sharding import shard_batch
from resnest_jax.training.gradients import create_plan, micro_batch_note
from resnest_jax.training.optimizer import param_groups
from resnest_jax.training.step import create_training
from resnest_jax.weights.start import start_variables

pytestmark = pytest.mark.usefixtures('float64')

ROW = 'configs/imagenet_resnest50.py'
SMALL = {
  **{'model.backbone': 'resnest14', 'model.width': 8, 'model.stem_width': 8},
  **{'model.num_classes': 5, 'model.dropout': 0.2},
  **{'model.dropblock': 0.4, 'train.batch_size': 8, 'train.norm_group': 2},
  **{'train.total_steps': 4, 'optimizer.warmup_steps': 0, 'loss.mixup': 0.3},
  'train.micro_batch_size': 0,
}


# The third stage alone, which has DropBlock.
ONE, DEEP = (0, 0, 1, 0), (0, 0, 6, 0)


def config(sizes=ONE, **changes):
  made = load_config(ROW, SMALL | changes).to_dict()
  made['model']['stage_sizes'] = sizes
  return made


def batch():
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8),
    'label': rng.integers(0, 5, 8).astype(np.int32),
    'size': np.full((8, 2), 32, np.int32),
    'shift': rng.normal(0, 0.1, (8, 3)).astype(np.float32),
  }


@functools.cache
def step(
  devices=1, form='unrolled', sizes=ONE, number=3, dtype='float64', **train
):
  """State and scalars after a step, the fourth, and its program."""
  changes = {f'train.{key}': value for key, value in train.items()}
  changes['model.dtype'] = dtype
  made, mesh = config(sizes, **changes), mesh_of(devices)
  with implementations.use(blocks=form):
    training = create_training(made, mesh)
  variables, _ = start_variables(training.model, made)
  state = create_state(training.model, training.optimizer, variables, mesh)
  state, given = state.replace(step=state.step + number), batch()
  given = shard_batch(given, mesh)
  program = training.step.lower(state, given).compile(QUICK)
  state, scalars = program(state, given)
  state = unstack(jax.device_get(state), stacked(state.params))
  return state, jax.device_get(scalars), program


CASES = [(2, 2), (4, 2), (4, 0), (4, 4), (2, 8)]


@pytest.mark.parametrize(('devices', 'group'), others_long(CASES, (4, 2)))
def test_more_devices_do_what_one_does(devices, group):
  """Masks, mixup and dropout too; groups may lie on several devices."""
  *one, _ = step(norm_group=group)
  *more, program = step(devices, norm_group=group)
  assert_close(more, one)
  if group == 2:  # Nobody needs another's images.
    assert_local(program)


def test_micro_batches_of_whole_groups_change_no_gradient():
  whole, scalars, _ = step(norm_group=2)
  parts, others, _ = step(norm_group=2, micro_batch_size=4)
  # The momentum has the gradient. Statistics are updated twice.
  ours, theirs = ((x.params, x.opt_state) for x in (parts, whole))
  assert_close((ours, others), (theirs, scalars))
  plan = create_plan(config(**{'train.micro_batch_size': 4}), 1)
  note = micro_batch_note(plan, 8)
  assert 'in 2 x 4 images: batch norm has the statistics of 2 images' in note
  assert plan.group == 2
  # A batch that is smaller than the group is one by itself.
  assert create_plan(config(**{'train.norm_group': 16}), 1).group == 0


FORMS = [('scanned', 'none'), ('scanned', 'blocks'), ('unrolled', 'stages')]


@pytest.mark.parametrize(('form', 'remat'), others_long(FORMS, FORMS[0]))
def test_blocks_draw_the_same_in_other_forms(form, remat):
  """In a loop, and computed again in the backward pass."""
  *ours, _ = step(form=form, sizes=DEEP, norm_group=2, remat=remat)
  *expected, _ = step(sizes=DEEP, norm_group=2)
  assert_close(ours, expected)


def test_bfloat16_rounds_and_no_more():
  """Blocks are computed again. Parameters and the loss stay float32."""
  with jax.enable_x64(False):
    rounded, exact = (
      step(dtype=dtype, norm_group=4, remat='blocks')[:2]
      for dtype in ('bfloat16', 'float32')
    )
  types = {x.dtype for x in jax.tree.leaves(rounded)}
  assert types == {np.dtype('float32'), np.dtype('int32')}
  # A dozen layers, each of which rounds to 2 ** -9 of itself.
  assert rounded[1]['loss'] == pytest.approx(exact[1]['loss'], rel=0.01)
  assert rounded[1]['loss'] != exact[1]['loss']


def test_initial_weights_are_those_of_gluon():
  """Normal of He's fan-in, the last layer too; last scales and biases 0."""
  variables = initial_variables(
    create_network(config((1, 1, 1, 1))['model']), 0
  )
  zeros = 0
  for path, value in flatten_dict(variables['params']).items():
    if path[-1] == 'kernel':
      inputs = value.size / value.shape[-1]
      margin = 5 / np.sqrt(2 * value.size)
      assert value.std() == pytest.approx((2 / inputs) ** 0.5, rel=margin), path
    else:
      expected = path[-1] == 'scale' and path[-2] != 'bn3'
      np.testing.assert_array_equal(value, expected, err_msg=str(path))
      zeros += path[-2:] == ('bn3', 'scale')
  assert zeros == 4


def test_kernels_alone_decay():
  """GluonCV's count of ResNeSt-50: 88 tensors decay, and 175 do not."""
  row = load_config(ROW)
  params = variable_shapes(create_network(row.model))['params']
  groups = flatten_dict(param_groups(params, row.optimizer))
  decays = [path for path, group in groups.items() if group.weight_decay]
  assert (len(decays), len(groups) - len(decays)) == (88, 175)
  assert ('fc', 'kernel') in decays


ADE20K = 'configs/ade20k_pspnet.py'


@pytest.mark.parametrize(
  ('row', 'key', 'value', 'error'),
  [
    (ADE20K, 'model.head', 'classifier', 'imagenet with model.head=classifier'),
    (ADE20K, 'data.augmentation', 'imagenet', 'mmseg or encoding with model'),
    (ADE20K, 'loss.mixup', 0.2, '0 with .*=pspnet: it is for classifiers'),
    (ADE20K, 'model.dropblock', 0.1, '0 with .*: it is for classifiers'),
    (ADE20K, 'train.norm_group', 4, '0 with .*: it is for classifiers'),
    (ROW, 'data.augmentation', 'mmseg', 'be imagenet with model.head=classif'),
    (ROW, 'mesh.spatial', 2, '1 with model.head=classifier'),
    (ROW, 'loss.class_weights', (1.0, 2.0), 'None with model.head=classifier'),
    (ROW, 'loss.terms.lovasz', 0.5, '0 with model.head=classifier, whose loss'),
    (ROW, 'loss.terms.cross_entropy', 0.0, 'be 1 with model.head=classifier'),
    (ROW, 'train.norm_group', 1, 'at least 2 and divide train.batch_size, 8'),
    (ROW, 'train.norm_group', 3, '0, or .* divide train.batch_size, 8'),
    (ROW, 'train.micro_batch_size', 4, 'divide train.micro_batch_size, 4'),
    (ROW, 'train.micro_batch_size', 2, 'divide train.micro_batch_size, 2'),
  ],
)
def test_keys_of_the_other_task_are_refused(row, key, value, error):
  changes = {'train.batch_size': 8, 'train.micro_batch_size': 0}
  if key == 'train.micro_batch_size':
    changes |= {'train.batch_size': 12, 'train.norm_group': 3}
  if row == ROW and key != 'train.norm_group':
    changes |= {'train.norm_group': 0} | changes
  with pytest.raises(UserError, match=f'{key}|{error}') as caught:
    load_config(row, changes | {key: value})
  assert caught.match(error)


def test_an_unknown_head_names_the_classifier_too():
  with pytest.raises(UserError, match=r"head is 'clasifier'.*, classifier"):
    create_network(config()['model'] | {'head': 'clasifier'})
  with pytest.raises(UserError, match='num_classes is 0'):
    create_network(config()['model'] | {'num_classes': 0})
