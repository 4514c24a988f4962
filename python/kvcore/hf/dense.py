"""When exact attention runs in kvcore: where it was measured to be faster than torch's."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvcore.cache.tensors import under_autocast
from kvcore.ops import dense_attention

# Levels of csrc/core/cpu/isa.h at which it was measured, on Zen 4.
_LEVELS = {"avx2", "avx512", "avx512_vnni", "avx512_bf16"}
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 16, 256
# From so many on, also where keys are many more: with one tile of 64 queries, what is prepared of
# the keys takes as long as the rest.
MIN_QUERIES = 128


@functools.cache
def fast_dtypes() -> frozenset[torch.dtype]:
    """Dtypes of q, k and v that kvcore's kernels are faster with on this CPU.

    torch has kernels of its own for AMX, so bf16 and fp16 are left to it where that exists.
    """
    try:
        from kvcore import _C
    except ImportError:
        return frozenset()
    isa = _C.cpu_isa()
    if isa["active"] not in _LEVELS:
        return frozenset()
    if "amx" in isa["supported"]:
        return frozenset({torch.float32})
    return frozenset({torch.float32, torch.float16, torch.bfloat16})


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None
) -> Tensor | None:
    """:func:`kvcore.dense_attention`, or None for what ``scaled_dot_product_attention`` should do.

    Args:
        query: ``[batch, q_heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: likewise.
        causal: the newest queries do not see later keys.
        scale: factor of the scores; None is ``head_dim ** -0.5``.

    Returns:
        ``[batch, q_len, q_heads, head_dim]``. Under autocast inputs take its dtype, as with torch's
        function.
    """
    # A compiled model keeps torch's op, which its compiler knows.
    if torch.compiler.is_compiling():
        return None
    if not all(type(x) is Tensor and x.device.type == "cpu" for x in (query, key, value)):
        return None
    q_len, kv_len, head_dim = query.shape[2], key.shape[2], query.shape[3]
    # torch aligns a causal mask with the first keys.
    if key.shape != value.shape or q_len < MIN_QUERIES or kv_len < (q_len if causal else 1):
        return None
    if head_dim % HEAD_DIM_MULTIPLE or not HEAD_DIM_MULTIPLE <= head_dim <= MAX_HEAD_DIM:
        return None
    query, key, value = under_autocast(None, query, key, value)
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= fast_dtypes():
        return None
    out, _ = dense_attention(query, key, value, causal=causal, scale=scale)
    return out.transpose(1, 2)
