"""Self-checks of exact attention: on small inputs, compared with its reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import kvcore
from kvcore.doctor.mismatch import compare
from kvcore.reference import dense as reference

# On GPUs they raise: torch's own function is the one to use there.
CPU_ONLY = ("dense_attention", "dense_attention_backward")


def _inputs(head_dim: int) -> list[Tensor]:
    """q, k, v and d_out."""
    generator = torch.Generator().manual_seed(head_dim)
    sizes = ((4, 100), (2, 150), (2, 150), (4, 100))
    return [torch.randn(2, *size, head_dim, generator=generator) for size in sizes]


def _attention(head_dim: int, device: str) -> str:
    q, k, v, _ = _inputs(head_dim)
    actual = kvcore.dense_attention(*(x.to(device) for x in (q, k, v)), causal=True)
    wide = (x.double() for x in (q, k, v))
    return compare(actual, reference.dense_attention(*wide, causal=True))


def _attention_backward(head_dim: int, device: str) -> str:
    q, k, v, d_out = _inputs(head_dim)
    arguments = [d_out, q, k, v, *reference.dense_attention(q, k, v, causal=True)]
    ours = (x.to(device) for x in arguments)
    actual = kvcore.dense_attention_backward(*ours, causal=True)
    wide = (x.double() for x in arguments)
    return compare(actual, reference.dense_attention_backward(*wide, causal=True))


CHECKS: dict[str, Callable[[int, str], str]] = {
    "dense_attention": _attention,
    "dense_attention_backward": _attention_backward,
}
