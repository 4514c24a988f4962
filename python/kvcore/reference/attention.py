"""Softmax attention without approximation."""

from itertools import pairwise

import torch
from torch import Tensor


def visible_keys(
    q_len: int, kv_lens: Tensor, keys: Tensor, *, causal: bool, window: int | None
) -> Tensor:
    """Which keys each query attends, with bottom-right causal alignment.

    Args:
        q_len: queries of each sequence, the last of which is aligned with its last key.
        kv_lens: ``[batch]``, keys of each sequence.
        keys: ``[num_keys]``, the positions asked for; those at or past kv_lens are not attended.
        causal: query i sees keys ``j <= i + kv_len - q_len``.
        window: with causal, also ``j > i + kv_len - q_len - window``; None sees all.

    Returns:
        bool ``[batch, q_len, num_keys]``.
    """
    lens = kv_lens.view(-1, 1, 1)
    visible = (keys < lens).expand(-1, q_len, -1)
    if causal:
        own = torch.arange(q_len).view(-1, 1) + lens - q_len
        visible = visible & (keys <= own)
        if window is not None:
            visible = visible & (keys > own - window)
    return visible


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_lens: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped heads, in fp32 or fp64 throughout.

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``.
        k: ``[batch, kv_heads, kv_len, head_dim]``; kv_heads divides q_heads.
        v: shape of k.
        cu_seqlens_q: ``[num_seqs + 1]``, from 0 to q_len; batch is 1, sequences are packed.
        cu_seqlens_k: ``[num_seqs + 1]``, from 0 to kv_len; given exactly when cu_seqlens_q is.
        kv_lens: ``[batch]``, the leading keys of each sequence that exist; None means all.
        causal: query i sees keys ``j <= i + kv_len - q_len`` (bottom-right alignment).
        scale: factor of the scores; None is ``head_dim ** -0.5``.
        window: with causal, a query sees only the last ``window`` keys up to its own.
        dtype: of the arithmetic and the outputs.

    Returns:
        ``out`` with the shape of q, and ``lse`` ``[batch, q_heads, q_len]``, natural log. A row
        that attends no key gives 0 and -inf.
    """
    scalars = {"causal": causal, "scale": scale, "window": window, "dtype": dtype}
    if cu_seqlens_q is not None:
        parts = [
            exact_attention(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], **scalars)
            for (q0, q1), (k0, k1) in zip(
                pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
            )
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if kv_lens is None:
        kv_lens = torch.full((batch,), kv_len)
    scale = head_dim**-0.5 if scale is None else scale
    k = k.to(dtype).repeat_interleave(q_heads // kv_heads, 1)
    v = v.to(dtype).repeat_interleave(q_heads // kv_heads, 1)
    visible = visible_keys(q_len, kv_lens, torch.arange(kv_len), causal=causal, window=window)
    visible = visible.unsqueeze(1)
    scores = (q.to(dtype) @ k.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    # A row without keys has lse -inf; -inf - -inf would make its weights NaN instead of zero.
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    # 0 * NaN is NaN: keys that a row does not attend must not reach its sum.
    if not v.isfinite().all():
        bad = (~v.isfinite()).any(-1)
        poisoned = (visible & bad.unsqueeze(2)).any(-1, keepdim=True)
        return (weights @ v.nan_to_num(0, 0, 0)).masked_fill(poisoned, torch.nan), lse
    return weights @ v, lse
