"""ResNeSt semantic segmentation in JAX."""

import importlib

__version__ = '0.1.0'

# Public name -> module, imported on first use: `import resnest_jax` is quick.
_EXPORTS = {
  'ClassPrediction': 'inference.predictions',
  'ClassPredictor': 'inference.predictor',
  'Evaluator': 'evaluation.evaluate',
  'Prediction': 'inference.predictions',
  'Predictor': 'inference.predictor',
  'UserError': 'errors',
  'create_backbone': 'models.segmentor',
  'create_classifier': 'models.classifier',
  'create_loss': 'losses.objective',
  'create_segmentor': 'models.segmentor',
  'create_state': 'checkpoints.state',
  'create_training': 'training.step',
  'export_state_dict': 'weights.state_dict',
  'from_checkpoint': 'inference.predictor',
  'import_state_dict': 'weights.state_dict',
  'load_backbone': 'weights.backbone',
  'load_checkpoint': 'checkpoints.store',
  'load_config': 'config',
  'load_pretrained': 'weights.pretrained',
  'make_mesh': 'sharding',
  'open_splits': 'data.datasets',
  'set_up': 'runtime',
  'start_variables': 'weights.start',
  'training_batches': 'data.pipeline',
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
  if name not in _EXPORTS:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_EXPORTS[name]}')
  return getattr(module, name)


def __dir__():
  return [*globals(), *_EXPORTS]
