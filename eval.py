"""Evaluates a network on a whole split, every image once.

    python eval.py --workdir runs/pspnet
    python eval.py --config configs/ade20k_pspnet.py --weights ade20k_pspnet \\
      --out results

The first command takes the run's own configuration, data included; flags such
as --config.data.data_dir=DIR change it. The second evaluates published or
converted weights (docs/weights.md).

Prints a table of the classes and writes into --out: metrics.json (the scores
and their origin), report.html (the same for a browser, with confusions and the
worst and best images), overlays/NAME.png and contact_sheet.png (image, ground
truth, prediction, errors). --calibrate fits how sure the network may be
(docs/evaluation.md#calibration).
"""

from pathlib import Path

from resnest_jax.errors import UserError, run


def main() -> None:
  from resnest_jax.config import flag_parser, parse_flags
  from resnest_jax.distributed import join
  from resnest_jax.flags import add_checkpoint_flag

  parser = flag_parser(__doc__, workdir_required=False, config_required=False)
  add_checkpoint_flag(parser)
  parser.add_argument(
    '--weights',
    metavar='SOURCE',
    help='instead of --workdir: a published name, a path, an address, or the '
    'workdir of a training, with the network that was trained there',
  )
  parser.add_argument(
    '--split',
    metavar='NAME',
    help='of the data set; default: config.data.eval_split',
  )
  parser.add_argument(
    '--out',
    type=Path,
    metavar='DIR',
    help='folder for the results; default: WORKDIR/eval/STEP-SPLIT, and '
    'the protocol if it is not "whole"',
  )
  parser.add_argument(
    '--calibrate',
    action='store_true',
    help='fit the temperature of probabilities on the split and keep it with '
    'the weights: predict.py and export.py use it from then on',
  )
  flags = parse_flags(join.add_flags(parser))
  if bool(flags.workdir) == bool(flags.weights):
    raise UserError(
      'give either --workdir, the folder of a run, or --weights, a name, a '
      'path or an address.'
    )
  if flags.weights and not flags.out:
    raise UserError('--weights needs --out, a folder for the results.')
  # Imported late: these take seconds, and a mistyped flag should fail at once.
  from resnest_jax import runtime
  from resnest_jax.evaluation.evaluate_split import evaluate_split
  from resnest_jax.training.workdir import same_on_all_hosts

  runtime.set_up(flags.config.model.dtype)
  # JAX has to join the other hosts before it computes anything.
  with join.joined(flags, same_on_all_hosts(flags.config)):
    evaluate_split(
      flags.config,
      workdir=flags.workdir,
      checkpoint=flags.checkpoint,
      weights=flags.weights,
      split_name=flags.split,
      out=flags.out,
      calibrate=flags.calibrate,
    )


if __name__ == '__main__':
  run(main)
