"""`benchmarks/tpu_clock.py`: what is added up, read from a small program."""

import gzip
import json
import sys

import jax
import pytest

from benchmarks import hlo, peer_networks, tpu_clock
from benchmarks.ahead import Case
from benchmarks.scale_model import RESULTS
from benchmarks.topologies import CHIPS
from resnest_jax.errors import UserError

# libtpu's program of one convolution with ReLU and a loss in 8 tiles, with the
# cycles that it has, but without what counts nothing.
PROGRAM = """
HloModule jit_train_step, is_scheduled=true
%fused_computation.15 (param_0.46: u8[8,32,32,128]) -> bf16[8,32,32,128] {
  %convert.41 = f32[8,32,32,128]{3,0,2,1} convert(%param_0.46)
  ROOT %multiply.1 = f32[8,32,32,128]{3,0,2,1} multiply(%convert.41, %broadcast.30)
}
%bitcast_fusion (bitcast_input: f32[3,3,128,128]) -> f32[3,3,128,128] {
  ROOT %convolution.2 = f32[8,32,32,128]{3,0,2,1} convolution(%a, %bitcast_input), dim_labels=b01f_01io->b01f
}
%fused_computation.17 (param_0.65: f32[128], param_2.57: bf16[8,32,32,128]) -> (f32[8,32,32,128], f32[8,32,32,128]) {
  %fusion.24 = f32[8,32,32,128]{3,0,2,1} fusion(%param_2.57), kind=kLoop, calls=%bitcast_fusion
  ROOT %max.7 = f32[8,32,32,128]{3,0,2,1} maximum(%fusion.24, %broadcast.29)
}
%fused_computation.5.clone.1 (param_0.70: f32[8,32,32,128], param_1.72: s32[]) -> f32[1,32,32,128] {
  %param_0.70 = f32[8,32,32,128]{3,0,2,1} parameter(0)
  ROOT %dynamic_slice.16 = f32[1,32,32,128]{3,0,2,1} dynamic-slice(%param_0.70, %param_1.72), dynamic_slice_sizes={1,32,32,128}
}
%fused_computation.4.clone.1 (param_0.71: f32[8,32,32,128]) -> f32[8,32,32,128] {
  %exp.10 = f32[1,32,32,128]{3,2,1,0} exponential(%sub.21)
  ROOT %dynamic_update_slice.12 = f32[8,32,32,128]{3,2,1,0} dynamic-update-slice(%param_0.71, %exp.10, %param_1.73)
}
%wide.region_0.4.sunk (wide.arg_tuple.6: (s32[], f32[8,32,32,128])) -> (s32[], f32[8,32,32,128]) {
  %constant_dynamic-slice_fusion.4 = f32[1,32,32,128]{3,0,2,1:T(1,128)S(1)} fusion(%get-tuple-element.141), kind=kLoop, calls=%fused_computation.5.clone.1, metadata={op_name="jit(train_step)/jvp()/while/body/jit(dynamic_index_in_dim)/dynamic_slice" stack_frame_id=19}, backend_config={"window_config":{"estimated_cycles":"19385","iteration_bounds":["1"]}}
  ROOT %fusion.26 = f32[8,32,32,128]{3,2,1,0:T(8,128)S(1)} fusion(%get-tuple-element.135), kind=kLoop, calls=%fused_computation.4.clone.1, metadata={op_name="jit(train_step)/jvp()/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice" stack_frame_id=19}, backend_config={"window_config":{"estimated_cycles":"4652"}}
}
%wide.region_1.5 (wide.arg_tuple.3: (s32[], f32[8,32,32,128])) -> pred[] {
  %constant.87 = s32[]{:T(128)} constant(8)
  ROOT %lt.6 = pred[]{:T(512)} compare(%get-tuple-element.92, %constant.87), direction=LT, metadata={op_name="jit(train_step)/jvp()/while/cond/lt"}
}
%region_4.8 (reduce_sum.3: f32[], reduce_sum.4: f32[]) -> f32[] {
  ROOT %reduce_sum.5 = f32[] add(%reduce_sum.3, %reduce_sum.4)
}
%fused_computation.12 (param_0.62: f32[8,32,32,128]) -> f32[128] {
  ROOT %reduce_sum.0 = f32[128]{0} reduce(%param_0.62, %constant.82), dimensions={0,1,2}, to_apply=%region_4.8
}
ENTRY %main.9 (x.1: u8[8,32,32,128], y.1: f32[8,32,32,128]) -> (f32[128], f32[3,3,128,128]) {
  %convert_multiply_fusion = bf16[8,32,32,128]{3,2,1,0:T(8,128)(2,1)S(1)} fusion(%x.1), kind=kLoop, calls=%fused_computation.15, metadata={op_name="jit(train_step)/div" stack_frame_id=11}, backend_config={"window_config":{"estimated_cycles":"13501"}}
  %broadcast_maximum_fusion = (f32[8,32,32,128]{3,0,2,1:T(8,128)S(1)}, f32[8,32,32,128]{3,0,2,1:T(8,128)S(1)}) fusion(%convert_multiply_fusion), kind=kOutput, calls=%fused_computation.17, metadata={op_name="jit(train_step)/jvp(Segmentor)/backbone/layer1_0/conv_general_dilated" stack_frame_id=15}, backend_config={"window_config":{"estimated_cycles":"21687"}}
  %while.4 = (s32[]{:T(128)}, f32[8,32,32,128]{3,2,1,0}) while(%tuple.38), condition=%wide.region_1.5, body=%wide.region_0.4.sunk, metadata={op_name="jit(train_step)/jvp()/while"}
  %broadcast.5 = f32[8,32,32,128]{3,0,2,1:T(8,128)S(1)} broadcast(%constant.28), dimensions={}, metadata={op_name="jit(train_step)/jvp()/while" stack_frame_id=9}, backend_config={"window_config":{"estimated_cycles":"272"}}
  %copy-start = (f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)}, f32[3,3,128,128]{3,2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%kernel.1), backend_config={"flag_configs":[]}
  %copy-done = f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)} copy-done(%copy-start)
  %convert_reduce_fusion = u32[128]{0} fusion(%get-tuple-element.84), kind=kLoop, calls=%fused_computation.12, backend_config={"window_config":{"estimated_cycles":"20153"}}
  %fusion.6 = f32[128]{0:T(128)S(1)} fusion(%while.15), kind=kLoop, calls=%fused_computation.12, metadata={op_name="jit(train_step)/transpose(jvp(Segmentor))/backbone/layer1_0/reduce_sum" stack_frame_id=6}, backend_config={"window_config":{"estimated_cycles":"20441"}}
  ROOT %tuple.5 = (f32[128]{0}, f32[3,3,128,128]{3,2,1,0}) tuple(%fusion.6, %copy-done)
}
"""  # noqa: E501
FIGURES = {
  'case': Case('x', '', 'v5e:1x1', 'train', 8, 0, 'none', 'bfloat16')._asdict(),
  'options': {},
  'flops': 131072 * 1000,
  'temporaries_gb': 0.5,
}


def test_cycles_are_added_up_by_part_and_kind():
  parts = tpu_clock.by_part(hlo.operations(PROGRAM))
  assert parts == {
    'batch and optimizer': {'elementwise': 13501},
    'stage 1, forward': {'products': 21687},
    # The loop runs eight times; a copy next to others is no operation.
    'loss': {'moving data': 8 * 19385 + 272, 'elementwise': 8 * 4652},
    'stage 1, backward': {'reductions': 20441},
    'no layer': {'reductions': 20153},
  }
  assert list(parts) == [part for part in tpu_clock.PARTS if part in parts]


NAMES = {
  '': 'no layer',
  'jit(train_step)/add': 'batch and optimizer',
  'jit(train_step)/jvp(Segmentor)/convert_element_type': 'stem, forward',
  'jit(train_step)/transpose(jvp(Segmentor))/backbone/stem_conv1/conv': (
    'stem, backward'
  ),
  'jit(train_step)/jvp(Segmentor)/backbone/jit(core_fn)/layer3_1/add': (
    'stage 3, forward'
  ),
  # Computed again: part of the backward pass.
  'jit(train_step)/transpose(jvp(Segmentor))/checkpoint/layer4_0/conv': (
    'stage 4, backward'
  ),
  'jit(train_step)/jvp(Segmentor)/auxiliary_head/classifier/dot': (
    'auxiliary head, forward'
  ),
  'jit(train_step)/transpose(jvp(Segmentor))/decode_head/dot': 'head, backward',
  'jit(train_step)/jvp(ResNet50)/add': 'other layers, forward',
  'jit(train_step)/jvp(bhwc,jw->hbjc)/dot_general': 'loss',
  'jit(train_step)/transpose(jvp())/while/body/mul': 'loss',
}


def test_parts_are_known_by_name():
  assert {name: tpu_clock.part_of(name) for name in NAMES} == NAMES


def test_equal_blocks_are_one_of_the_largest_operations():
  name = 'jit(f)/jvp(Segmentor)/backbone/{}layer3_{}/add'
  blocks = [('jit(core_fn)/', 1, 5), ('', 22, 7)]
  operations = [
    hlo.Operation(name.format(jit, i), 'elementwise', cycles)
    for jit, i, cycles in blocks
  ]
  operations.append(hlo.Operation(name.format('', 0), 'products', 2))
  joined = name.replace('_{}', '').format('')
  assert [tuple(x.values()) for x in tpu_clock.largest(operations, 9)] == [
    (joined, 'elementwise', 12),
    (joined, 'products', 2),
  ]


def test_speed_follows_from_cycles():
  result = tpu_clock.read_step(FIGURES, PROGRAM)
  total = 13501 + 21687 + 8 * (19385 + 4652) + 272 + 20441 + 20153
  assert (result['cycles'], result['cycles_an_image']) == (total, total // 8)
  # 197 TFLOP/s in units that make 131,072 FLOP a cycle.
  assert result['megahertz'] == 1503
  rate = 8 * 197e12 / 131072 / total
  assert result['images_a_second'] == pytest.approx(rate)
  assert result['share_of_peak'] == pytest.approx(1000 / total)
  moved = (8 * 19385 + 272) / total
  assert result['share_moving_data'] == pytest.approx(moved)


def test_rates_of_clocks_are_those_that_are_known():
  # Norrie et al. (2021) have those of v3, and Google's pages the peaks.
  found = {k: chip.hertz / 1e6 for k, chip in CHIPS.items() if chip.operations}
  known = {'v3': 940, 'v5e': 1500, 'v5p': 1750, 'v6e': 1750}
  assert found == pytest.approx(known, rel=0.003)


@pytest.fixture
def clock(monkeypatch, capsys):
  """`clock('--row', ...)`: what the script prints."""

  def clock(*flags):
    monkeypatch.setattr(sys, 'argv', ['tpu_clock.py', *map(str, flags)])
    tpu_clock.main()
    return capsys.readouterr().out

  return clock


def test_a_kept_program_is_read(clock, tmp_path):
  flags = ['--keep', tmp_path, '--out', tmp_path / 'out', '--batch_size']
  figures = FIGURES | {'case': FIGURES['case'] | {'row': 'flax_resnet50'}}
  for size, batch in enumerate((8, 16)):
    figures['case']['batch_size'] = batch
    path = tmp_path / f'flax_resnet50-v5e-1x1-train-batch-{batch}-bfloat16.gz'
    program = PROGRAM.replace('constant(8)', f'constant({16 - 8 * size})')
    with gzip.open(path, 'wt', encoding='utf-8') as file:
      file.write(json.dumps(figures | {'date': '2026-12-01'}) + '\n' + program)
    said = clock('--row', 'flax_resnet50', *flags, batch)
    assert 'compiling' not in said
    assert ', forward' in said
  names = [f'tpu_clock-flax_resnet50-v5e-1x1-b{n}-2026-12-01' for n in (8, 16)]
  paths = [tmp_path / 'out' / f'{name}.json' for name in names]
  for path in paths:
    assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
  # 16 rounds for 8 images, 8 rounds for 16.
  said = clock('--compare', *paths)
  old = 16 * (19385 + 4652) + 272
  new = (8 * (19385 + 4652) + 272) / 2
  expected = [f'{x / 8e6:.2f}' for x in (old, new)]
  (line,) = (x.split() for x in said.splitlines() if x.startswith('loss'))
  assert line[1:] == [*expected, f'{(new - old) / 8e6:+.2f}']


def test_what_has_no_clock_is_told(clock):
  for wrong in ('cpu', 'h200:1', 'v4:2x2x1'):
    with pytest.raises(UserError, match=f'{wrong}: .* v3, v5e, v5p, v6e'):
      clock('--topology', wrong)
  with pytest.raises(SystemExit):
    clock('--options', 'xla_tpu_scoped_vmem_limit_kib')


def test_the_peer_is_resnet_50():
  model = peer_networks.ResNet50('bfloat16')
  images = jax.ShapeDtypeStruct((2, 224, 224, 3), 'bfloat16')
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  # torchvision's, and He et al.'s 3.8 G multiply-adds with the stride in 3x3.
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == 25557032


RESULTS_OF_CLOCK = sorted(RESULTS.glob('tpu_clock-*.json'))


@pytest.mark.parametrize('path', RESULTS_OF_CLOCK, ids=lambda path: path.stem)
def test_kept_results_add_up(path):
  result = json.loads(path.read_text('utf-8'))
  total = sum(sum(kinds.values()) for kinds in result['parts'].values())
  assert total == result['cycles'] > 1e6
  case = result['case']
  hertz = CHIPS[case['topology'].partition(':')[0]].hertz
  rate = case['batch_size'] * hertz / result['cycles']
  assert result['images_a_second'] == pytest.approx(rate)
  assert 0.05 < result['share_of_peak'] < 1
