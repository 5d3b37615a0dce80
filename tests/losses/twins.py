"""The losses in NumPy and float64, as their papers write them.

Each takes logits (B, h, w, classes) and labels (B, H, W), upsamples the logits
to the labels' size and goes over pixels that have a label.
"""

import numpy as np
import torch
from scipy.special import expit, log_softmax, softmax
from torch.nn import functional as F

IGNORE = 255


def valid_pixels(logits, labels):
  """Logits (pixels, classes), labels (pixels,) and the pixels' images."""
  logits = torch.tensor(logits.transpose(0, 3, 1, 2))
  logits = F.interpolate(logits, labels.shape[1:], mode='bilinear')
  valid = labels != IGNORE
  logits = logits.numpy().transpose(0, 2, 3, 1)[valid]
  return logits, labels[valid], np.nonzero(valid)[0]


def pixel_losses(z, y, weights=None, smoothing=0.0):
  """Cross entropy with the target as a distribution, times class weights."""
  classes = z.shape[-1]
  target = np.eye(classes)[y] * (1 - smoothing) + smoothing / classes
  weights = 1 if weights is None else np.asarray(weights)
  return -(target * weights * log_softmax(z, -1)).sum(-1)


def cross_entropy(
  logits, labels, of_valid=False, weights=None, smoothing=0.0, keep=slice(None)
):
  z, y, _ = valid_pixels(logits, labels)
  losses = pixel_losses(z, y, weights, smoothing)[keep]
  mass = len(y) if weights is None else np.asarray(weights)[y].sum()
  if not of_valid:
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
    right = softmax(z, -1)[np.arange(len(y)), y]
    least = np.sort(right)[min(wanted, len(y) - 1)]
    keep = right < max(least, threshold)
  return cross_entropy(logits, labels, keep=keep)


def focal(logits, labels, gamma, alpha, activation):
  z, y, _ = valid_pixels(logits, labels)
  if activation == 'softmax':
    p = softmax(z, -1)[np.arange(len(y)), y]
    return (-((1 - p) ** gamma) * np.log(p)).sum() / labels.size
  hot = np.eye(z.shape[-1], dtype=bool)[y]
  p = np.where(hot, expit(z), expit(-z))
  losses = -np.where(hot, alpha, 1 - alpha) * (1 - p) ** gamma * np.log(p)
  return losses.mean(-1).sum() / labels.size


def dice(logits, labels):
  z, y, _ = valid_pixels(logits, labels)
  p = softmax(z, -1)
  losses = []
  for c in np.unique(y):
    right = y == c
    both = p[right, c].sum()
    losses.append(1 - 2 * both / (p[:, c].sum() + right.sum()))
  return np.mean(losses) if losses else 0.0


def lovasz_of_pixels(z, y):
  """Algorithm 1 of the paper, averaged over the classes present."""
  p = softmax(z, -1)
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
  groups = [image == i for i in range(len(labels))] if per_image else [y == y]
  return np.mean([lovasz_of_pixels(z[group], y[group]) for group in groups])
