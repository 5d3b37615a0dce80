"""The loop of docs/python.md runs as it stands, on a smaller network."""

import re

import pytest
from small import RUN


@pytest.fixture
def example(root):
  """The first block of code, its network small; and the second one."""
  text = (root / 'docs' / 'python.md').read_text('utf-8')
  loop, data = re.findall(r'```python\n(.*?)```', text, re.S)
  small, found = re.subn(r"\{'data\.data_dir'", "{**RUN, 'data.data_dir'", loop)
  assert found == 1
  return small, data


def test_loop_of_your_own(
  example, mini_data_dir, tmp_path, monkeypatch, capsys
):
  (tmp_path / 'demo').mkdir()
  (tmp_path / 'demo' / 'data').symlink_to(mini_data_dir)
  monkeypatch.chdir(tmp_path)
  names = {'RUN': RUN | {'optimizer.learning_rate': 0.05}}
  exec('\n'.join(example), names)
  lines = capsys.readouterr().out.splitlines()
  steps = [line for line in lines if line.startswith('step')]
  losses = [float(re.search(r'loss ([\d.]+)', line)[1]) for line in steps]
  assert len(steps) == 4
  assert losses[-1] < losses[0]
  assert sum(line.startswith('mIoU 0.') for line in lines) == 2
  assert 'decode_head.conv_seg.weight' in names['state_dict']
  assert int(names['state'].step) == 40

  splits, config = names['splits'], names['config']
  chosen = names['Chosen'](splits.train, [3, 5])
  named = {splits.train[i]['name'] for i in chosen.indices}
  assert {chosen[i]['name'] for i in range(len(chosen))} == named
  with names['rj'].training_batches(config, chosen, names['mesh']) as batches:
    first = next(batches)
  assert first['image'].shape == (4, 32, 32, 3)
  assert first['image'].sharding.mesh == names['mesh']
