"""Configurations from command lines and of runs, and their differences."""

import json
import re
from pathlib import Path

import pytest
from data.refusals import refused

from resnest_jax import config as configs
from resnest_jax.config import differences, flatten, load_config
from resnest_jax.flags import command_line

ROW = 'ade20k_pspnet'


@pytest.fixture
def trained_on(tmp_path):
  """A run's folder, its data next to it."""
  (tmp_path / 'data').mkdir()
  values = {'data.data_dir': str(tmp_path / 'data'), 'seed': 3}
  values |= {'eval.slide_crop': (64, 48), 'optimizer.clip_norm': 1.0}
  config = load_config(f'{ROW}:mini', values)
  (tmp_path / 'config.json').write_text(configs.config_to_json(config))
  return tmp_path, config


def test_configuration_of_a_run_is_the_one_it_was_started_with(trained_on):
  workdir, config = trained_on
  found = configs.load_run_config(workdir)
  assert found == config
  assert [x.is_locked for x in (found, config, config.model)] == [True] * 3
  changed = configs.load_run_config(workdir, {'eval.bucket': '32'})
  told = differences(configs.config_to_json(config), changed)
  assert told == ['eval.bucket: 128 before, 32 now']
  # Also of an earlier version.
  older = config.to_dict()
  del older['loss'], older['eval']['flip']
  older['train']['accumulation'] = 'exact'
  (workdir / 'config.json').write_text(json.dumps(older))
  assert configs.load_run_config(workdir) == config


DAMAGES = [
  ('{', '[', 'is damaged'),
  ('{', '[' * 100_000, 'is damaged'),
  ('{', '[0], {', 'is damaged'),
  ('"seed": 3', '"seed": NaN', 'is damaged: it has nan'),
  ('"seed": 3', '"seed": "x"', 'seed must be a whole number'),
  ('"seed": 3', '"sead": 3', "unknown config key 'sead'"),
  ('"batch_size": 16', '"batch_size": 0', 'batch_size is 0'),
  ('"folder": {', '"folder": 1, "x": {', 'data.folder'),
]


@pytest.mark.parametrize(('old', 'new', 'message'), DAMAGES)
def test_damaged_configuration_is_refused(trained_on, old, new, message):
  path = trained_on[0] / 'config.json'
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))
  refused(f'{message}.* Give --config', configs.load_run_config, path.parent)


def test_data_that_is_not_where_the_run_had_it(trained_on, monkeypatch):
  workdir, config = trained_on
  (workdir / 'elsewhere').mkdir()
  load, path = configs.load_run_config, workdir / 'config.json'
  path.write_text(path.read_text().replace(config.data.data_dir, 'elsewhere'))
  refused('data_dir=elsewhere, and /.* Go to the folder where', load, workdir)
  monkeypatch.chdir(workdir)
  assert load(workdir).data.data_dir == 'elsewhere'
  refused('=gone: there is no gone', load, workdir, {'data.data_dir': 'gone'})


def test_differences_name_key_and_both_values():
  mini = load_config(f'{ROW}:mini')
  saved = configs.config_to_json(mini)
  assert differences(saved, mini) == []
  changes = {'data.crop_size': '64,64', 'eval.overlays': 3, 'model.radix': 1}
  other = load_config(f'{ROW}:mini', changes)
  assert differences(saved, other, ignore=['eval']) == [
    'data.crop_size: [128, 128] before, [64, 64] now',
    'model.radix: None before, 1 now',
  ]
  assert 'eval.overlays: 8 before, 3 now' in differences(saved, other, ['eva'])
  gone = saved.replace('"seed": 0', '"seed": 0, "sede": 1')
  assert differences(gone, mini) == ['sede: 1 before, not set now']


def test_keys_that_came_or_went_count_unless_they_have_their_default():
  older = json.loads(configs.config_to_json(load_config(ROW)))
  del older['loss']['terms'], older['optimizer']['clip_norm'], older['seed']
  older['train']['accumulation'] = 'plain'
  assert differences(json.dumps(older), load_config(ROW)) == []
  older['train']['accumulation'] = 'exact'
  other = load_config(ROW, {'loss.terms.dice': 1})
  came, went = differences(json.dumps(older), other)
  assert came == 'loss.terms.dice: 0.0 before, 1.0 now'
  assert re.match("train.accumulation: 'exact' .* train.remat=stages", went)


# ---- Command lines ---------------------------------------------------------


def test_tilde_is_the_home_folder_wherever_a_word_or_value_starts(monkeypatch):
  monkeypatch.setenv('HOME', '/me')
  given = ['--config', ROW, '--workdir=~', '--config.data.data_dir=~/x~']
  flags = configs.parse_flags(configs.flag_parser('test'), given)
  assert (flags.workdir, flags.config.data.data_dir) == (Path('/me'), '/me/x~')
  words = '~/a --out ~ --archive=~/b=~ a~ --x=a/~ ~no-such-user/c'
  expected = '/me/a --out /me --archive=/me/b=~ a~ --x=a/~ ~no-such-user/c'
  assert command_line(words.split()) == expected.split()


COMMANDS = {
  '': '--workdir or --config is required',
  '--workdir=': r'\A--workdir is empty; give',
  '--workdir x --config.data.data_dir= --config ' + ROW: "is ''; .* a folder",
  '--workdir nowhere': 'there is no folder nowhere; give the workdir',
  '--workdir tests': r'tests/config\.json cannot be read .*--config',
  '--weights ade20k_pspnet': 'no workdir .* give --config',
  f'--config {ROW} --config.seed --workdir x': 'needs a value',
  f'--config {ROW} --workdir x --config.seed': 'needs a value',
  '--config configs/nope.py': r'there is no .*nope\.py.*ade20k_pspnet',
  '--config configs/ade20k_psp': r'you mean ade20k_pspnet\?.*, folder, .*\.',
  '--config configs/ade20k_pspnet.py:big': r"'big'.*accepted: 'mini'",
  '--config configs/common.py': r'common\.py holds .*ade20k_pspnet',
}


@pytest.mark.parametrize('command', COMMANDS)
def test_wrong_command_line_is_refused(command, root, monkeypatch):
  monkeypatch.chdir(root)
  # Neither --workdir nor --config is required.
  parser = configs.flag_parser('test', False, False)
  parser.add_argument('--weights')
  refused(COMMANDS[command], configs.parse_flags, parser, command.split())


def test_both_forms_of_a_flag_and_a_flag_of_the_script():
  parser = configs.flag_parser('test')
  parser.add_argument('--checkpoint')
  words = f'--config {ROW}:mini --config.seed=7 --workdir=run --checkpoint c '
  words += '--config.data.data_dir a=b --config.seed 8'  # The last one counts.
  flags = configs.parse_flags(parser, words.split())
  assert (flags.workdir, flags.checkpoint) == (Path('run'), 'c')
  expected = {'seed': 8, 'data.data_dir': 'a=b', 'model.width': 16}
  assert flatten(flags.config).items() >= expected.items()
  refused('required: --workdir', configs.parse_flags, parser, ['--config', ROW])
