"""Attention and caches that a user would otherwise run: torch SDPA, transformers' caches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def _bottom_right(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)


def sdpa_decode(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Attention of the newest q_len tokens over a dense cache, in the two usual formulations.

    q is fp32 ``[batch, q_heads, q_len, head_dim]``; k, v ``[batch, kv_heads, kv_len, head_dim]``.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = q_heads // kv_heads
    mask = None if q_len == 1 else _bottom_right(q_len, kv_len, q.device)
    # The query heads of a group become rows of one head, so K and V are read once per group.
    viewed_mask = None if mask is None else mask.repeat(group, 1)
    variants = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        qd, kd, vd = q.to(dtype), k.to(dtype), v.to(dtype)
        viewed = qd.reshape(batch, kv_heads, group * q_len, head_dim)

        def gqa(qd=qd, kd=kd, vd=vd):
            return F.scaled_dot_product_attention(qd, kd, vd, attn_mask=mask, enable_gqa=True)

        def view(viewed=viewed, kd=kd, vd=vd):
            out = F.scaled_dot_product_attention(viewed, kd, vd, attn_mask=viewed_mask)
            return out.view(batch, q_heads, q_len, head_dim)

        variants[f"SDPA {name}, enable_gqa"] = gqa
        variants[f"SDPA {name}, grouped view"] = view
    return variants


def sdpa_prefill(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Causal self-attention; K and V repeated beforehand, which favours the peer."""
    group = q.shape[1] // k.shape[1]
    variants = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        qd = q.to(dtype)
        kd, vd = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))

        def attention(qd=qd, kd=kd, vd=vd):
            return F.scaled_dot_product_attention(qd, kd, vd, is_causal=True)

        variants[f"SDPA {name}"] = attention
    return variants


def sdpa_backends(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch's flash and cuDNN kernels by name on a GPU, for one query or a whole prompt.

    torch chooses among its kernels by itself; by name, one that does not take the shape raises.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    if q.device.type != "cuda" or q_len not in (1, kv_len):
        return {}
    qd, kd, vd = (x.bfloat16() for x in (q, k, v))
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}

    def by(kernel):
        def run():
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(
                    qd, kd, vd, is_causal=q_len > 1, enable_gqa=True
                )

        return run

    return {f"SDPA bf16, {name}": by(kernel) for name, kernel in kernels.items()}


def dynamic_cache():
    """transformers' default cache."""
    from transformers import DynamicCache

    return DynamicCache()


def static_cache(config, max_cache_len: int):
    """transformers' cache of fixed capacity, which is changed in place."""
    from transformers import StaticCache

    return StaticCache(config, max_cache_len=max_cache_len)


def quantized_cache(config):
    """transformers' quantized cache (the fp8 backend, which needs no further package)."""
    from transformers import QuantizedCache

    return QuantizedCache("fp8", config)
