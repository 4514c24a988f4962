"""What codes lose against their bytes, beside quantization of the same vectors.

Errors are squared norms of the differences over those of the vectors, summed over all vectors, K
and V apart. Bytes are those of a vector with all that is stored for it; dictionaries and anchors,
which every sequence shares, are not among them, calibration is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kvcore import ops
from kvcore.cache.dictionaries import MAX_SPARSITY
from kvcore.cache.settings import PAGE_TOKENS
from kvcore.lexico_training.trainer import Recipe, generator

# A step of k-means on so many vectors, and so many steps.
ANCHOR_VECTORS = 65_536
ANCHOR_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to store the vectors."""

    name: str
    bytes_per_vector: float
    k_error: float
    v_error: float


def squared_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().sum() / expected.square().sum()).item()


def code_bytes(sparsity: int) -> int:
    """Of a vector in a tail: indices of two bytes, coefficients of one, an fp16 scale."""
    return 3 * sparsity + 2


def compare(
    held: list[Tensor], dictionaries: list[Tensor], drawn: list[Tensor], recipe: Recipe
) -> list[dict[str, Any]]:
    """Arms as dicts, by bytes.

    Args:
        held: K and V, fp32 ``[kv_heads, tokens, head_dim]``.
        dictionaries: of K and of V.
        drawn: the vectors they were trained on, ``[num_vectors, head_dim]``.
        recipe: of the training.
    """
    atoms, head_dim = dictionaries[0].shape
    limit = min(MAX_SPARSITY, atoms, head_dim)
    # At the sparsity of the training, around it, and at the bytes of 2 bits and of the anchors.
    anchors = anchored(held, drawn, atoms, recipe.seed)
    quantized = [turbo(held, bits) for bits in (4, 2)]
    equal = [int((arm.bytes_per_vector - 2) // 3) for arm in (anchors, quantized[1])]
    wanted = {recipe.sparsity // 2, recipe.sparsity, 2 * recipe.sparsity, *equal}
    arms = [codes(held, dictionaries, s) for s in wanted if 1 <= s <= limit]
    arms += [anchors, *quantized]
    return [dataclasses.asdict(arm) for arm in sorted(arms, key=lambda a: a.bytes_per_vector)]


def codes(held: list[Tensor], dictionaries: list[Tensor], sparsity: int) -> Arm:
    errors = []
    for x, dictionary in zip(held, dictionaries, strict=True):
        *code, _ = ops.lexico_encode(x[None], dictionary, sparsity=sparsity)
        errors.append(squared_error(ops.lexico_reconstruct(*code, dictionary)[0], x))
    return Arm(f"lexico, {sparsity} atoms", code_bytes(sparsity), *errors)


def turbo(held: list[Tensor], bits: int) -> Arm:
    """kvcore's quantization with its defaults, but for the sink page, of whole pages."""
    k, v = (x[None, :, : x.shape[1] // PAGE_TOKENS * PAGE_TOKENS] for x in held)
    if k.shape[2] == 0:  # less than a page: what follows the last page is int8 there
        k, v = (x[None] for x in held)
    calibration = ops.turbo_calibrate(k)
    *pools, table, tail, _, _, lens = ops.turbo_quantize(
        k, v, *calibration, k_bits=[bits], v_bits=[bits], sink_pages=0
    )
    pool = [slab for slab in pools if len(slab)]
    rebuilt = ops.turbo_dequantize(pool, table, tail, lens, *calibration, kv_len=k.shape[2])
    stored = sum(x.numel() * x.element_size() for x in (*pool, table, *calibration))
    vectors = k.shape[1] * k.shape[2] * 2
    errors = (squared_error(*pair) for pair in zip(rebuilt, (k, v), strict=True))
    return Arm(f"turbo, {bits} bit", stored / vectors, *errors)


def anchored(held: list[Tensor], drawn: list[Tensor], num_anchors: int, seed: int) -> Arm:
    """The nearest of as many anchors as there are atoms, and what is left in two bits."""
    errors = []
    for x, vectors in zip(held, drawn, strict=True):
        anchors = k_means(vectors, num_anchors, seed)
        flat = x.flatten(0, 1)
        left = flat - anchors[nearest(flat, anchors)]
        rebuilt = flat - left + two_bit(left)
        errors.append(squared_error(rebuilt, flat))
    # Index and scale of two bytes each.
    return Arm("anchor and 2-bit rest", 2 + held[0].shape[2] / 4 + 2, *errors)


def nearest(x: Tensor, anchors: Tensor) -> Tensor:
    """Index of each row's nearest anchor."""
    half = anchors.square().sum(1) / 2
    return torch.cat([(part @ anchors.T - half).argmax(1) for part in x.split(4096)])


def k_means(vectors: Tensor, num_anchors: int, seed: int) -> Tensor:
    """Lloyd's algorithm from random vectors; an anchor that is nearest to none stays."""
    order = torch.randperm(len(vectors), generator=generator(seed, 3))
    x = vectors[order[:ANCHOR_VECTORS]].float()
    anchors = x[:num_anchors].clone()
    for _ in range(ANCHOR_STEPS):
        index = nearest(x, anchors)
        counts = torch.bincount(index, minlength=len(anchors))[:, None]
        sums = torch.zeros_like(anchors).index_add_(0, index, x)
        anchors = torch.where(counts > 0, sums / counts.clamp_min(1), anchors)
    return anchors


def two_bit(x: Tensor) -> Tensor:
    """Rows at the levels -1.5, -0.5, 0.5 and 1.5 times a step of their own.

    The step is the best of a few, and fp16 as it would be stored.
    """
    deviation = x.square().mean(1, keepdim=True).sqrt()
    best, least = torch.zeros_like(x), x.new_full((len(x), 1), torch.inf)
    # 0.996 deviations is the best step for Gaussian values.
    for factor in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        step = (factor * deviation).half().float().clamp_min(2.0**-24)
        rounded = ((x / step).floor().clamp(-2, 1) + 0.5) * step
        error = (x - rounded).square().sum(1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best
