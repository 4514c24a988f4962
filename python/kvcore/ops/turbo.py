"""TurboAttention: FlashQ storage and int8 attention (arXiv 2412.08585).

Glossary: ``batch``; ``q_heads`` is a multiple of ``kv_heads``; ``head_dim`` is 64, 96, 128 or 256;
a page is 64 tokens of one sequence. The *store* of one layer is the tuple of tensors
``(pool, block_table, tail, seq_lens)`` described in ``csrc/turbo/README.md``; inputs are fp32,
fp16 or bf16 with any strides. Errors are ``RuntimeError``; their text is ``<op>: <argument> must be
<expected>, got <actual>``, and a rejected call changes nothing. On CPU tensors, values inside
index tensors are always checked; on devices ``check_values=True`` synchronises and checks. What an
op changes may share memory with no other argument. The error of an output that there is no
memory for names it; scratch memory that cannot be had is a ``MemoryError`` (torch 2.15 makes it a
``RuntimeError``). Neither changes anything. ``turbo_append`` and ``turbo_rewind`` do not move the
version counters of what they change, since torch's stable ABI has no call for that: who relies on
``Tensor._version`` calls ``torch.autograd.graph.increment_version``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_ops = torch.ops.kvcore


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
    """Int8 attention on float inputs (algorithm 1 of the paper), forward only.

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``, fp32, fp16 or bf16.
        k: ``[batch, kv_heads, kv_len, head_dim]``, dtype of q.
        v: shape and dtype of k.
        k_balance: fp32 ``[batch, kv_heads, head_dim]`` from :func:`turbo_calibrate`, or None.
        k_mean: fp32, likewise.
        cu_seqlens_q: int32 ``[num_seqs + 1]``; batch is 1 and sequences are packed along tokens.
        cu_seqlens_k: int32 ``[num_seqs + 1]``; given exactly when cu_seqlens_q is.
        causal: query i sees keys ``j <= i + kv_len - q_len`` (bottom-right alignment).
        scale: factor of the scores; None is ``head_dim ** -0.5``.
        window: with causal, a query sees only the last ``window`` keys up to its own.
        sas_threshold: scores this far below the running maximum count as zero (equation 14; the
            paper uses -6); None computes exact exponentials.
        check_values: on devices, synchronise and check the values of index tensors.

    Returns:
        ``out`` with shape and dtype of q, and ``lse`` fp32 ``[batch, q_heads, q_len]``, natural
        log.
        A row that attends no key gives 0 and -inf.
    """
    return _ops.turbo_attention(
        q,
        k,
        v,
        k_balance,
        k_mean,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        scale=scale,
        window=window,
        sas_threshold=sas_threshold,
        check_values=check_values,
    )


def turbo_calibrate(
    k: Tensor,
    left_padding: Tensor | None = None,
    *,
    balance: bool = True,
    subtract_mean: bool = True,
    rotary_dim: int = -1,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per-channel balance and mean of K, to be frozen with the store (not in the paper).

    One outlier channel would otherwise take the whole int8 range of its block.

    Args:
        k: ``[batch, kv_heads, kv_len, head_dim]``, after the rotary embedding.
        left_padding: int32 ``[batch]``, leading tokens of each sequence to leave out.
        balance: False returns ones.
        subtract_mean: False returns zeros.
        rotary_dim: channels ``c`` and ``c + rotary_dim / 2`` share a balance; -1 means head_dim, 0
            means no pairs.
        check_values: on devices, synchronise and check left_padding.

    Returns:
        ``k_balance`` and ``k_mean``, fp32 ``[batch, kv_heads, head_dim]``.
    """
    return _ops.turbo_calibrate(
        k,
        left_padding,
        balance=balance,
        subtract_mean=subtract_mean,
        rotary_dim=rotary_dim,
        check_values=check_values,
    )


def turbo_head_priority(
    x: Tensor, left_padding: Tensor | None = None, *, check_values: bool = False
) -> Tensor:
    """Sensitivity of each head to quantization, ``gap * std`` (equation 12 of the paper).

    ``gap`` is max - min over all channels and tokens, ``std`` the population standard deviation of
    the channels' own gaps. Heads with the lowest priority take the fewest bits; rank K and V apart.

    Args:
        x: ``[batch, heads, tokens, head_dim]``, K or V.
        left_padding: int32 ``[batch]``, leading tokens of each sequence to leave out.
        check_values: on devices, synchronise and check left_padding.

    Returns:
        fp32 ``[batch, heads]``; 0 for a sequence without tokens, NaN with a non-finite value.
    """
    return _ops.turbo_head_priority(x, left_padding, check_values=check_values)


def turbo_quantize(
    k: Tensor,
    v: Tensor,
    k_balance: Tensor | None = None,
    k_mean: Tensor | None = None,
    left_padding: Tensor | None = None,
    *,
    k_bits: Sequence[int] = (4,),
    v_bits: Sequence[int] = (4,),
    sink_pages: int = 1,
    tail_margin: float = 1.25,
    check_values: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize K and V into a new store of exactly the size needed (FlashQ, equations 4-11).

    Args:
        k: ``[batch, kv_heads, kv_len, head_dim]``, after the rotary embedding.
        v: shape and dtype of k.
        k_balance: fp32 ``[batch, kv_heads, head_dim]`` from :func:`turbo_calibrate`, or None.
        k_mean: fp32, likewise.
        left_padding: int32 ``[batch]``, leading tokens of each sequence that are not stored.
        k_bits: 8, 4 or 2; one for all kv heads or one for each.
        v_bits: likewise.
        sink_pages: leading pages kept at 8 bit.
        tail_margin: headroom of the scale of the int8 tail, at least 1.
        check_values: on devices, synchronise and check left_padding.

    Returns:
        ``pool8, pool4, pool2`` uint8 ``[blocks, block_bytes]``, of which the non-empty ones, in
        this order, form ``pool``; ``block_table`` int32 ``[batch, 2, kv_heads, pages]``; ``tail``
        uint8; ``tail_scale`` fp32 and ``clamp_count`` int64 ``[batch, 2, kv_heads]``; ``seq_lens``
        int32 ``[batch]``.
    """
    return _ops.turbo_quantize(
        k,
        v,
        k_balance,
        k_mean,
        left_padding,
        k_bits=k_bits,
        v_bits=v_bits,
        sink_pages=sink_pages,
        tail_margin=tail_margin,
        check_values=check_values,
    )


def turbo_append(
    k: Tensor,
    v: Tensor,
    pool: list[Tensor],
    block_table: Tensor,
    tail: Tensor,
    tail_scale: Tensor,
    clamp_count: Tensor,
    seq_lens: Tensor,
    k_balance: Tensor | None = None,
    k_mean: Tensor | None = None,
    left_padding: Tensor | None = None,
    *,
    tail_margin: float = 1.25,
    check_values: bool = False,
) -> None:
    """Append new tokens to a store in place; full pages are flushed to the pool.

    Cost does not depend on the tokens already stored. Values beyond the open tail block's scale
    are clamped and counted in ``clamp_count``.

    Args:
        k: ``[batch, kv_heads, num_new, head_dim]``.
        v: shape and dtype of k.
        pool: slabs, uint8 ``[blocks, block_bytes]`` each; changed.
        block_table: int32 ``[batch, 2, kv_heads, max_pages]``; must hold a distinct entry for every
            page that becomes full.
        tail: uint8 ``[batch, 2, kv_heads, 2, block_bytes]``; changed.
        tail_scale: fp32 ``[batch, 2, kv_heads]``; changed.
        clamp_count: int64 ``[batch, 2, kv_heads]``; changed.
        seq_lens: int32 ``[batch]``; changed.
        k_balance: the calibration the store was begun with, or None.
        k_mean: likewise.
        left_padding: int32 ``[batch]``, leading new tokens of each sequence that are not stored.
        tail_margin: headroom of the tail's scale, at least 1.
        check_values: on devices, synchronise and check the values of index tensors.
    """
    _ops.turbo_append(
        k,
        v,
        pool,
        block_table,
        tail,
        tail_scale,
        clamp_count,
        seq_lens,
        k_balance,
        k_mean,
        left_padding,
        tail_margin=tail_margin,
        check_values=check_values,
    )


def turbo_rewind(
    pool: list[Tensor],
    block_table: Tensor,
    tail: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor,
    *,
    check_values: bool = False,
) -> None:
    """Drop the newest tokens of each sequence in place.

    Up to 64 tokens the rewind is exact; a deeper one reopens its page from the stored codes.

    Args:
        pool: slabs of the store.
        block_table: int32 ``[batch, 2, kv_heads, max_pages]``.
        tail: uint8 ``[batch, 2, kv_heads, 2, block_bytes]``; changed.
        seq_lens: int32 ``[batch]``; changed.
        new_lens: int32 ``[batch]``, ``0 <= new_lens <= seq_lens``.
        check_values: on devices, synchronise and check the values of index tensors.
    """
    _ops.turbo_rewind(pool, block_table, tail, seq_lens, new_lens, check_values=check_values)


def turbo_dequantize(
    pool: list[Tensor],
    block_table: Tensor,
    tail: Tensor,
    seq_lens: Tensor,
    k_balance: Tensor | None = None,
    k_mean: Tensor | None = None,
    *,
    kv_len: int,
    right_align: bool = False,
    dtype: torch.dtype = torch.float32,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rebuild K and V from a store, for code that cannot attend over it.

    Args:
        pool: slabs of the store.
        block_table: int32 ``[batch, 2, kv_heads, max_pages]``.
        tail: uint8 ``[batch, 2, kv_heads, 2, block_bytes]``.
        seq_lens: int32 ``[batch]``.
        k_balance: the store's calibration, or None.
        k_mean: likewise.
        kv_len: tokens of the outputs, at least every sequence length; the rest is zero.
        right_align: end each sequence at ``kv_len`` (left padding) instead of starting it at 0.
        dtype: of the outputs: fp32, fp16 or bf16.
        check_values: on devices, synchronise and check the values of index tensors.

    Returns:
        ``k`` and ``v``, ``[batch, kv_heads, kv_len, head_dim]``.
    """
    return _ops.turbo_dequantize(
        pool,
        block_table,
        tail,
        seq_lens,
        k_balance,
        k_mean,
        kv_len=kv_len,
        right_align=right_align,
        dtype=dtype,
        check_values=check_values,
    )


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
    """Attention of new queries over a store (algorithm 3 of the paper), forward only.

    K and V are never rebuilt in memory. Any ``q_len`` works, so multi-turn and chunked prefill read
    the store as well.

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``, fp32, fp16 or bf16.
        pool: slabs of the store.
        block_table: int32 ``[batch, 2, kv_heads, max_pages]``.
        tail: uint8 ``[batch, 2, kv_heads, 2, block_bytes]``.
        seq_lens: int32 ``[batch]``, already counting the q_len newest tokens.
        k_balance: the store's calibration, or None.
        k_mean: likewise.
        causal: query i sees keys ``j <= i + seq_len - q_len`` (bottom-right alignment).
        scale: factor of the scores; None is ``head_dim ** -0.5``.
        window: with causal, a query sees only the last ``window`` keys up to its own.
        sas_threshold: see :func:`turbo_attention`.
        check_values: on devices, synchronise and check the values of index tensors.

    Returns:
        ``out`` with shape and dtype of q, and ``lse`` fp32 ``[batch, q_heads, q_len]``, natural
        log.
    """
    return _ops.turbo_decode(
        q,
        pool,
        block_table,
        tail,
        seq_lens,
        k_balance,
        k_mean,
        causal=causal,
        scale=scale,
        window=window,
        sas_threshold=sas_threshold,
        check_values=check_values,
    )
