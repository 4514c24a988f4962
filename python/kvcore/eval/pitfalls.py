"""Checks after "The Pitfalls of KV Cache Compression" (Chen et al., arXiv 2510.00231).

The paper's point: an average hides that a compressed cache fails some of the instructions of one
prompt long before the others. It finds so for five methods that evict tokens, on models of 8 and 14
billion parameters that follow instructions, with IFEval and a leak of the system prompt. Of its
pitfalls, these can be asked of a small model, with bindings in the place of instructions: a prompt
has `SEGMENTS` groups of bindings, spread evenly over a text, and every binding is asked for.

- Instructions degrade at different rates: the paper compares how instructions rank with and without
  compression, by Spearman's correlation. `rank_correlation` does so for the bindings of a prompt,
  ranked by the log-probability of their answers; `by_segment` has what each segment loses.
- The order of instructions matters: `order_effect`. Every prompt is run twice, its groups of
  bindings in one order and in the reverse, so that what is easy or hard about a binding cancels.
- Eviction is biased towards some instructions: the paper counts the tokens that are kept of each,
  and so does `stored`, by segment. Quantization and sparse codes keep all of them, but perhaps not
  equally well: `stored` also has how far K and V of each segment, as attention would read them, are
  from what the cache was given. This asks nothing of the model but K and V.

What cannot be checked here: instruction following itself, that a system prompt leaks (both take a
model that follows instructions, and judges of its answers), and the paper's remedies, allow-lists
and fair eviction, which say which tokens to evict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcore.eval.metrics import spearman
from kvcore.eval.recall import Draws, Prompts, Recalled, prompt, recall, stack_prompts, text_size
from kvcore.eval.stepwise import fill_from_prefill, prefill

SEGMENTS = 8
PER_SEGMENT = 4


def ordered_prompts(draws: Draws, prompts: int, length: int) -> Prompts:
    """`prompts` rows of groups of bindings, each followed by a row with its groups reversed.

    Both rows have the same text and the same bindings, asked for in the same order. Bindings are
    numbered as they stand in the first row: group g is in segment g there, and in segment
    ``SEGMENTS - 1 - g`` of the second.
    """
    count, rows = SEGMENTS * PER_SEGMENT, []
    size = text_size(length, count)
    # A group stands in the middle of its segment.
    places = torch.tensor([(2 * s + 1) * size // (2 * SEGMENTS) for s in range(SEGMENTS)])
    slots = places.repeat_interleave(PER_SEGMENT)
    reverse = torch.arange(count).reshape(SEGMENTS, PER_SEGMENT).flip(0).flatten()
    for _ in range(prompts):
        keys, values = draws.bindings(count)
        order, text = draws.permutation(count), draws.window(size)
        rows.append((prompt(text, slots, keys, values, order), order))
        # `reverse` says both which binding is at a place and at which place a binding is.
        row = prompt(text, slots, keys[reverse], values[reverse], reverse[order])
        rows.append((row, order))
    return stack_prompts(draws, rows)


@dataclasses.dataclass(frozen=True)
class Unevenness:
    """Figures of one cache, fp64; a sample is a prompt in both orders."""

    by_segment: Tensor  # [prompts, SEGMENTS]: nats that an answer loses, by where its binding was
    recall: Tensor  # [prompts, SEGMENTS]: share of answers that are the most likely token
    order_effect: Tensor  # [prompts]: nats lost in the first half of a prompt less in the second
    rank_correlation: Tensor  # [prompts]: of bindings with the full cache and with this one


def _by_segment(values: Tensor) -> Tensor:
    """``[2 * prompts, bindings]`` as `ordered_prompts` has rows, to ``[prompts, segments]``."""
    grouped = values.reshape(-1, 2, SEGMENTS, PER_SEGMENT).mean(-1)
    return (grouped[:, 0] + grouped[:, 1].flip(1)) / 2


def compare(found: Recalled, full: Recalled) -> Unevenness:
    """Figures of a cache against the full one, on the rows of `ordered_prompts`."""
    lost = _by_segment(full.log_probs - found.log_probs)
    half = SEGMENTS // 2
    pairs = zip(found.log_probs, full.log_probs, strict=True)
    ranks = torch.tensor([spearman(row, other) for row, other in pairs], dtype=torch.float64)
    return Unevenness(
        lost,
        _by_segment(found.hits.double()),
        lost[:, :half].mean(1) - lost[:, half:].mean(1),
        ranks.reshape(-1, 2).mean(1),
    )


def unevenness(
    model: Any,
    choices: Sequence[Any],
    asked: Prompts,
    *,
    chunk: int = 32,
    batch: int = 8,
    on_step: Callable[[int], None] | None = None,
) -> list[Unevenness]:
    """Runs `ordered_prompts` through each cache, of which the first must be the full one."""
    full, *others = recall(model, choices, asked, chunk=chunk, batch=batch, on_step=on_step)
    return [compare(found, full) for found in (full, *others)]


@dataclasses.dataclass(frozen=True)
class Stored:
    """What is left of K and V, fp64 ``[SEGMENTS]``, the mean over the layers."""

    kept: Tensor  # share of the tokens of each head that are held at all
    k_error: Tensor  # relative L2 error of what is held, read back
    v_error: Tensor


def _relative(found: Tensor, exact: Tensor) -> Tensor:
    """Of each segment of tokens; both are ``[batch, heads, tokens, head_dim]``."""
    parts = zip(found.tensor_split(SEGMENTS, 2), exact.tensor_split(SEGMENTS, 2), strict=True)
    errors = [((a - b).norm() / b.norm()).item() for a, b in parts]
    return torch.tensor(errors, dtype=torch.float64)


def _share_kept(k: Tensor, exact: Tensor) -> Tensor:
    """Which tokens of `exact` have their keys in `k`, by segment."""
    found = [
        (row[:, None] == own).all(-1).any(1)  # [tokens]
        for own, row in zip(k.flatten(0, 1), exact.flatten(0, 1), strict=True)
    ]
    parts = torch.stack(found).double().tensor_split(SEGMENTS, 1)
    return torch.tensor([part.mean() for part in parts], dtype=torch.float64)


def _read_back(layer: Any, exact: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `Stored`, of one layer, which gets a token more."""
    # What the next token would attend to; its own K and V are the last of it.
    new = exact.keys[:, :, -1:], exact.values[:, :, -1:]
    with torch.no_grad():
        read = layer.update(*new)
    k, v = ((x + 0.0)[:, :, :-1].float() for x in read)
    true_k, true_v = exact.keys.float(), exact.values.float()
    if k.shape[2] < true_k.shape[2]:  # what is evicted is gone, and the others are as they were
        zeros = torch.zeros(SEGMENTS, dtype=torch.float64)
        return _share_kept(k, true_k), zeros, zeros
    return torch.ones(SEGMENTS, dtype=torch.float64), _relative(k, true_k), _relative(v, true_v)


def stored(model: Any, choices: Sequence[Any], tokens: Tensor) -> list[Stored]:
    """K and V of a prompt as each cache gives them back, against what it was given.

    Args:
        model: a causal language model of transformers in evaluation mode.
        choices: the caches.
        tokens: int64 ``[batch, length]``, the prompt.
    """
    tokens = tokens.to(model.device)
    prefilled = prefill(model, tokens)
    found = []
    for choice in choices:
        cache = choice.make(model)
        if choice.evicts:
            with choice.attention(model), torch.no_grad():
                model(input_ids=tokens, past_key_values=cache, use_cache=True)
        else:
            fill_from_prefill(cache, prefilled)
        columns = [
            _read_back(layer, exact)
            for layer, exact in zip(cache.layers, prefilled.layers, strict=True)
            if isinstance(getattr(exact, "keys", None), Tensor)  # not of linear attention
        ]
        found.append(Stored(*(torch.stack(x).mean(0) for x in zip(*columns, strict=True))))
    return found
