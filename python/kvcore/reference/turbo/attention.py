"""Attention over stage-1 codes: the page loop shared by prefill and decode."""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcore.reference.attention import visible_keys
from kvcore.reference.turbo.blocks import CODE_MAX, MIN_SCALE, PAGE_TOKENS, stage1
from kvcore.reference.turbo.calibrate import calibrated
from kvcore.reference.turbo.store import read_store

# 2^-f on [0, 1], fitted with the value at 0 fixed to 1: relative error 9e-5.
EXP2_POLY = (1.0, -0.691588, 0.231159, -0.039616)
# Probabilities of a page whose largest is smaller get no codes: 119 / p_max would overflow.
MIN_P_MAX = 2.0**-121


def sas(x: Tensor, threshold: float | None) -> Tensor:
    """``exp(x)`` for x <= 0 by table and polynomial (equations 13-15), 0 below threshold.

    None computes the exponential itself.
    """
    if threshold is None:
        return x.exp()
    exponent = -x * math.log2(math.e)
    whole = exponent.floor()
    f = exponent - whole
    c0, c1, c2, c3 = EXP2_POLY
    value = torch.exp2(-whole) * (((c3 * f + c2) * f + c1) * f + c0)
    return torch.where(x < threshold, 0, value)


def turbo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_balance: Tensor | None = None,
    k_mean: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    sas_threshold: float | None = -15.0,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvcore.turbo_attention`."""
    scalars = {
        "causal": causal,
        "scale": scale,
        "window": window,
        "sas_threshold": sas_threshold,
    }
    if cu_seqlens_q is not None:
        parts = [
            turbo_attention(
                q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], k_balance, k_mean, **scalars
            )
            for (q0, q1), (k0, k1) in zip(
                pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
            )
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    kv_lens = torch.full((k.shape[0],), k.shape[2])
    x = torch.stack([calibrated(k, k_balance, k_mean), v.float()], 1)
    # Zeros appended to the last page change neither its scale nor its codes.
    num_pages = -(-k.shape[2] // PAGE_TOKENS)
    x = F.pad(x, (0, 0, 0, num_pages * PAGE_TOKENS - k.shape[2]))
    codes, code_scale = stage1(x.unflatten(3, (num_pages, PAGE_TOKENS)))
    return _attend(q, codes, code_scale, kv_lens, k_balance, k_mean, **scalars)


def turbo_decode(
    q: Tensor,
    pool: list[Tensor],
    block_table: Tensor,
    tail: Tensor,
    seq_lens: Tensor,
    k_balance: Tensor | None = None,
    k_mean: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sas_threshold: float | None = -15.0,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvcore.turbo_decode`."""
    codes, code_scale = read_store(pool, block_table, tail, seq_lens)
    return _attend(
        q,
        codes,
        code_scale,
        seq_lens,
        k_balance,
        k_mean,
        causal=causal,
        scale=scale,
        window=window,
        sas_threshold=sas_threshold,
    )


def _attend(
    q: Tensor,
    codes: Tensor,
    code_scale: Tensor,
    kv_lens: Tensor,
    k_balance: Tensor | None,
    k_mean: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    sas_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    """Online softmax over pages of codes (algorithms 1 and 3 with the exact rescale).

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``.
        codes: int32 ``[batch, 2, kv_heads, pages, 64, head_dim]``, K and V.
        code_scale: fp32 ``[batch, 2, kv_heads, pages]``.
        kv_lens: ``[batch]``, keys of each sequence.
        k_balance, k_mean: fp32 ``[batch, kv_heads, head_dim]`` or None.
        causal, scale, window, sas_threshold: see :func:`kvcore.turbo_decode`.

    Returns:
        ``out`` with shape and dtype of q, and ``lse`` fp32 ``[batch, q_heads, q_len]``.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads = codes.shape[2]
    if q_heads % kv_heads:
        raise ValueError(f"q: q_heads must be a multiple of {kv_heads}, got {q_heads}")
    group = q_heads // kv_heads
    scale = head_dim**-0.5 if scale is None else scale

    # Rows of one kv head: all its query heads, so that they share each page.
    rows = q.float().reshape(batch, kv_heads, group * q_len, head_dim)
    scaled = rows if k_balance is None else rows * k_balance.unsqueeze(2)
    # Whatever a non-finite query is stored as here, its row becomes NaN at the end.
    bad_query = ~scaled.isfinite().all(-1)
    scaled = scaled.masked_fill(bad_query.unsqueeze(-1), 0)
    s_q = (scaled.abs().amax(-1, keepdim=True) / CODE_MAX).clamp_min(MIN_SCALE)
    q8 = (scaled / s_q).round()

    m = torch.full((batch, kv_heads, group * q_len, 1), -torch.inf)
    total = torch.zeros_like(m)
    o = torch.zeros_like(rows)
    poisoned = torch.zeros_like(m, dtype=torch.bool)
    for page in range(codes.shape[3]):
        keys = torch.arange(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
        visible = visible_keys(q_len, kv_lens, keys, causal=causal, window=window)
        visible = visible.repeat(1, group, 1).unsqueeze(1)
        # Products of codes are integers below 2^24: fp32 matrix products of them are exact.
        k8, v8 = codes[:, :, :, page].float().unbind(1)
        s_k, s_v = code_scale[:, :, :, page, None, None].unbind(1)
        poisoned |= visible.any(-1, keepdim=True) & (
            s_k.isnan() | s_v.isnan() | bad_query.unsqueeze(-1)
        )
        s = s_q * scale * s_k.nan_to_num(0) * (q8 @ k8.transpose(2, 3))
        s = s.masked_fill(~visible, -torch.inf)

        new_m = torch.maximum(m, s.amax(-1, keepdim=True))
        # While a row has seen no key its maximum is -inf, and -inf - -inf would be NaN.
        base = new_m.masked_fill(new_m == -torch.inf, 0)
        p = sas(s - base, sas_threshold).masked_fill(~visible, 0)
        p_max = p.amax(-1, keepdim=True)
        p8 = torch.where(p_max >= MIN_P_MAX, p * (CODE_MAX / p_max), 0).round()
        decay = (m - base).exp()
        total = decay * total + p.sum(-1, keepdim=True)
        o = decay * o + p_max / CODE_MAX * s_v.nan_to_num(0) * (p8 @ v8)
        m = new_m

    out = torch.where(total > 0, o / total, 0)
    lse = m + total.log()
    if k_mean is not None:
        lse = lse + scale * (rows * k_mean.unsqueeze(2)).sum(-1, keepdim=True)
    lse = torch.where(total > 0, lse, -torch.inf).masked_fill(poisoned, torch.nan)
    out = out.masked_fill(poisoned, torch.nan)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])
