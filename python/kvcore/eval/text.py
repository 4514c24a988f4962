"""What a cache costs on text: bits per byte, KL and agreement with the full cache, bytes held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcore.eval.metrics import agreement, bits_per_byte, kl_divergence
from kvcore.eval.sizes import CacheBytes, cache_bytes
from kvcore.eval.through import scored_parts


@dataclasses.dataclass(frozen=True)
class TextSample:
    """Sequences of text, all of the same length."""

    tokens: Tensor  # int64 [sequences, context_len + 1 + scored]
    context_len: int  # prefilled; the next token is predicted by the prefill, and not scored
    num_bytes: Tensor  # int64 [sequences]: bytes of text that the scored tokens stand for


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Figures of one cache, fp64 ``[sequences]`` each."""

    bits_per_byte: Tensor
    kl: Tensor  # to the full cache, nats per token
    agreement: Tensor  # share of tokens with the full cache's most likely next token
    bytes: CacheBytes  # of `held` sequences together, when the last token had been fed
    held: int


def draw(
    tokens: Tensor,
    prefix: Tensor,
    decode: Callable[[list[int]], str],
    *,
    seed: int,
    seeds: int,
    sequences: int,
    context: int,
    scored: int,
) -> TextSample:
    """The sequences of a seed; those of different seeds have no text in common.

    Args:
        tokens: int64 ``[n]``, the text.
        prefix: int64 ``[m]``, what the model expects at the start of each sequence; may be empty.
        decode: from ids to text.
        seed: in ``[0, seeds)``.
        seeds: how many there will be.
        sequences: of this seed.
        context: tokens of text that are prefilled.
        scored: tokens of each sequence that are scored.

    Raises:
        ValueError: if the text is too short.
    """
    length = context + 1 + scored
    available = len(tokens) // length
    if available < seeds * sequences:
        raise ValueError(
            f"the text has {len(tokens)} tokens, which make {available} sequences of {length}; "
            f"{seeds} seeds of {sequences} sequences need {seeds * sequences}: give more text, or "
            "less context"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
    picked = order[seed * sequences : (seed + 1) * sequences]
    rows = tokens[: available * length].reshape(available, length)[picked]
    sizes = []
    for row in rows.tolist():
        # A token may be spelt otherwise without those before it.
        ends = (decode(row[:end]) for end in (context + 1, length))
        before, whole = (len(text.encode()) for text in ends)
        sizes.append(whole - before)
    return TextSample(
        torch.cat([prefix.expand(sequences, -1), rows], 1),
        len(prefix) + context,
        torch.tensor(sizes),
    )


def score(
    model: Any,
    choices: Sequence[Any],
    sample: TextSample,
    *,
    chunk: int = 32,
    batch: int = 8,
    on_step: Callable[[int], None] | None = None,
) -> list[TextScores]:
    """Runs a sample through each cache. The first choice must be the full one: it is the reference.

    Args:
        model: a causal language model of transformers in evaluation mode.
        choices: the caches; see `scored_parts`.
        sample: the text.
        chunk: tokens of a step, at most.
        batch: sequences that run together.
        on_step: called after each forward pass with the number of tokens it took.
    """
    targets = sample.tokens[:, sample.context_len + 1 :]
    figures: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in choices]
    sizes: dict[int, CacheBytes] = {}
    full = None

    def on_cache(index: int, cache: Any) -> None:
        sizes.setdefault(index, cache_bytes(cache))

    for rows, index, scores in scored_parts(
        model,
        choices,
        sample.tokens,
        sample.context_len,
        chunk=chunk,
        batch=batch,
        on_step=on_step,
        on_cache=on_cache,
    ):
        if index == 0:
            full = scores
        bits = bits_per_byte(scores, targets[rows], sample.num_bytes[rows])
        kl = kl_divergence(full, scores).mean(-1)
        figures[index].append((bits, kl, agreement(full, scores)))
    columns = [[torch.cat(column) for column in zip(*parts, strict=True)] for parts in figures]
    held = min(batch, len(targets))
    return [TextScores(*column, sizes[i], held) for i, column in enumerate(columns)]
