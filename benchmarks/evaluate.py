"""Times the evaluation of images of mixed sizes, in two ways.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --peer /path/to/python --out results

`bucketed` is what eval.py does: images share padded shapes and batches.
`one by one` is the plain way: every image at its own size, a compilation for
each new one. `--peer` names a Python that has mmsegmentation; its network, of
the same weights, then evaluates the same files in a process of its own. All
take turns, round by round, and medians are compared, with the time that
compiling takes and without. Nothing is taken from JAX's compile cache.

Images are scenes in the layout of ADE20K, of many sizes; weights are random.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flags import add_out, positive
from benchmarks.peer import open_peer
from benchmarks.report import describe_machine, write_result
from resnest_jax import runtime
from resnest_jax.config import load_config
from resnest_jax.data import preprocess
from resnest_jax.data.datasets import DATASETS, PreparedSplit
from resnest_jax.data.mini import ade20k_mini
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.data.prepare import prepare
from resnest_jax.errors import run
from resnest_jax.evaluation.evaluate import evaluate
from resnest_jax.evaluation.segmentation import Segmentation
from resnest_jax.inference import steps
from resnest_jax.inference.label_maps import count_confusion
from resnest_jax.models.layers import resize
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes


def make_plain_step(model: Any, num_classes: int) -> steps.EvalStep:
  """As `make_eval_step`, for images without padding.

  The network compiles for each size of its input, what follows for each size
  of the original next to it.
  """

  @jax.jit
  def plain_network(variables, image):
    size = jnp.array([image.shape[1:3]])
    images = preprocess.preprocess(image, size)
    logits = model.apply(variables, images, train=False).logits
    return resize(logits, image.shape[1:3])

  @jax.jit
  def plain_counts(logits, label):
    scores = resize(logits, label.shape[1:3])
    maps = jnp.argmax(scores, -1).astype(jnp.uint8)
    return maps, count_confusion(maps, label, num_classes)

  def step(variables, batch):
    logits = plain_network(variables, batch['image'])
    return plain_counts(logits, batch['label'])

  return step


def measure_way(
  make_step: Callable[[], steps.EvalStep],
  variables: Any,
  split: PreparedSplit,
  config: Any,
  batch_size: int,
  bucket: int,
) -> tuple[dict[str, Any], np.ndarray]:
  """Two passes over the split with a new step; the first has to compile.

  Returns:
    Figures, and the confusion matrix.
  """
  step, shapes, seconds = make_step(), set(), []

  def noted(variables, batch):
    shapes.add((batch['image'].shape, batch['label'].shape))
    return step(variables, batch)

  with runtime.count_compilations() as compiled:
    for _ in range(2):
      batches = make_eval_iterator(
        config.data, split, batch_size=batch_size, bucket=bucket
      )
      classes = [str(i) for i in range(config.model.num_classes)]
      task = Segmentation(classes, with_maps=False)
      with contextlib.closing(batches):
        evaluation = evaluate(noted, variables, batches, task, len(split))
      seconds.append(evaluation.seconds)
  networks = [x for x in compiled if 'forward' in x or 'plain_network' in x]
  figures = {
    'seconds': dict(zip(('first', 'again'), seconds, strict=True)),
    'image_shapes': len({image for image, _ in shapes}),
    'shapes': len(shapes),
    'network_compilations': len(networks),
    'compilations': len(compiled),
  }
  return figures, evaluation.confusion


def prepare_images(folder: Path, number: int) -> PreparedSplit:
  """Draws scenes, writes them as files, and as a prepared split."""
  archive = folder / 'ADEChallengeData2016.zip'
  with contextlib.redirect_stdout(sys.stderr):
    ade20k_mini.write_archives(archive, {'train': 1, 'validation': number}, 0)
    prepare(DATASETS['ade20k_mini'], folder / 'data', archive)
  with zipfile.ZipFile(archive) as files:
    files.extractall(folder)
  return PreparedSplit('ade20k_mini', folder / 'data', 'validation')


def compare(config: Any, folder: Path, flags: argparse.Namespace) -> dict:
  """Figures of all ways, and the ratios."""
  split = prepare_images(folder, flags.images)
  model = create_segmentor(config.model)
  variables = draw_variables(model)
  state_dict = export_state_dict(model, variables, 'mmseg')
  variables = jax.device_put(variables)
  np.savez(folder / 'weights.npz', **state_dict)
  (folder / 'config.json').write_text(
    json.dumps(config.model.to_dict() | {'scale': config.data.image_scale})
  )
  bucketed, plain = f'bucketed, batches of {flags.batch_size}', 'one by one'
  classes = config.model.num_classes
  ways = {
    bucketed: (
      lambda: steps.make_eval_step(model, classes),
      *(flags.batch_size, config.eval.bucket),
    ),
    plain: (lambda: make_plain_step(model, classes), 1, 1),
  }
  rounds: dict[str, list[dict]] = {}
  with open_peer(flags.peer, 'evaluate_peer.py', folder) as peer:
    for number in range(flags.rounds):
      for way, (make_step, batch_size, bucket) in ways.items():
        jax.clear_caches()
        figures, confusion = measure_way(
          make_step, variables, split, config, batch_size, bucket
        )
        rounds.setdefault(way, []).append(figures | {'confusion': confusion})
        print(f'round {number + 1}: {way}', file=sys.stderr, flush=True)
      if peer:
        seconds = [peer.seconds() for _ in range(2)]
        figures = dict(zip(('first', 'again'), seconds, strict=True))
        theirs = np.load(folder / 'confusion.npy')
        rounds.setdefault('peer', []).append(
          {'seconds': figures, 'confusion': theirs}
        )
  result = {'images': len(split), 'sizes': count_sizes(split)}
  result |= {'peer_version': peer.version} if peer else {}
  return result | summarize(rounds, len(split), bucketed)


def draw_variables(model: Any) -> Any:
  """Random weights and statistics with which the classes differ in places."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key in ('scale', 'var'):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
    values = rng.standard_normal(leaf.shape)
    fan_in = max(np.prod(leaf.shape[:-1]), 100 if len(leaf.shape) == 1 else 1)
    return (values / np.sqrt(fan_in)).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


def count_sizes(split: PreparedSplit) -> int:
  """How many different sizes its images have."""
  return len({split[i]['label'].shape for i in range(len(split))})


def summarize(
  rounds: dict[str, list[dict]], images: int, bucketed: str
) -> dict[str, Any]:
  """Medians over the rounds, and how many times as fast `bucketed` is."""
  expected = rounds[bucketed][0]['confusion']
  ways = {}
  for way, figures in rounds.items():
    confusion = figures[0].pop('confusion')
    for later in figures[1:]:
      later.pop('confusion')
    ways[way] = {
      'images_per_second': {
        key: images / statistics.median(x['seconds'][key] for x in figures)
        for key in ('first', 'again')
      },
      **{key: x for key, x in figures[0].items() if key != 'seconds'},
      # Counts that are elsewhere: at least so many pixels differ.
      'classes_predicted': int(confusion.any(0).sum()),
      'pixels_moved': int(np.abs(confusion - expected).sum() // 2),
      'rounds': [x['seconds'] for x in figures],
    }
  ours = ways[bucketed]['images_per_second']
  ratio = {
    way: {key: ours[key] / x['images_per_second'][key] for key in ours}
    for way, x in ways.items()
    if way != bucketed
  }
  return {'ways': ways, 'ratio': ratio, 'pixels': int(expected.sum())}


def print_figures(result: dict[str, Any]) -> None:
  """Images a second of each way, with compiling and without."""
  table = rich.table.Table(
    f'{result["images"]} images of {result["sizes"]} sizes'
  )
  for column in ('images/s, compiling', 'again', 'compilations', 'ratio'):
    table.add_column(column, justify='right')
  for way, figures in result['ways'].items():
    ratio = result['ratio'].get(way)
    table.add_row(
      way,
      *(f'{x:.2f}' for x in figures['images_per_second'].values()),
      str(figures.get('network_compilations', '')),
      ' '.join(f'{x:.2f}' for x in ratio.values()) if ratio else '',
    )
  rich.console.Console().print(table)


def main() -> None:
  """Reads the command line, measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--config',
    default='configs/ade20k_pspnet.py:mini',
    help='a row on ADE20K (default: %(default)s)',
  )
  parser.add_argument(
    '--images', type=positive, default=60, help='default: %(default)s'
  )
  parser.add_argument(
    '--rounds',
    type=positive,
    default=3,
    help='medians are over these (default: %(default)s)',
  )
  parser.add_argument(
    '--batch_size', type=positive, help="of bucketed; default: the config's"
  )
  parser.add_argument(
    '--peer', metavar='COMMAND', help='a Python that has mmsegmentation'
  )
  add_out(parser)
  flags = parser.parse_args()
  config = load_config(flags.config)
  flags.batch_size = flags.batch_size or config.eval.batch_size
  jax.config.update('jax_enable_compilation_cache', False)
  started = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    result = compare(config, Path(folder), flags)
  print_figures(result)
  print(f'{time.perf_counter() - started:.0f} s in all')
  if flags.out:
    result = describe_machine() | {
      'config': config.name,
      'bucket': config.eval.bucket,
      'devices': runtime.describe_devices(),
      **result,
    }
    write_result(flags.out, 'evaluate', result)


if __name__ == '__main__':
  run(main)
