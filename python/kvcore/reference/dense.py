"""Exact attention and its derivative, with all scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Every head as often as query heads share it."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _visible(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    q_len, kv_len = q.shape[2], k.shape[2]
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    return seen.tril(kv_len - q_len) if causal else seen


def _sum_over(shown: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """``weights @ rows`` of what is shown: 0 * NaN is NaN, but what is hidden adds nothing."""
    finite = rows.isfinite()
    if finite.all():
        return weights @ rows
    total = weights @ rows.where(finite, 0)
    terms = weights[..., None] * rows.unsqueeze(-3).where(~finite.unsqueeze(-3), 0)
    return total + terms.where(shown[..., None], 0).sum(-2)


def _dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`kvcore.dense_attention`; fp64 throughout for fp64 inputs."""
    dtype, heads = _dtype(q), q.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    keys, values = (_grouped(x.to(dtype), heads) for x in (k, v))
    shown = _visible(q, k, causal)
    scores = (q.to(dtype) @ keys.transpose(2, 3) * scale).masked_fill(~shown, -torch.inf)
    lse = scores.logsumexp(-1)
    # A query with an infinite score has no weights; one without keys has lse -inf and weights 0.
    lse = lse.masked_fill(lse == torch.inf, torch.nan)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    weights = weights.masked_fill(~shown, 0)
    return _sum_over(shown, weights, values).to(q.dtype), lse


def dense_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of :func:`kvcore.dense_attention_backward`: the equations of its README."""
    dtype, (batch, heads) = _dtype(q), q.shape[:2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    queries, d = q.to(dtype), d_out.to(dtype)
    keys, values = (_grouped(x.to(dtype), heads) for x in (k, v))
    shown = _visible(q, k, causal)
    lse = lse.to(dtype).masked_fill(lse == -torch.inf, 0)
    weights = (queries @ keys.transpose(2, 3) * scale - lse[..., None]).exp()
    weights = weights.masked_fill(~shown, 0)
    subtracted = (d * out.to(dtype)).sum(-1) - (0 if d_lse is None else d_lse.to(dtype))
    d_scores = weights * (d @ values.transpose(2, 3) - subtracted[..., None])
    d_scores = d_scores.masked_fill(~shown, 0)
    dq = _sum_over(shown, d_scores, keys) * scale

    def over_group(w: Tensor, rows: Tensor) -> Tensor:
        total = _sum_over(shown.T, w.transpose(2, 3), rows)
        return total.reshape(batch, k.shape[1], -1, *k.shape[2:]).sum(2)

    dk, dv = over_group(d_scores, queries) * scale, over_group(weights, d)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
