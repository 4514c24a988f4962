"""Attention over a store of codes: exact attention over the vectors that the codes stand for."""

import torch
from torch import Tensor

from kvcore.reference.attention import exact_attention
from kvcore.reference.lexico.codes import lexico_reconstruct
from kvcore.reference.lexico.store import (
    BLOCK_TOKENS,
    lexico_unpack,
    lexico_unseal,
    tail_sparsity,
)


def reconstruct_store(
    k_blocks: list[Tensor],
    v_blocks: list[Tensor],
    k_tail: Tensor,
    v_tail: Tensor,
    k_dictionary: Tensor,
    v_dictionary: Tensor,
    *,
    tail_len: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """K and V ``[batch, kv_heads, tokens, head_dim]`` of blocks and of ``tail_len`` tail tokens."""
    parts = []
    for k_block, v_block in zip(k_blocks, v_blocks, strict=True):
        tails = lexico_unseal(
            k_block,
            v_block,
            k_sparsity=tail_sparsity(k_tail),
            v_sparsity=tail_sparsity(v_tail),
            v_atoms=len(v_dictionary),
        )
        parts.append([lexico_unpack(tail, kv_len=BLOCK_TOKENS) for tail in tails])
    parts.append([lexico_unpack(tail, kv_len=tail_len) for tail in (k_tail, v_tail)])
    dictionaries = (k_dictionary, v_dictionary)
    k, v = (
        torch.cat([lexico_reconstruct(*part[i], dictionaries[i], dtype=dtype) for part in parts], 2)
        for i in range(2)
    )
    return k, v


def lexico_attention(
    q: Tensor,
    k_blocks: list[Tensor],
    v_blocks: list[Tensor],
    k_tail: Tensor,
    v_tail: Tensor,
    tail_lens: Tensor,
    k_dictionary: Tensor,
    v_dictionary: Tensor,
    k_buffer: Tensor | None = None,
    v_buffer: Tensor | None = None,
    buffer_lens: Tensor | None = None,
    left_padding: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rebuilds every sequence's K and V and attends to them, in fp64."""
    outs, lses = [], []
    for b, tail_len in enumerate(tail_lens.tolist()):
        row = slice(b, b + 1)
        k, v = reconstruct_store(
            [block[row] for block in k_blocks],
            [block[row] for block in v_blocks],
            k_tail[row],
            v_tail[row],
            k_dictionary,
            v_dictionary,
            tail_len=tail_len,
            dtype=torch.float64,
        )
        if k_buffer is not None:
            buffer_len = k_buffer.shape[2] if buffer_lens is None else int(buffer_lens[b])
            k = torch.cat([k, k_buffer[row, :, :buffer_len].double()], 2)
            v = torch.cat([v, v_buffer[row, :, :buffer_len].double()], 2)
        # A query's position counts from the end, so that leading keys may be left out.
        padding = 0 if left_padding is None else int(left_padding[b])
        out, lse = exact_attention(
            _finite_or_nan(q[row]),
            _finite_or_nan(k[:, :, padding:]),
            v[:, :, padding:],
            causal=causal,
            scale=scale,
            window=window,
            dtype=torch.float64,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    return torch.cat(outs).to(q.dtype), torch.cat(lses).float()


def _finite_or_nan(x: Tensor) -> Tensor:
    """NaN in the place of vectors that are not finite: a score of -inf would pass for a hidden
    key's."""
    return x.where(x.isfinite().all(-1, keepdim=True), torch.nan)
