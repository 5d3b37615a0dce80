"""The losses in PyTorch and float64, as their papers write them.

Each upsamples logits (B, h, w, classes) and goes over labelled pixels.
"""

import torch
from torch.nn import functional as F

IGNORE = 255


def valid_pixels(logits, labels):
  """Logits (pixels, classes), labels (pixels,) and the pixels' images."""
  logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
  maps = logits.permute(0, 3, 1, 2)
  maps = F.interpolate(maps, labels.shape[1:], mode='bilinear')
  valid = labels != IGNORE
  return maps.permute(0, 2, 3, 1)[valid], labels[valid], valid.nonzero()[:, 0]


def accuracy(logits, labels):
  z, y, _ = valid_pixels(logits, labels)
  return (z.argmax(-1) == y).double().mean().item()


def cross_entropy(
  logits, labels, of_valid=False, weights=(1.0,) * 4, smoothing=0.0, keep=...
):
  z, y, _ = valid_pixels(logits, labels)
  weights = torch.tensor(weights).to(z)
  losses = F.cross_entropy(z, y, weights, None, -100, None, 'none', smoothing)
  ignored = 0 if of_valid else labels.size - len(y)
  return losses[keep].sum() / (weights[y].sum() + ignored)


def ohem(logits, labels, threshold, min_kept):
  """Mmsegmentation's rule, with a sort."""
  z, y, _ = valid_pixels(logits, labels)
  right = z.softmax(-1)[torch.arange(len(y)), y]
  wanted = min_kept * len(labels)
  if threshold is None:
    keep = right.argsort()[:wanted]
  else:
    least = right.sort().values[min(wanted, len(y) - 1)]
    keep = right < max(least, threshold)
  return cross_entropy(logits, labels, keep=keep)


def focal(logits, labels, gamma, alpha, activation):
  z, y, _ = valid_pixels(logits, labels)
  hot = F.one_hot(y, z.shape[-1]).to(z)
  if activation == 'softmax':
    p, share = (z.softmax(-1) * hot).sum(-1), 1
  else:
    p = (z * (2 * hot - 1)).sigmoid()
    share = (alpha * hot + (1 - alpha) * (1 - hot)) / z.shape[-1]
  return -(share * (1 - p) ** gamma * p.log()).sum() / labels.size


def dice(logits, labels):
  z, y, _ = valid_pixels(logits, labels)
  p, hot = z.softmax(-1), F.one_hot(y, z.shape[-1])
  losses = 1 - 2 * (p * hot).sum(0) / (p + hot).sum(0)
  return losses[y.unique()].mean()


def lovasz_of_pixels(z, y):
  """Algorithm 1 of the paper, averaged over the classes present."""
  losses = []
  for c in y.unique():
    right = (y == c).to(z)
    errors, order = (right - z.softmax(-1)[:, c]).abs().sort(descending=True)
    right = right[order]
    intersection = right.sum() - right.cumsum(0)
    jaccard = 1 - intersection / (right.sum() + (1 - right).cumsum(0))
    losses.append(errors @ jaccard.diff(prepend=z.new_zeros(1)))
  return sum(losses) / max(len(losses), 1)


def lovasz(logits, labels, per_image=False):
  z, y, image = valid_pixels(logits, labels)
  groups = [image == i for i in range(len(labels))] if per_image else [...]
  return sum(lovasz_of_pixels(z[x], y[x]) for x in groups) / len(groups)
