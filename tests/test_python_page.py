"""The loop of docs/python.md runs as it stands, on a smaller network."""

import re

import pytest
from pages import blocks_of
from small import RUN

from resnest_jax.errors import UserError


def test_loop_of_your_own(mini_data_dir, tmp_path, monkeypatch, capsys):
  loop, data = blocks_of('python.md')
  loop = loop.replace("{'data.data_dir'", "{**RUN, 'data.data_dir'")
  (tmp_path / 'demo').mkdir()
  (tmp_path / 'demo' / 'data').symlink_to(mini_data_dir)
  monkeypatch.chdir(tmp_path)
  names = {'RUN': RUN | {'optimizer.learning_rate': 0.05}}
  exec(f'{loop}\n{data}', names)
  printed = capsys.readouterr().out
  losses = re.findall(r'^step \d+: loss ([\d.]+)', printed, re.MULTILINE)
  assert len(losses) == 4
  assert float(losses[-1]) < float(losses[0])
  assert printed.count('mIoU 0.') == 2
  assert 'decode_head.conv_seg.weight' in names['state_dict']
  assert int(names['state'].step) == 40

  splits, config = names['splits'], names['config']
  chosen = names['Chosen'](splits.train, [3, 5])
  named = [splits.train[i]['name'] for i in chosen.indices]
  assert [chosen[i]['name'] for i in range(len(chosen))] == named
  with names['rj'].training_batches(config, chosen, names['mesh']) as batches:
    first = next(batches)
  assert first['image'].shape == (4, 32, 32, 3)
  assert first['image'].sharding.mesh == names['mesh']

  own_loss = config, names['mesh'], lambda logits, labels: logits.mean()
  hollow = names['rj'].create_training(*own_loss)
  with pytest.raises(UserError, match=r'return \(loss, accuracy, terms\)'):
    hollow.step(names['state'], first)
