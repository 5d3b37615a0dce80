"""Trains a segmentation network.

    python train.py --config configs/ade20k_pspnet.py --workdir runs/pspnet

The run lives in the workdir: `config.json`, `checkpoints/`, `log.jsonl`,
`tensorboard/`, `curves.png`, and `doctor.json` and `doctor.png` of a look at
the data before the first step. Started again with the same flags it goes on
from the newest checkpoint; the result does not depend on interruptions. A
workdir without a checkpoint may be started again with other flags.

All devices are used. On several hosts, start the same command on each of them;
docs/scale.md says how they find each other.

SIGTERM, SIGUSR1 and Ctrl-C save the state and stop, at any moment; the exit
status is then 75 (130 after Ctrl-C). docs/survival.md has recipes for SLURM
and Kubernetes.
"""

from resnest_jax.config import flag_parser, parse_flags
from resnest_jax.distributed import join
from resnest_jax.errors import run
from resnest_jax.training.stopping import Stopper


def main() -> None:
  """Reads the command line and trains."""
  parser = join.add_flags(flag_parser(__doc__))
  parser.add_argument(
    '--profile',
    metavar='FIRST:LAST',
    help='steps to trace into WORKDIR/profile, such as 10:15; docs/training.md',
  )
  flags = parse_flags(parser)
  stopper = Stopper()
  with stopper.listen():
    # They take seconds, which a mistake in the command line need not.
    from resnest_jax import runtime
    from resnest_jax.training.loop import train
    from resnest_jax.training.profiling import parse_steps
    from resnest_jax.training.workdir import same_on_all_hosts

    profile = parse_steps(flags.profile) if flags.profile else None
    runtime.set_up(flags.config.model.dtype)
    with join.joined(
      flags, same_on_all_hosts(flags.config), stop_together=True
    ):
      train(flags.config, flags.workdir, stopper, profile)


if __name__ == '__main__':
  run(main)
