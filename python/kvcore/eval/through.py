"""The same tokens through several caches, so that every figure is a comparison in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcore.eval.stepwise import prefill, stepwise_scores


def scored_parts(
    model: Any,
    choices: Sequence[Any],
    tokens: Tensor,
    context_len: int,
    *,
    chunk: int = 32,
    batch: int = 16,
    positions: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
    on_cache: Callable[[int, Any], None] | None = None,
) -> Iterator[tuple[slice, int, Tensor]]:
    """Log-probabilities of each part of the sequences through each cache, one after the other.

    A prompt is attended exactly whatever the cache, so it is run once for all of them, `batch`
    sequences at a time, and again for those that choose what to evict while it runs. What was
    yielded need not be kept: over a large vocabulary all scores of all caches outweigh the model.

    Args:
        model: a causal language model of transformers in evaluation mode.
        choices: the caches, such as `kvcore.eval.caches.CacheChoice`.
        tokens: int64 ``[sequences, length]``.
        context_len: prefilled tokens.
        chunk: tokens of a step, at most.
        batch: sequences of a part.
        positions: as of `stepwise_scores`.
        on_step: called after each forward pass with the number of tokens it took.
        on_cache: called with the index of a choice and its filled cache.

    Yields:
        The rows of `tokens`, the index of the choice, and its fp32 scores ``[rows, steps, vocab]``
        on the CPU, as `stepwise_scores` returns them; the choices of a part in their order.
    """
    for begin in range(0, tokens.shape[0], batch):
        part = tokens[begin : begin + batch].to(model.device)
        rows = slice(begin, begin + part.shape[0])
        prefilled = prefill(model, part[:, :context_len])
        if on_step is not None:
            on_step(part.shape[0] * context_len)
        for index, choice in enumerate(choices):
            with choice.attention(model):
                scores = stepwise_scores(
                    model,
                    lambda choice=choice: choice.make(model),
                    part,
                    context_len=context_len,
                    chunk=chunk,
                    positions=positions,
                    prefilled=None if choice.evicts else prefilled,
                    evicts=choice.evicts,
                    on_step=on_step,
                    on_cache=None if on_cache is None else lambda c, i=index: on_cache(i, c),
                )
            yield rows, index, scores.cpu()


def num_tokens(tokens: Tensor, context_len: int, choices: Sequence[Any]) -> int:
    """Tokens that `scored_parts` runs through the model."""
    sequences, length = tokens.shape
    prompts = 1 + sum(choice.evicts for choice in choices)
    return sequences * (prompts * context_len + len(choices) * (length - 1 - context_len))


def through_caches(
    model: Any, choices: Sequence[Any], tokens: Tensor, context_len: int, **arguments: Any
) -> list[Tensor]:
    """All scores of each cache, ``[sequences, steps, vocab]``; arguments of `scored_parts`."""
    parts: list[list[Tensor]] = [[] for _ in choices]
    for _, index, scores in scored_parts(model, choices, tokens, context_len, **arguments):
        parts[index].append(scores)
    return [torch.cat(scores) for scores in parts]
