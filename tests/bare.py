"""A machine on which little is installed."""

# Not there beside jax, flax, optax, NumPy and matplotlib.
ABSENT = (
  'array_record',
  'cv2',
  'grain',
  'ml_collections',
  'tensorboardX',
  'tensorflow_datasets',
)


def on_a_bare_machine(script: str) -> tuple[str, str]:
  """Arguments of Python that run a script as if those were not installed."""
  block = f'sys.modules.update(dict.fromkeys({ABSENT!r}))'
  return (
    '-c',
    f'import runpy, sys; {block}; '
    f'runpy.run_path({script!r}, run_name="__main__")',
  )
