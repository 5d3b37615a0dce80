"""`benchmarks/compile_ahead.py` on the CPU, and the figures that are kept."""

import json
import re
import sys

import jax
import pytest

from benchmarks import ahead, compile_ahead, conv_forms, hlo, scale_model
from benchmarks.topologies import CHIPS, count_devices, split_name
from resnest_jax import sharding
from resnest_jax.config import load_config
from resnest_jax.data import datasets, pipeline
from resnest_jax.errors import UserError
from resnest_jax.models import implementations, initial, segmentor

KEPT = [
  (ahead.read_case(entry), entry)
  for path in sorted(scale_model.RESULTS.glob('compile_ahead-*.json'))
  for entry in json.loads(path.read_text('utf-8'))
]

# As XLA writes it, but for empty lines, most of the attributes and what counts
# nothing.
PROGRAM = """
HloModule jit_step, is_scheduled=true
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.7 = f32[8]{0:T(256)} all-reduce(%x), to_apply=%sum.1
  %f = f32[8]{0} fusion(%all-reduce.7), kind=kLoop, calls=%inside.1
}
%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %constant.3), direction=LT
}
%unknown.1 (p: (s32[], f32[8])) -> pred[] {
  ROOT %ne = pred[] compare(%i, %j), direction=NE
}
%left.1 (p: f32[8]) -> f32[16] {
  ROOT %all-gather.2 = f32[16]{0} all-gather(%p), dimensions={0}
}
%right.1 (p: f32[8]) -> f32[16] {
  ROOT %call = f32[16]{0} custom-call(%p), custom_call_target="__cudnn$convForward"
}
ENTRY %main.9 (x: bf16[3,4], y: f32[8]) -> f32[16] {
  %s = (bf16[3,4]{1,0:T(8,128)(2,1)}, f32[2]{0}) all-reduce-start(%x, %z), to_apply=%sum.1
  %d = (bf16[3,4]{1,0:T(8,128)(2,1)}, /*index=1*/f32[2]{0}) all-reduce-done(%s)
  %ps = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%y)
  %pd = f32[8]{0} collective-permute-done(%ps)
  %w = (s32[], f32[8]{0}) while(%t0), condition=%unknown.1, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[], f32[8]{0}) while(%t1), condition=%condition.1, body=%body.1
  %u = (s32[], f32[8]{0}) while(%t2), condition=%unknown.1, body=%body.1
  ROOT %c = f32[16]{0} conditional(%k, %y, %y), branch_computations={%left.1, %right.1}
}
"""  # noqa: E501


def test_what_a_program_does_is_read_from_its_text():
  contents = hlo.read(PROGRAM)
  # Three loops of 3, 5 and an unknown number of rounds, which counts once.
  assert (contents.endless, contents.fusions, contents.gathered) == (1, 9, 64)
  assert contents.collectives == {
    'all-reduce': (1 + 9, 24 + 8 + 9 * 32),
    'collective-permute': (1, 32),
    'all-gather': (1, 64),
  }
  assert contents.dtypes == {'bf16': 24, 'f32': 8 + 9 * 32}
  assert contents.custom_calls == {'__cudnn$convForward': 1}


def test_bytes_of_shapes():
  sizes = hlo.shape_bytes('(f32[2,3]{1,0}, pred[], u8[5]{0}, s4[3]{0})')
  assert sizes == {'f32': 24, 'pred': 1, 'u8': 5, 's4': 3}


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  """Small figures, twice: what the second call says, and the entries."""
  out = tmp_path_factory.mktemp('ahead')
  path = out / 'compile_ahead-cpu.json'
  words = '--topologies cpu --mini --dtype float32 --rows ade20k_fcn'
  words += f' --stage_sizes 1 0 0 0 --programs train eval --out {out}'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['compile_ahead.py', *words.split()])
    compile_ahead.main()
    before = path.read_bytes()
    compile_ahead.main()  # Has nothing to do.
  assert [*out.iterdir()] == [path]
  assert path.read_bytes() == before
  return out, json.loads(before)


def test_devices_send_each_other_gradients_and_statistics(compiled):
  out, (training, _) = compiled
  assert training['devices'] == 4
  step = training['programs']['step']
  assert set(step['collectives']) == {'all-reduce'}
  assert step['largest_gathered_bytes'] == 0
  config = load_config('configs/ade20k_fcn.py:mini')
  config.model.stage_sizes = (1, 0, 0, 0)
  model = segmentor.create_segmentor(config.model)
  shapes = initial.variable_shapes(model)
  parameters = sum(x.size for x in jax.tree.leaves(shapes['params']))
  channels = sum(x.size for x in jax.tree.leaves(shapes['batch_stats'])) // 2
  # Batch norm's parameters have their gradients from two of the four sums.
  expected = 4 * (parameters - 2 * channels) + 16 * channels
  # Scalars come to them.
  assert 0 < step['collectives']['all-reduce']['bytes'] - expected <= 32
  (row,) = scale_model.compare(out)
  assert (row['predicted_bytes'], row['others']) == (expected, [])
  assert abs(row['predicted_rounds'] / row['emitted_rounds'] - 1) < 0.2
  # Parameters and momentum, and the batch.
  state = 4 * (2 * parameters + 2 * channels) + 16 * 128 * 128 * 4 / 4
  assert step['arguments_gb'] == pytest.approx(state / 1e9, rel=0.01)
  assert step['memory_gb'] > step['temporaries_gb'] > 0.001


def test_the_platform_that_is_compiled_for_chooses_implementations(compiled):
  _, (training, evaluation) = compiled
  assert training['forms']['kernel_gradient'] == 'products'
  with implementations.use(platform='gpu'):  # The devices decide, nothing else.
    forms = compile_ahead.measure(ahead.read_case(evaluation))['forms']
  assert forms == evaluation['forms'] == implementations.BEST['cpu']


# Kept cases and their figures, without those of mini rows.
def trainings(topology):
  wanted = ('', topology, 'train')
  return [x for x in KEPT if x[0][1:4] == wanted]


def sizes_of(row):
  train = load_config(f'configs/{row}.py').train
  return train.batch_size, train.micro_batch_size


# Those of docs/memory.md's tables.
SEGMENTORS = compile_ahead.ROWS + compile_ahead.ENCODING
TABULATED = {
  'v5e:1x1': SEGMENTORS,
  'v5e:2x2': SEGMENTORS + compile_ahead.IMAGENET,
  'v5e:16x16': compile_ahead.ROWS,
  'h200:1': SEGMENTORS + compile_ahead.IMAGENET,
  'h200:8': compile_ahead.ROWS,
}


@pytest.mark.parametrize('topology', TABULATED)
def test_kept_figures_are_of_the_best_implementations(topology):
  kept = trainings(topology)
  assert {case.row for case, _ in kept} == set(TABULATED[topology])
  for case, entry in kept:
    # Older entries were made when networks could be written in more ways, and
    # evaluations in one.
    best = implementations.BEST['tpu' if topology[0] == 'v' else 'gpu']
    expected = conv_forms.OURS | best
    if not case.row.endswith('deeplabv3plus'):
      # What no layer of a network has makes no difference.
      expected['depthwise'] = entry['forms']['depthwise']
    assert best.keys() <= entry['forms'].keys() | {'argmax', 'rows'}
    assert entry['forms'].items() <= expected.items()


@pytest.mark.parametrize('kind', ['', 'imagenet_'])
def test_batches_are_those_of_the_pipeline(kind, request):
  row = 'configs/imagenet_resnest50.py' if kind else 'configs/ade20k_fcn.py'
  config = load_config(f'{row}:mini')
  config.data.data_dir = str(request.getfixturevalue(f'mini_{kind}data_dir'))
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  expected = compile_ahead.abstract_batch(config, mesh)
  split = datasets.open_data(config.data, 'train')
  with pipeline.training_batches(config, split, mesh) as batches:
    batch = next(iter(batches))

  def described(arrays):
    return {k: (x.shape, x.dtype, x.sharding) for k, x in arrays.items()}

  assert described(batch) == described(expected)


def test_devices_evaluate_apart(compiled):
  _, (_, evaluation) = compiled
  network, finish = (evaluation['programs'][x] for x in ('network', 'finish'))
  assert network['collectives'] == finish['collectives'] == {}
  # Logits of 2 of 8 images, an eighth of the size, 150 classes.
  assert network['outputs_gb'] == pytest.approx(2 * 32 * 32 * 150 * 4 / 1e9)
  assert finish['temporaries_gb'] < 0.1


def test_times_are_what_the_figures_say():
  chip = CHIPS['v5e']._replace(teraflops=100, network=100)
  messages = scale_model.Messages(10**9, 10**6, 100)
  assert scale_model.step_times(messages, 0.1, chip, 1) == (0.1, 0, 0)
  times = scale_model.step_times(messages, 0.1, chip, 16)
  assert times.compute == 0.1
  assert times.gradients == pytest.approx(2 * 15 / 16 * 0.01)
  latency = scale_model.START + 8 * scale_model.HOP
  assert times.statistics == pytest.approx(2 * 15 / 16 * 1e-5 + 100 * latency)


def test_names_of_topologies():
  assert split_name('v5e:16x16') == ('v5e', '16x16')
  devices = {'v5e:16x16': 256, 'h200:8': 8, 'cpu': jax.device_count()}
  assert {name: count_devices(name) for name in devices} == devices
  for wrong in ('v7:2x2', 'v5e', 'h200:'):
    with pytest.raises(UserError, match=r'v5e:2x2, v5e:4x4'):
      split_name(wrong)


def test_kept_figures_hold_what_the_pages_say(root):
  # Less than 0.6 of the reference's memory, and nothing but all-reduces.
  found = [x for _, entry in KEPT for x in entry['programs'].values()]
  assert {y for x in found for y in x.get('collectives', ())} == {'all-reduce'}
  compared = 0
  for case, entry in trainings('h200:1'):
    # The reference's images a GPU: four GPUs share the batch.
    shared = case.batch_size == sizes_of(case.row)[0] // 4
    if shared and not (case.stage_sizes or case.effort):
      compared += 1
      source = (root / 'configs' / f'{case.row}.py').read_text()
      reference = float(re.search(r'([\d.]+) GB\s+a\s+GPU', source)[1])
      assert entry['programs']['step']['memory_gb'] < 0.6 * reference
  assert compared == 4


@pytest.mark.parametrize('chip', ['h200', 'v5e'])
def test_messages_are_those_that_the_model_predicts(chip):
  rows = scale_model.compare(scale_model.RESULTS, chip)
  assert {split_name(row['case'].topology)[0] for row in rows} == {chip}
  ratios = [row['predicted_bytes'] / row['emitted_bytes'] for row in rows]
  assert ratios == pytest.approx([1] * len(rows), abs=0.01)


@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5e:1x1', 'h200:1', 'h200:8'])
def test_every_row_fits_at_its_batch(topology):
  # On one small chip as `:16gb`.
  remat = 'blocks' if topology == 'v5e:1x1' else 'none'
  more = (remat, 'bfloat16', None, None)  # But for the effort.
  steps = [
    entry['programs']['step']
    for case, entry in trainings(topology)
    if case[4:10] == (*sizes_of(case.row), *more)
  ]
  assert [step['fits'] for step in steps] == [True] * len(TABULATED[topology])
  memory = CHIPS[topology.partition(':')[0]].memory
  assert all(1 < step['memory_gb'] < memory for step in steps)


@pytest.mark.parametrize('row', compile_ahead.ROWS)
def test_messages_do_not_grow_with_the_chips(row):
  sent = [
    entry['programs']['step']['collectives']['all-reduce']
    for case, entry in trainings('v5e:2x2') + trainings('v5e:16x16')
    if case.row == row
  ]
  assert sent == [sent[0]] * 2
