"""Trains a segmentation network.

    python train.py --config configs/ade20k_pspnet.py --workdir runs/pspnet

The run lives in the workdir: `config.json`, `checkpoints/`, `log.jsonl`,
`tensorboard/`, `curves.png`, and `doctor.json` and `doctor.png` of a look at
the data before the first step. Started again with the same flags it goes on
from the newest checkpoint; the result does not depend on interruptions. A
workdir without a checkpoint may be started again with other flags.
"""

from resnest_jax.config import flag_parser, parse_flags
from resnest_jax.errors import run


def main() -> None:
  """Reads the command line and trains."""
  flags = parse_flags(flag_parser(__doc__))
  # They take seconds, which a mistake in the command line need not.
  from resnest_jax import runtime
  from resnest_jax.training.loop import train

  runtime.set_up(flags.config.model.dtype)
  train(flags.config, flags.workdir)


if __name__ == '__main__':
  run(main)
