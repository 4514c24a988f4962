"""Exact attention with a backward, for CPUs.

On other devices ``torch.nn.functional.scaled_dot_product_attention`` is the op to use; these raise.
Errors are ``RuntimeError``; their text is ``<op>: <argument> must be <expected>, got <actual>``.
Scratch memory that cannot be had is a ``MemoryError``.
"""

import torch
from torch import Tensor

_ops = torch.ops.kvcore


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention by tiles (FlashAttention-2, arXiv 2307.08691); differentiable.

    Nothing of size ``q_len * kv_len`` is kept. The softmax is fp32. Products of bf16 inputs take
    bf16 operands where the CPU has instructions for them (AVX-512 BF16, AMX) and fp32 ones
    elsewhere, those of fp16 and fp32 inputs fp32 ones; sums are fp32. Results are the same bits
    with any number of threads. A NaN or an infinity reaches the queries that see it, and the
    gradients that these reach, and nothing else.

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``, fp32, fp16 or bf16, any strides; head_dim is a
            multiple of 16, at most 256.
        k: ``[batch, kv_heads, kv_len, head_dim]`` in the dtype of q, any strides; kv_heads divides
            q_heads.
        v: shape and dtype of k, any strides.
        causal: query i sees keys ``j <= i + kv_len - q_len`` (bottom-right alignment).
        scale: factor of the scores; None is ``head_dim ** -0.5``.

    Returns:
        ``out`` with the shape and dtype of q, ``[batch, q_len, q_heads, head_dim]`` in memory, and
        ``lse`` fp32 ``[batch, q_heads, q_len]``, natural log, for :func:`kvcore.merge_attention`. A
        query that sees no key gives 0 and -inf.
    """
    return _ops.dense_attention(q, k, v, causal=causal, scale=scale)


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
    """Derivative of :func:`dense_attention`, which calls it through autograd.

    Args:
        d_out: shape and dtype of q, any strides.
        q, k, v: as given to the forward.
        out, lse: as it returned them.
        d_lse: fp32, shape of lse, contiguous; None is zeros.
        causal, scale: as given to it.

    Returns:
        Gradients of q, k and v in their shapes and dtype; heads of a token are next to each other
        in memory.
    """
    return _ops.dense_attention_backward(
        d_out, q, k, v, out, lse, d_lse, causal=causal, scale=scale
    )
