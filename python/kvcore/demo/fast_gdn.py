"""A chunked gated delta rule in plain torch, for training and for measuring what was trained.

The demo itself never runs it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F


def chunk_gated_delta_rule(
    query,
    key,
    value,
    g,
    beta,
    chunk_size=64,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    **_,
):
    """Gated delta rule, one triangular solve per chunk; the signature is transformers'.

    query, key: [batch, length, key_heads, key_dim]; value: [batch, length, heads, value_dim]; g
    (log decay), beta: [batch, length, heads]. Training only: transformers' own loop over the rows
    of a chunk takes three times as long on a CPU. Chunkwise form of Yang et al. 2024, "Gated
    Delta Networks".
    """
    dtype, length, key_dim = query.dtype, key.shape[1], key.shape[-1]
    heads, value_dim = value.shape[-2:]
    if key.shape[2] != heads:
        query, key = (x.repeat_interleave(heads // key.shape[2], 2) for x in (query, key))
    q, k, v, b, g = (x.transpose(1, 2).float() for x in (query, key, value, beta, g))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * key_dim**-0.5
    pad = -length % chunk_size
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, chunk_size)) for x in (q, k, v))
    b, g = (F.pad(x, (0, pad)).unflatten(2, (-1, chunk_size)) for x in (b, g))
    total = g.cumsum(-1)
    future = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=g.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(future, -math.inf).exp()
    kb = k * b[..., None]
    # unitriangular: the solver neither reads the diagonal nor what lies above it.
    uw = torch.linalg.solve_triangular(
        (kb @ k.mT) * decay,
        torch.cat([v * b[..., None], kb * total.exp()[..., None]], -1),
        upper=False,
        unitriangular=True,
    )
    u, w = uw.split([value_dim, key_dim], -1)
    within = (q @ k.mT) * decay
    q = q * total.exp()[..., None]
    k = k * (total[..., -1:] - total).exp()[..., None]
    left = total[..., -1].exp()[..., None, None]
    state = q.new_zeros(*q.shape[:2], key_dim, value_dim)
    state = state if initial_state is None else initial_state.float()
    out = []
    for qi, within_i, ui, wi, ki, left_i in zip(
        *(x.unbind(2) for x in (q, within, u, w, k, left)), strict=True
    ):
        written = ui - wi @ state
        out.append(qi @ state + within_i @ written)
        state = state * left_i + ki.mT @ written
    out = torch.stack(out, 2).flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype)
    return out, (state if output_final_state else None)


@contextlib.contextmanager
def fast_gdn() -> Iterator[None]:
    """Within the block, transformers' Qwen3-Next runs `chunk_gated_delta_rule`."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    original = modeling.torch_chunk_gated_delta_rule
    modeling.torch_chunk_gated_delta_rule = chunk_gated_delta_rule
    try:
        yield
    finally:
        modeling.torch_chunk_gated_delta_rule = original
