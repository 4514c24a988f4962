"""Figures from log-probabilities: bits per byte, KL, agreement, accuracy, and their intervals."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
_Z95 = 1.959964


def _t_quantile(df: int) -> float:
    if df <= len(_T95):
        return _T95[df - 1]
    # Cornish-Fisher expansion of t around the normal quantile, to the third order in 1 / df.
    z = _Z95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / df + second / df**2 + third / df**3


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with the half width of its 95 % confidence interval, both in the unit of the samples.

    ``half_width`` is NaN for fewer than two samples.
    """

    mean: float
    half_width: float
    samples: int

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    def __format__(self, spec: str) -> str:
        if math.isnan(self.half_width):
            return format(self.mean, spec)
        # A half width has no sign, whatever the mean is shown with.
        return f"{format(self.mean, spec)} ± {format(self.half_width, spec.replace('+', ''))}"


def mean_interval(samples: Tensor) -> Interval:
    """Mean and 95 % t interval of independent samples ``[n]`` (one per sequence, not per token)."""
    samples = samples.double().flatten()
    n = samples.numel()
    if n == 0:
        raise ValueError("samples must not be empty")
    mean = samples.mean().item()
    if n == 1:
        return Interval(mean, math.nan, 1)
    half = _t_quantile(n - 1) * samples.std().item() / math.sqrt(n)
    return Interval(mean, half, n)


def paired_ratio_interval(samples: Tensor, reference: Tensor) -> Interval:
    """Relative change ``sum(samples) / sum(reference) - 1`` with its 95 % interval.

    Both are ``[n]``, and sample i of either comes from the same tokens: what makes sequence i hard
    cancels, so that small changes show. The interval linearises the ratio (delta method).
    """
    samples, reference = samples.double().flatten(), reference.double().flatten()
    if samples.shape != reference.shape:
        raise ValueError(
            f"samples must have the shape of reference, {list(reference.shape)}, "
            f"got {list(samples.shape)}"
        )
    ratio = (samples.mean() / reference.mean()).item()
    residual = mean_interval((samples - ratio * reference) / reference.mean())
    return Interval(ratio - 1, residual.half_width, residual.samples)


def _check_scores(log_probs: Tensor, targets: Tensor) -> None:
    if log_probs.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have shape {list(log_probs.shape[:-1])}, got {list(targets.shape)}"
        )


def bits_per_byte(log_probs: Tensor, targets: Tensor, num_bytes: Tensor | None = None) -> Tensor:
    """Bits per byte of each sequence, fp64 ``[batch]``.

    Args:
        log_probs: ``[batch, steps, vocab]``, natural log, from `stepwise_scores`.
        targets: ``[batch, steps]`` token ids.
        num_bytes: ``[batch]`` bytes of text the targets stand for; None: one byte per token.
    """
    _check_scores(log_probs, targets)
    nats = -log_probs.gather(-1, targets[..., None]).double().sum((-2, -1))
    total = targets.shape[1] if num_bytes is None else num_bytes.double()
    return nats / math.log(2) / total


def kl_divergence(reference: Tensor, log_probs: Tensor) -> Tensor:
    """``KL(reference || log_probs)`` of each position in nats, fp64 ``[batch, steps]``."""
    if reference.shape != log_probs.shape:
        raise ValueError(
            f"log_probs must have the shape of reference, {list(reference.shape)}, "
            f"got {list(log_probs.shape)}"
        )
    rows = []
    for p, q in zip(
        reference, log_probs, strict=True
    ):  # fp64 copies of a whole batch are too large
        p, q = p.double(), q.double()
        # 0 * (-inf - -inf) is 0 here; any other NaN must show.
        rows.append((p.exp() * (p - q)).masked_fill(p.isneginf(), 0).sum(-1))
    return torch.stack(rows)


def agreement(reference: Tensor, log_probs: Tensor) -> Tensor:
    """Share of each sequence's positions whose most likely token is the same, fp64 ``[batch]``."""
    return (reference.argmax(-1) == log_probs.argmax(-1)).double().mean(-1)


def accuracy(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Share of each sequence's targets that are the most likely token, fp64 ``[batch]``."""
    _check_scores(log_probs, targets)
    return (log_probs.argmax(-1) == targets).double().mean(-1)


def _ranks(values: Tensor) -> Tensor:
    """From 1 up; equal values share the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two samples ``[n]``, in [-1, 1]; NaN if all values of one are equal."""
    one, other = (_ranks(x) - (x.numel() + 1) / 2 for x in (one, other))
    return (one @ other / (one.norm() * other.norm())).item()
