"""Trains a segmentation network.

    python train.py --config configs/ade20k_pspnet.py --workdir runs/pspnet

The workdir holds `config.json`, `checkpoints/`, `log.jsonl`, `tensorboard/`,
`curves.png`, and `doctor.json` and `doctor.png` about the data. The same
command resumes from the newest checkpoint, with the same result as without an
interruption. As long as there is no checkpoint, other flags start the run anew.
docs/runs.md explains the other files.

All devices are used. On several hosts, start the same command on each of them
(docs/scale.md).

SIGTERM, SIGUSR1 and Ctrl-C save the state and stop at any moment, with exit
status 75 (130 after Ctrl-C). docs/survival.md has recipes for SLURM and
Kubernetes.
"""

from resnest_jax.errors import RESUMES as STOPPED
from resnest_jax.errors import run


def main() -> None:
  from resnest_jax.config import flag_parser, parse_flags
  from resnest_jax.distributed import join
  from resnest_jax.training.stopping import Stopper

  parser = join.add_flags(flag_parser(__doc__))
  parser.add_argument(
    '--profile',
    metavar='FIRST:LAST',
    help='steps to trace into WORKDIR/profile, such as 10:15; docs/training.md',
  )
  flags = parse_flags(parser)
  # Before the imports, so that a signal during them ends the process cleanly.
  stopper = Stopper()
  with stopper.listen():
    # Imported late: these take seconds, and a mistyped flag should fail at
    # once.
    from resnest_jax import runtime
    from resnest_jax.training.loop import train
    from resnest_jax.training.profiling import parse_steps
    from resnest_jax.training.workdir import same_on_all_hosts

    profile = parse_steps(flags.profile) if flags.profile else None
    runtime.set_up(flags.config.model.dtype)
    # JAX has to join the other hosts before it computes anything.
    with join.joined(
      flags, same_on_all_hosts(flags.config), stop_together=True
    ):
      train(flags.config, flags.workdir, stopper, profile)


if __name__ == '__main__':
  run(main, STOPPED)
