"""Recall through a cache: bindings of a key to a value in a text, and queries after it.

A binding is two tokens, a key and its value; a query is the key again, and its answer the value. It
is what a needle in a haystack comes down to for a model of any size, and needs no chat format: a
model continues what it has seen after the same token. The keys and values are tokens that the text
around them does not have, so that nothing else in it answers a query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcore.eval.through import scored_parts


@dataclasses.dataclass(frozen=True)
class Symbols:
    """Tokens for keys and for values, int64 ``[n]`` and ``[m]``, with none in common."""

    keys: Tensor
    values: Tensor


def free_symbols(
    text: Tensor, vocab_size: int, decode: Callable[[list[int]], str], count: int
) -> Symbols:
    """`count` keys and as many values among the tokens that a text has not: words, if there are.

    Raises:
        ValueError: if the vocabulary has too few of them.
    """
    used = torch.zeros(vocab_size, dtype=torch.bool)
    used[text] = True
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    words: list[int] = []
    others: list[int] = []
    for token in order[~used[order]].tolist():
        text_of = decode([token]).strip()
        if text_of:  # special tokens have no text, nor has what a tokenizer leaves unused
            (words if text_of.isascii() and text_of.isalpha() else others).append(token)
        if len(words) == 2 * count:
            break
    found = (words + others)[: 2 * count]
    if len(found) < 2 * count:
        raise ValueError(
            f"{count} keys and values need {2 * count} tokens that the text has not, and the "
            f"vocabulary has {len(found)}; name fewer --pairs"
        )
    return Symbols(torch.tensor(found[:count]), torch.tensor(found[count:]))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Bindings in texts, then queries, which stand at the same positions in all rows."""

    tokens: Tensor  # int64 [prompts, length]
    context_len: int  # tokens before the first query
    query_positions: Tensor  # int64 [queries]: of a query's key; its answer is the next token
    order: Tensor  # int64 [prompts, queries]: which binding a query asks for, in their order

    @property
    def answers(self) -> Tensor:
        return self.tokens[:, self.query_positions + 1]


def prompt(text: Tensor, slots: Tensor, keys: Tensor, values: Tensor, order: Tensor) -> Tensor:
    """A text with binding i before its token ``slots[i]``, then the queries in their order.

    All int64: text ``[size]``, slots (ascending, at most size), keys and values ``[bindings]``,
    order ``[queries]``. Returns ``[size + 2 * bindings + 2 * queries]``.
    """
    pairs = torch.stack([keys, values], 1)
    parts, begin = [], 0
    for slot, pair in zip(slots.tolist(), pairs, strict=True):
        parts += [text[begin:slot], pair]
        begin = slot
    return torch.cat([*parts, text[begin:], pairs[order].flatten()])


class Draws:
    """All that is random in the prompts of a seed."""

    def __init__(self, text: Tensor, prefix: Tensor, symbols: Symbols, seed: int) -> None:
        self.text = text
        self.prefix = prefix
        self.symbols = symbols
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count,), generator=self.generator)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def window(self, size: int) -> Tensor:
        """A place of the text. ValueError if it is shorter than that."""
        if size > len(self.text):
            raise ValueError(f"the text has {len(self.text)} tokens, and {size} are needed")
        start = int(self.below(len(self.text) - size + 1, 1))
        return self.text[start : start + size]

    def bindings(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys, all different, and values. ValueError if there are not as many keys."""
        if not 1 <= count <= len(self.symbols.keys):
            raise ValueError(f"pairs must lie in [1, {len(self.symbols.keys)}], got {count}")
        keys = self.symbols.keys[self.permutation(len(self.symbols.keys))[:count]]
        return keys, self.symbols.values[self.below(len(self.symbols.values), count)]


def stack_prompts(draws: Draws, rows: list[tuple[Tensor, Tensor]]) -> Prompts:
    """Of rows of tokens, each with the order of its queries."""
    orders = torch.stack([order for _, order in rows])
    tokens = torch.stack([torch.cat([draws.prefix, row]) for row, _ in rows])
    queries = orders.shape[1]
    context_len = tokens.shape[1] - 2 * queries
    return Prompts(tokens, context_len, context_len + 2 * torch.arange(queries), orders)


def text_size(length: int, bindings: int) -> int:
    """Tokens of text in a context of `length` tokens. ValueError if there is room for none."""
    size = length - 2 * bindings
    if size < 1:
        raise ValueError(
            f"{bindings} pairs take {2 * bindings} tokens, and do not fit a length of {length}"
        )
    return size


def needles(draws: Draws, prompts: int, length: int, depths: Sequence[float]) -> Prompts:
    """One binding at each depth of a text (0: its start, 1: its end), asked for in random order.

    Queries of one prompt stand behind each other: a prompt is run once for all its depths.
    """
    count, rows = len(depths), []
    size = text_size(length, count)
    slots = torch.tensor([round(depth * size) for depth in depths])
    for _ in range(prompts):
        keys, values = draws.bindings(count)
        order = draws.permutation(count)
        rows.append((prompt(draws.window(size), slots, keys, values, order), order))
    return stack_prompts(draws, rows)


def pairs(draws: Draws, prompts: int, length: int, count: int) -> Prompts:
    """`count` bindings at random places of a text, asked for in random order."""
    size, rows = text_size(length, count), []
    for _ in range(prompts):
        keys, values = draws.bindings(count)
        slots = draws.below(size + 1, count).sort().values
        order = draws.permutation(count)
        rows.append((prompt(draws.window(size), slots, keys, values, order), order))
    return stack_prompts(draws, rows)


@dataclasses.dataclass(frozen=True)
class Recalled:
    """What one cache made of prompts; ``[prompts, bindings]``, in the bindings' order."""

    hits: Tensor  # bool: the answer is the most likely next token
    log_probs: Tensor  # fp64: of the answer


def recall(
    model: Any,
    choices: Sequence[Any],
    asked: Prompts,
    *,
    chunk: int = 32,
    batch: int = 8,
    on_step: Callable[[int], None] | None = None,
) -> list[Recalled]:
    """Runs prompts through each cache; arguments as of `kvcore.eval.text.score`."""
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in choices]
    for rows, index, scores in scored_parts(
        model,
        choices,
        asked.tokens,
        asked.context_len,
        chunk=chunk,
        batch=batch,
        positions=asked.query_positions,
        on_step=on_step,
    ):
        answers = asked.answers[rows]
        found = scores.gather(-1, answers[..., None])[..., 0].double()
        parts[index].append((scores.argmax(-1) == answers, found))
    place = asked.order.argsort(1)  # of the query that asks for each binding
    return [
        Recalled(*(torch.cat(column).gather(1, place) for column in zip(*part, strict=True)))
        for part in parts
    ]
