"""What each cache costs a model: the same tokens through every cache, compared in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvcore.eval import (
    Interval,
    accuracy,
    agreement,
    bits_per_byte,
    kl_divergence,
    mean_interval,
    paired_ratio_interval,
    through_caches,
)
from kvcore.eval.caches import FULL, CacheChoice


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tokens to score, all sequences of a kind equally long and without padding."""

    text: Tensor  # int64 [sequences, length]: held-out text, one byte per token
    text_context_len: int  # prefilled; every token after the next is scored
    recall: Tensor  # int64 [prompts, length]: bindings, text, then queries
    recall_context_len: int
    query_positions: Tensor  # int64 [queries]: where a query's key stands; its answer is next
    chunk: int = 32
    batch: int = 16

    @property
    def num_queries(self) -> int:
        return self.recall.shape[0] * self.query_positions.numel()

    def num_tokens(self, num_caches: int) -> int:
        """Tokens that `measure` runs through the model: prompts once, steps for each cache."""
        text, recall = self.text.shape, self.recall.shape
        prompts = text[0] * self.text_context_len + recall[0] * self.recall_context_len
        steps = text[0] * (text[1] - 1) + recall[0] * (recall[1] - 1) - prompts
        return prompts + num_caches * steps


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of a workload through one cache."""

    text: Tensor  # fp32 [sequences, steps, vocab]
    recall: Tensor  # fp32 [prompts, queries, vocab]


@dataclasses.dataclass(frozen=True)
class Quality:
    """Figures of one cache; each sample of an interval is one sequence or prompt."""

    bits_per_byte: Interval
    recall: Interval
    num_queries: int
    # Against the full cache on the same tokens.
    bits_change: Interval  # relative
    recall_change: Interval  # difference of shares
    kl: Interval  # nats per byte
    agreement: Interval  # share of bytes with the same most likely next token


def score(
    model: Any,
    choices: Sequence[CacheChoice],
    work: Workload,
    on_step: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Runs a workload through each cache."""
    sizes = {"chunk": work.chunk, "batch": work.batch, "on_step": on_step}
    text = through_caches(model, choices, work.text, work.text_context_len, **sizes)
    recall = through_caches(
        model,
        choices,
        work.recall,
        work.recall_context_len,
        positions=work.query_positions,
        **sizes,
    )
    return [Scores(*pair) for pair in zip(text, recall, strict=True)]


def compare(scores: Scores, full: Scores, work: Workload) -> Quality:
    """Figures of `scores`, paired with those of the full cache."""
    targets = work.text[:, work.text_context_len + 1 :]
    answers = work.recall[:, work.query_positions + 1]
    bits, full_bits = bits_per_byte(scores.text, targets), bits_per_byte(full.text, targets)
    hits, full_hits = accuracy(scores.recall, answers), accuracy(full.recall, answers)
    return Quality(
        bits_per_byte=mean_interval(bits),
        recall=mean_interval(hits),
        num_queries=work.num_queries,
        bits_change=paired_ratio_interval(bits, full_bits),
        recall_change=mean_interval(hits - full_hits),
        kl=mean_interval(kl_divergence(full.text, scores.text).mean(-1)),
        agreement=mean_interval(agreement(full.text, scores.text)),
    )


def measure(
    model: Any,
    choices: Sequence[CacheChoice],
    work: Workload,
    on_step: Callable[[int], None] | None = None,
) -> dict[CacheChoice, Quality]:
    """The figures of each cache, paired with the full one, which is run whether listed or not."""
    full, *scores = score(model, [FULL, *(c for c in choices if c != FULL)], work, on_step)
    others = iter(scores)
    return {
        choice: compare(full if choice == FULL else next(others), full, work) for choice in choices
    }
