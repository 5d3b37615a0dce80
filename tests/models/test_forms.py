"""Every form of a layer against the default one, and how one is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import quick_jit, relative_error

from resnest_jax.errors import UserError
from resnest_jax.models import implementations, normalization, pooling
from resnest_jax.models.convolution import convolve, depthwise
from resnest_jax.models.winograd import convolve_3x3


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def grouped(x, kernel, **more):
  return jnp.concatenate(convolve(x, kernel, **more), -1)


X = random(2, 8, 12, 8)
WIDE = random(1, 33, 32, 1024), random(3, 3, 1024, 1024)
# Kind -> function and arguments. Of the pyramid there is a test of its own.
LAYERS = {
  'grouped': [
    (lambda x, k: grouped(x, k, groups=2, parts=2), X, random(3, 3, 4, 6)),
    (
      lambda x, k: grouped(x, k, groups=4, parts=2, dilation=2),
      *(X, random(3, 3, 2, 8)),
    ),
    (
      lambda x, k: grouped(x, k, groups=2, stride=2),
      *(X, random(3, 3, 4, 6)),
    ),
    (lambda x, k: grouped(x, k, groups=4), X, random(1, 1, 2, 8)),
  ],
  'dilated': [
    (lambda x, k: convolve(x, k, dilation=2)[0], X, random(3, 3, 8, 6)),
    (lambda x, k: convolve(x, k, dilation=4)[0], X, random(3, 3, 8, 6)),
    # Does not divide the height: as it was.
    (lambda x, k: convolve(x, k, dilation=3)[0], X, random(3, 3, 8, 6)),
  ],
  'kernel_gradient': [
    (lambda x, k: convolve(x, k)[0], X, random(3, 3, 8, 64)),
    (lambda x, k: convolve(x, k, dilation=4)[0], X, random(3, 3, 8, 64)),
    (lambda x, k: convolve(x, k, dilation=8)[0], X, random(3, 3, 8, 64)),
    (lambda x, k: convolve(x, k)[0], X, random(1, 1, 8, 64)),
    (lambda x, k: convolve(x, k)[0], random(2, 3, 3, 96), random(1, 1, 96, 64)),
    (
      lambda x, k: convolve(x, k, dilation=2)[0],
      *(random(2, 5, 4, 96), random(3, 3, 96, 64)),
    ),
    # As it was: a stride.
    (lambda x, k: convolve(x, k, stride=2)[0], X, random(3, 3, 8, 64)),
  ],
  'wide': [
    # As many channels and pixels as it takes.
    (lambda x, k: convolve(x, k)[0], *WIDE),
    # As it was: channels, dilation, stride.
    (lambda x, k: convolve(x, k)[0], X, random(3, 3, 8, 6)),
    (lambda x, k: convolve(x, k, dilation=2)[0], X, random(3, 3, 8, 6)),
    (lambda x, k: convolve(x, k, stride=2)[0], X, random(3, 3, 8, 6)),
  ],
  'depthwise': [
    (depthwise, X, random(3, 3, 1, 8)),
    (lambda x, k: depthwise(x, k, 12), X, random(3, 3, 1, 8)),
  ],
  'pointwise': [(lambda x, k: convolve(x, k)[0], X, random(1, 1, 8, 6))],
  'pooling': [
    # Of values of which no two are equal, as the gradients at ties differ.
    (lambda x: pooling.max_pool(x, None), np.abs(X)),
    (lambda x: pooling.average_pool(x, 2, None), X),
    (lambda x: pooling.average_pool(x, 1, None), X),
    (lambda x: pooling.shortcut_pool(x, 2, None), random(2, 7, 9, 3)),
    (lambda x: pooling.same_pool(x, None), X),
  ],
  'norm': [
    (
      lambda x, s, b, relu=relu: normalization.normalize(x, s, b, 1e-5, relu)[
        0
      ],
      *(X, random(8, seed=1), random(8, seed=2)),
    )
    for relu in (False, True)
  ],
}
CASES = [
  (kind, form, number)
  for kind, layers in LAYERS.items()
  for form in implementations.FORMS[kind][1:]
  for number in range(len(layers))
]


def value_and_gradients(layer, *arguments):
  def loss(*arguments):
    y = layer(*arguments)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

  places = tuple(range(len(arguments)))
  return quick_jit(jax.grad(loss, places, has_aux=True))(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(('kind', 'form', 'number'), CASES)
def test_form_and_its_gradients_are_the_defaults(kind, form, number):
  with jax.enable_x64(True):
    default = implementations.FORMS[kind][0]
    layer = LAYERS[kind][number]
    with implementations.use(**{kind: default}):
      expected = value_and_gradients(*layer)
    with implementations.use(**{kind: form}):
      ours = value_and_gradients(*layer)
  for a, b in zip(
    jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True
  ):
    assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize('length', [1, 2, 7])
def test_winograds_convolution_of_any_size(length):
  with jax.enable_x64(True):
    layers = (
      convolve_3x3,
      lambda x, k: convolve(x, k)[0],
    )
    ours, expected = (
      value_and_gradients(
        layer, random(2, length, 6, 5), random(3, 3, 5, 4, seed=1)
      )
      for layer in layers
    )
  for a, b in zip(
    jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True
  ):
    assert relative_error(a, b) < 1e-12


def test_few_pixels_and_few_digits_are_not_for_winograd():
  with implementations.use(wide='winograd'):
    for x in (WIDE[0][:, :8], WIDE[0].astype(jnp.bfloat16)):
      text = str(
        jax.make_jaxpr(lambda x, k: convolve(x, k)[0])(
          x, WIDE[1].astype(x.dtype)
        )
      )
      assert 'conv_general_dilated' in text


WRITTEN = {
  ('grouped', 'split'): (lambda t: t.count('conv_general_dilated[') == 2),
  ('grouped', 'grouped'): (lambda t: 'feature_group_count=2' in t),
  ('grouped', 'block_diagonal'): (
    lambda t: t.count('conv_general_dilated[') == 1 and '_count=2' not in t
  ),
  ('dilated', 'spaced_taps'): (lambda t: 'rhs_dilation=(2, 2)' in t),
  ('dilated', 'space_to_batch'): (lambda t: 'rhs_dilation=(1, 1)' in t),
  ('kernel_gradient', 'convolution'): (lambda t: 'custom_vjp' not in t),
  ('kernel_gradient', 'products'): (lambda t: 'custom_vjp' in t),
  ('wide', 'convolution'): (lambda t: t.count('dot_general') == 0),
  ('wide', 'winograd'): (
    lambda t: t.count('dot_general') == 16 and 'conv_general' not in t
  ),
  ('depthwise', 'shifts'): (lambda t: 'conv_general' not in t),
  ('depthwise', 'convolution'): (lambda t: 'feature_group_count=8' in t),
  ('pointwise', 'dot'): (lambda t: 'dot_general' in t),
  ('pointwise', 'convolution'): (lambda t: 'conv_general' in t),
  ('pooling', 'slices'): (lambda t: 'reduce_window' not in t),
  ('pooling', 'reduce_window'): (lambda t: 'reduce_window_max' in t),
  ('norm', 'custom_vjp'): (lambda t: 'custom_vjp' in t),
  ('norm', 'autodiff'): (lambda t: 'custom_vjp' not in t),
}


@pytest.mark.parametrize(('kind', 'form'), WRITTEN)
def test_form_is_written_as_its_name_says(kind, form):
  with implementations.use(**{kind: form}):
    text = str(jax.make_jaxpr(LAYERS[kind][0][0])(*LAYERS[kind][0][1:]))
  assert WRITTEN[kind, form](text)


def test_every_platform_has_a_form_of_every_kind():
  assert set(implementations.BEST) == {'cpu', 'gpu', 'tpu'}
  for table in implementations.BEST.values():
    assert table.keys() == implementations.FORMS.keys()
    assert all(
      form in implementations.FORMS[kind] for kind, form in table.items()
    )
  assert LAYERS.keys() | {'pyramid'} == set(implementations.LAYERS)


def test_choices_nest_and_end():
  default = implementations.current()
  with implementations.use(norm='autodiff'):
    with implementations.use(grouped='grouped'):
      assert implementations.chosen('grouped') == 'grouped'
      assert implementations.chosen('norm') == 'autodiff'
    assert implementations.chosen('grouped') == dict(default)['grouped']
  assert implementations.current() == default


def test_another_platform_has_its_own_table(monkeypatch):
  table = implementations.BEST['tpu'] | {'grouped': 'block_diagonal'}
  monkeypatch.setitem(implementations.BEST, 'tpu', table)
  assert implementations.chosen('grouped') == 'split'
  with implementations.use('tpu'):
    assert implementations.chosen('grouped') == 'block_diagonal'
    with implementations.use(norm='autodiff'):
      assert implementations.chosen('grouped') == 'block_diagonal'


def test_compiled_function_is_traced_again_under_another_choice():
  traced = []

  @jax.jit
  def layer(x):
    traced.append(implementations.chosen('grouped'))
    return x

  layer(1.0)
  with implementations.use(grouped='grouped'):
    layer(1.0)
    layer(1.0)
  layer(1.0)
  assert traced == ['split', 'grouped']


def test_environment_decides_for_the_process(monkeypatch):
  monkeypatch.setenv(
    implementations.VARIABLE, 'grouped=grouped, pooling=reduce_window'
  )
  assert implementations.chosen('grouped') == 'grouped'
  assert implementations.chosen('pooling') == 'reduce_window'
  with implementations.use(grouped='split'):
    assert implementations.chosen('grouped') == 'split'
  for text, message in (
    ('grouped=dense', r"grouped is 'dense'; accepted are split, grouped"),
    ('group=split', r"'group' is no kind of layer; there are grouped"),
    ('grouped', r"'grouped' is no KIND=FORM; write 'KIND=FORM"),
    ('norm=autodiff norm=autodiff', r"'norm=autodiff' is one more of its kind"),
  ):
    monkeypatch.setenv(implementations.VARIABLE, text)
    with pytest.raises(UserError, match=message):
      implementations.current()


def test_unknown_names():
  with pytest.raises(UserError, match=r"norm is 'fast'; .* custom_vjp"):
    implementations.use(norm='fast')
  with pytest.raises(UserError, match=r"platform is 'cuda'; .* cpu, gpu, tpu"):
    implementations.use('cuda')
