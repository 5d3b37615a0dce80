"""The losses in NumPy and float64, as their papers write them.

Each takes logits (B, h, w, classes) and labels (B, H, W), upsamples the logits
to the labels' size and goes over pixels that have a label.
"""

import numpy as np

IGNORE = 255


def upsample(x, length, axis):
  """Bilinear, align_corners False, along one axis."""
  given = x.shape[axis]
  position = np.clip((np.arange(length) + 0.5) * given / length - 0.5, 0, None)
  low = np.minimum(position.astype(int), given - 1)
  high = np.minimum(low + 1, given - 1)
  shape = [1] * x.ndim
  shape[axis] = length
  weight = (position - low).reshape(shape)
  return x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight


def valid_pixels(logits, labels):
  """Logits (pixels, classes), labels (pixels,) and the pixels' images."""
  logits = upsample(upsample(logits, labels.shape[1], 1), labels.shape[2], 2)
  valid = labels != IGNORE
  return logits[valid], labels[valid], np.nonzero(valid)[0]


def log_softmax(z):
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def pixel_losses(z, y, class_weights=None, label_smoothing=0.0):
  """Cross entropy with the target as a distribution, times class weights."""
  classes = z.shape[-1]
  target = (1 - label_smoothing) * np.eye(classes)[
    y
  ] + label_smoothing / classes
  weights = 1 if class_weights is None else np.asarray(class_weights)
  return -(target * weights * log_softmax(z)).sum(-1)


def cross_entropy(
  logits,
  labels,
  avg_non_ignore=False,
  class_weights=None,
  label_smoothing=0.0,
  keep=slice(None),
):
  z, y, _ = valid_pixels(logits, labels)
  losses = pixel_losses(z, y, class_weights, label_smoothing)[keep]
  mass = len(y) if class_weights is None else np.asarray(class_weights)[y].sum()
  if not avg_non_ignore:
    mass += labels.size - len(y)
  return losses.sum() / (mass or 1)


def ohem(logits, labels, threshold, min_kept, at):
  """Mmsegmentation's rule, with a sort; pixels are chosen by logits `at`."""
  z, y, _ = valid_pixels(at, labels)
  wanted = min_kept * len(labels)
  if not len(y):
    return 0.0
  if threshold is None:
    keep = np.argsort(-pixel_losses(z, y))[:wanted]
  else:
    right = np.exp(log_softmax(z))[np.arange(len(y)), y]
    least = np.sort(right)[min(wanted, len(y) - 1)]
    keep = right < max(least, threshold)
  return cross_entropy(logits, labels, keep=keep)


def focal(logits, labels, gamma, alpha, activation):
  z, y, _ = valid_pixels(logits, labels)
  hot = np.eye(z.shape[-1])[y]
  if activation == 'softmax':
    p = np.exp(log_softmax(z))[np.arange(len(y)), y]
    return (-((1 - p) ** gamma) * np.log(p)).sum() / labels.size
  p = 1 / (1 + np.exp(-z))
  p_right = np.where(hot == 1, p, 1 - p)
  share = np.where(hot == 1, alpha, 1 - alpha)
  losses = -share * (1 - p_right) ** gamma * np.log(p_right)
  return losses.mean(-1).sum() / labels.size


def dice(logits, labels):
  z, y, _ = valid_pixels(logits, labels)
  p = np.exp(log_softmax(z))
  losses = []
  for c in np.unique(y):
    right = y == c
    both = p[right, c].sum()
    losses.append(1 - 2 * both / (p[:, c].sum() + right.sum()))
  return np.mean(losses) if losses else 0.0


def lovasz_of_pixels(z, y):
  """Algorithm 1 of the paper, averaged over the classes present."""
  p = np.exp(log_softmax(z))
  losses = []
  for c in np.unique(y):
    right = y == c
    errors = np.where(right, 1 - p[:, c], p[:, c])
    order = np.argsort(-errors, kind='stable')
    right = right[order]
    intersection = right.sum() - np.cumsum(right)
    union = right.sum() + np.cumsum(~right)
    jaccard = 1 - intersection / union
    losses.append(errors[order] @ np.diff(jaccard, prepend=0))
  return np.mean(losses) if losses else 0.0


def lovasz(logits, labels, per_image=False):
  z, y, image = valid_pixels(logits, labels)
  if not per_image:
    return lovasz_of_pixels(z, y)
  each = [
    lovasz_of_pixels(z[image == i], y[image == i]) for i in range(len(labels))
  ]
  return np.mean(each)
