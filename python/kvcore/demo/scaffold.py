"""A start for the Llama-style model from which an induction circuit forms in tens of steps.

Recall needs two heads in series: one that copies the previous token's content to each position, one
that finds the position whose copied content equals the present token (Olsson et al. 2022,
"In-context Learning and Induction Heads"). A Gated DeltaNet layer sees the previous token through
its convolution; a small Llama with random matrices stays at chance for longer than a short run
lasts. So layer 0 starts with heads that attend by position and layer 1 with heads that attend by
content, in the manner of Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention
Layers". All of it is trained like any other weight.
"""

from __future__ import annotations

import torch

EMBEDDING_STD = 0.1
# Logit of a fast rotary pair where its distance is met, and how many of the fastest pairs take
# part: more of them are too slow to tell neighbours apart.
POSITION_LOGIT = 8.0
POSITION_PAIRS = 6
# Query and key projections have this squared scale: equal tokens then score about 4 above unequal
# ones.
CONTENT_GAIN = 0.5


def _orthonormal(rows: int, width: int, avoid: torch.Tensor) -> torch.Tensor:
    """Random orthonormal rows, [rows, width], all orthogonal to the unit vector `avoid`."""
    random = torch.randn(width, rows)
    return torch.linalg.qr(random - torch.outer(avoid, avoid @ random))[0].T


@torch.no_grad()
def scaffold_(model: torch.nn.Module) -> torch.nn.Module:
    """Overwrite the embedding and layers 0 and 1's attention of a Llama model in place; returns it.

    The first KV head of layer 0 is given two query heads, for the previous token and the one
    before; all heads of layer 1 match by content. Uses torch's global generator.
    """
    config, layers = model.config, model.model.layers
    width, dim = config.hidden_size, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    embedding = model.model.embed_tokens.weight
    mean = torch.randn(width)
    mean /= mean.norm()
    embedding.normal_(std=EMBEDDING_STD)
    # Half of each embedding's energy is one shared vector: what a head attends by position with.
    embedding -= torch.outer(embedding @ mean, mean)
    embedding += mean * EMBEDDING_STD * width**0.5
    shared = (width / 2) ** 0.5  # its length after RMSNorm

    frequency = model.model.rotary_emb.inv_freq[:POSITION_PAIRS]
    length = (POSITION_LOGIT * dim**0.5) ** 0.5

    def rotated_by(distance):
        vector = torch.zeros(dim)
        vector[:POSITION_PAIRS] = length * torch.cos(-distance * frequency)
        vector[dim // 2 : dim // 2 + POSITION_PAIRS] = length * torch.sin(-distance * frequency)
        return vector

    attention = layers[0].self_attn
    copied = _orthonormal(dim, width, mean)
    attention.k_proj.weight[:dim] += torch.outer(rotated_by(0), mean) / shared
    attention.v_proj.weight[:dim] = copied
    for head in range(group):
        rows = slice(head * dim, (head + 1) * dim)
        attention.q_proj.weight[rows] += torch.outer(rotated_by(head + 1), mean) / shared
    attention.o_proj.weight[:, :dim] = copied.T * EMBEDDING_STD

    attention = layers[1].self_attn
    for kv_head in range(config.num_key_value_heads):
        rows = slice(kv_head * dim, (kv_head + 1) * dim)
        attention.k_proj.weight[rows] = copied * CONTENT_GAIN**0.5
        value = _orthonormal(dim, width, mean)
        attention.v_proj.weight[rows] = value
        for head in range(kv_head * group, (kv_head + 1) * group):
            rows = slice(head * dim, (head + 1) * dim)
            noise = torch.randn(dim, width) * config.initializer_range
            attention.q_proj.weight[rows] = copied * CONTENT_GAIN**0.5 + noise
            attention.o_proj.weight[:, rows] = value.T * EMBEDDING_STD / group
    return model
