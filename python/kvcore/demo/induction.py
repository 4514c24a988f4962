"""Gives a trained model a head that continues repeated text, instead of waiting for one to form.

A head that finds the earlier place where the last bytes stood already, and predicts what followed
there (Olsson et al. 2022), had not formed in either demo model after the first long rows, and
formed slowly on rows with repeated excerpts. What it needs is in the residual stream by then and
can be read linearly: the last few bytes. So the projections of one KV head of the last layer are
fitted to cached activations, every other weight frozen, and replaced; then training of all goes on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcore.demo import data
from kvcore.demo.fast import fast

ROWS, LENGTH = 12, 512
ITERATIONS, RATE = 240, 4e-3
MATCH = 3  # equal bytes before two positions for the earlier to be a source of the later
BOOST = 3.0  # first logit of the byte that followed the match


def _source_mask(ids: Tensor) -> Tensor:
    """[rows, i, j]: whether the MATCH tokens up to i equal those before j, j <= i."""
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(len(ids), -1, -1).clone()
    for back in range(MATCH):
        last = F.pad(ids, (back, 0), value=-1)[:, :length]
        before = F.pad(ids, (back + 1, 0), value=-2)[:, :length]
        mask &= last[:, :, None] == before[:, None, :]
    return mask


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first cos.shape[-1] channels of x [..., length, head_dim]."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return x if norm is None else norm(x)


def graft_(
    model: Any,
    corpus: np.ndarray,
    rng: np.random.Generator,
    kv_head: int = 1,
    iterations: int = ITERATIONS,
) -> float:
    """Replace KV head `kv_head` of the last layer, and its query heads, in place.

    Returns the attention that positions with a source pay to their sources on the fitted rows.
    """
    config, layer = model.config, model.model.layers[-1]
    attention, dim = layer.self_attn, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    cached = {}
    keep = lambda key: lambda module, inputs, out: cached.__setitem__(key, out.detach())  # noqa: E731
    hooks = [
        layer.input_layernorm.register_forward_hook(keep("inputs")),
        layer.register_forward_hook(lambda m, i, out: cached.__setitem__("out", out.detach())),
    ]
    rows = [data.echo(rng, data.window(rng, corpus, LENGTH)) for _ in range(ROWS)]
    ids = torch.from_numpy(np.stack(rows))
    with fast(model), torch.no_grad():
        model.model(input_ids=ids, use_cache=False)
        cos, sin = model.model.rotary_emb(cached["inputs"], torch.arange(LENGTH)[None])
    for hook in hooks:
        hook.remove()
    inputs = cached["inputs"].float()

    # Queries and keys: attend to sources. One projection serves all query heads of the group.
    sources = _source_mask(ids)
    has_source = sources.any(-1)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    width = config.hidden_size
    projections = [torch.nn.Parameter(torch.randn(dim, width) / width**0.5) for _ in range(2)]
    optimizer = torch.optim.AdamW(projections, lr=RATE, weight_decay=0.0)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    for step in range(iterations):
        part = slice(step % 3, None, 3)
        query, key = (
            _rotate(_normed(inputs[part] @ weight.T, norm), cos, sin)
            for weight, norm in zip(projections, norms, strict=True)
        )
        scores = (query @ key.mT * dim**-0.5).masked_fill(future, -torch.inf)
        weights = scores.softmax(-1)
        paid = (weights * sources[part]).sum(-1)[has_source[part]]
        loss = -(paid + 1e-6).log().mean()
        optimizer.zero_grad()
        loss.backward()
        for group_ in optimizer.param_groups:
            group_["lr"] = RATE * (1 - step / iterations)
        optimizer.step()

    # Values: the embedding of the present token, decoded by ridge regression, in its 64 main
    # directions; the output projection adds it back along the same directions.
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        wanted = embedding[ids] - embedding[ids].mean((0, 1))
        flat, target = inputs.reshape(-1, width), wanted.reshape(-1, width)
        main = torch.linalg.svd(target, full_matrices=False)[2][:dim]
        ridge = torch.linalg.solve(flat.T @ flat + 10 * torch.eye(width), flat.T @ target)
        scale = model.model.norm(cached["out"]).std() / cached["out"].std()
        boost = BOOST / (scale * target.square().sum(-1).mean())
        kv_rows = slice(kv_head * dim, (kv_head + 1) * dim)
        attention.k_proj.weight[kv_rows] = projections[1]
        attention.v_proj.weight[kv_rows] = main @ ridge.T
        # Qwen3-Next's query projection holds each head's output gate below its query: a zero gate
        # halves the output.
        gated = attention.q_proj.out_features // (config.num_attention_heads * dim)
        for head in range(kv_head * group, (kv_head + 1) * group):
            start = head * dim * gated
            attention.q_proj.weight[start : start + dim] = projections[0]
            attention.q_proj.weight[start + dim : start + dim * gated] = 0
            columns = slice(head * dim, (head + 1) * dim)
            attention.o_proj.weight[:, columns] = main.T * (boost * gated / group)
    return paid.mean().item()
