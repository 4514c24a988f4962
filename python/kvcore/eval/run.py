"""``kvcore eval``: every measure, seed by seed, through every cache of a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcore.cache import reasons as reasons_of_kvcore
from kvcore.eval import pitfalls, recall, text
from kvcore.eval.caches import FULL
from kvcore.eval.peers import why_not
from kvcore.eval.through import num_tokens

MEASURES = ("text", "needle", "pairs", "pitfalls")
MIN_SEEDS = 3
_SILENT = contextlib.nullcontext(lambda tokens: None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured. Lengths are of tokens."""

    measures: tuple[str, ...] = MEASURES
    seeds: int = 3
    sequences: int = 6  # of text, for each seed
    context: int = 1024  # of text, prefilled
    scored: int = 256  # after it
    prompts: int = 4  # of recall, for each seed and each setting
    lengths: tuple[int, ...] = (512, 1024, 2048)  # of prompts with needles
    depths: int = 5
    pairs: tuple[int, ...] = (4, 16, 64)
    pairs_length: int = 1024  # of prompts with pairs, and of those in several orders
    chunk: int = 32
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("sequences", "context", "scored", "prompts", "pairs_length", "chunk", "batch"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _check(self.seeds >= MIN_SEEDS, "seeds", f"at least {MIN_SEEDS}", self.seeds)
        _check(self.depths >= 2, "depths", "at least 2", self.depths)
        for name in ("measures", "lengths", "pairs"):
            _check(len(getattr(self, name)) > 0, name, "one or more", "none")
        for name in ("lengths", "pairs"):
            _check(min(getattr(self, name)) >= 1, name, "at least 1", min(getattr(self, name)))
        unknown = [name for name in self.measures if name not in MEASURES]
        _check(not unknown, "measures", f"among {', '.join(MEASURES)}", ", ".join(unknown))

    @property
    def needle_depths(self) -> tuple[float, ...]:
        """0 is the start of a prompt and 1 its end."""
        return tuple(i / (self.depths - 1) for i in range(self.depths))

    def longest(self) -> dict[str, int]:
        """Tokens of the longest sequence of each measure, and of what it is made of."""
        found = {
            "text": self.context + 1 + self.scored,
            "needle": max(self.lengths) + 2 * self.depths,
            "pairs": self.pairs_length + 2 * max(self.pairs),
            "pitfalls": self.pairs_length + 2 * pitfalls.SEGMENTS * pitfalls.PER_SEGMENT,
        }
        return {name: found[name] for name in self.measures}


def _check(holds: bool, name: str, expected: str, actual: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {actual}")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and what it is measured on."""

    name: str
    model: Any  # of transformers, in evaluation mode
    decode: Callable[[list[int]], str]
    tokens: Tensor  # int64 [n]: the text
    prefix: Tensor  # int64 [m]: what every sequence begins with, possibly nothing
    symbols: recall.Symbols | None  # of recall; None: tokens that the text has not
    max_positions: int | None


@dataclasses.dataclass
class Samples:
    """What was measured: for each measure and setting, one entry for each finished seed.

    An entry has the figures of every cache, in their order.
    """

    caches: dict[str, Any]
    not_measured: dict[str, str]  # reasons by cache
    found: dict[str, dict[Any, list[list[Any]]]]
    interrupted: bool = False
    # Why kvcore's caches or attention did less than their name says, with how often.
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)


def check_plan(subject: Subject, plan: Plan) -> None:
    """Raises ValueError, naming the setting, if the plan does not fit the model or the text."""
    for measure, tokens in plan.longest().items():
        tokens += len(subject.prefix)
        if subject.max_positions is not None and tokens > subject.max_positions:
            settings = {
                "text": "context or scored",
                "needle": "lengths",
                "pairs": "pairs_length or pairs",
                "pitfalls": "pairs_length",
            }
            raise ValueError(
                f"{measure}: sequences of {tokens} tokens exceed the {subject.max_positions} "
                f"positions of {subject.name}; smaller {settings[measure]} would fit"
            )


Job = tuple[str, Any, int, Callable[[Callable[[int], None]], list[Any]]]


def _jobs(subject: Subject, choices: Sequence[Any], plan: Plan) -> Iterator[Job]:
    """Measure, setting, tokens that it takes, and what measures it, for every seed in turn."""
    model = subject.model
    sizes = {"chunk": plan.chunk, "batch": plan.batch}
    symbols = subject.symbols
    if symbols is None and set(plan.measures) - {"text"}:
        most = max(*plan.pairs, plan.depths, pitfalls.SEGMENTS * pitfalls.PER_SEGMENT)
        vocab_size = model.get_input_embeddings().weight.shape[0]
        symbols = recall.free_symbols(subject.tokens, vocab_size, subject.decode, most)

    def asking(measure: str, setting: Any, asked: recall.Prompts, run: Callable) -> Job:
        return (
            measure,
            setting,
            num_tokens(asked.tokens, asked.context_len, choices),
            lambda step: run(model, choices, asked, on_step=step, **sizes),
        )

    for seed in range(plan.seeds):
        draws = recall.Draws(subject.tokens, subject.prefix, symbols, seed)
        if "text" in plan.measures:
            sample = text.draw(
                subject.tokens,
                subject.prefix,
                subject.decode,
                seed=seed,
                seeds=plan.seeds,
                sequences=plan.sequences,
                context=plan.context,
                scored=plan.scored,
            )
            yield (
                "text",
                None,
                num_tokens(sample.tokens, sample.context_len, choices),
                lambda step, s=sample: text.score(model, choices, s, on_step=step, **sizes),
            )
        if "needle" in plan.measures:
            for length in plan.lengths:
                asked = recall.needles(draws, plan.prompts, length, plan.needle_depths)
                yield asking("needle", length, asked, recall.recall)
        if "pairs" in plan.measures:
            for number in plan.pairs:
                asked = recall.pairs(draws, plan.prompts, plan.pairs_length, number)
                yield asking("pairs", number, asked, recall.recall)
        if "pitfalls" in plan.measures:
            # A prompt is two rows.
            rows = -(-plan.prompts // 2)
            asked = pitfalls.ordered_prompts(draws, rows, plan.pairs_length)
            yield asking("pitfalls", "order", asked, pitfalls.unevenness)
            prompt = asked.tokens[:1, : asked.context_len]
            tokens = prompt.numel()

            def read_back(step: Callable[[int], None], p: Tensor = prompt) -> list[Any]:
                found = pitfalls.stored(model, choices, p)
                step(p.numel())
                return found

            yield "pitfalls", "stored", tokens, read_back


def measure(
    subject: Subject,
    caches: dict[str, Any],
    plan: Plan,
    progress: Callable[[str, int], Any] | None = None,
) -> Samples:
    """Runs a plan. Ctrl-C ends it and keeps the seeds and settings that were finished.

    Args:
        subject: the model and the text.
        caches: by name; those that cannot serve the model are left out, with the reason. The full
            cache is always run, as the reference.
        plan: what and how much.
        progress: called with the model's name and the number of tokens to come; a context manager
            that gives a function to call with the number of tokens done.

    Raises:
        ValueError: if the plan does not fit the model or the text.
    """
    check_plan(subject, plan)
    reasons = {name: why_not(choice, subject.model) for name, choice in caches.items()}
    not_measured = {name: reason for name, reason in reasons.items() if reason is not None}
    usable = {name: choice for name, choice in caches.items() if name not in not_measured}
    usable = {"dynamic": FULL, **{n: c for n, c in usable.items() if c != FULL}}
    samples = Samples(usable, not_measured, {})
    reasons_of_kvcore.clear_fallback_reasons()
    jobs = list(_jobs(subject, list(usable.values()), plan))
    try:
        total = sum(job[2] for job in jobs)
        with progress(subject.name, total) if progress else _SILENT as step:
            for name, setting, _, run in jobs:
                found = run(step)
                samples.found.setdefault(name, {}).setdefault(setting, []).append(found)
    except KeyboardInterrupt:
        samples.interrupted = True
    samples.fallbacks = reasons_of_kvcore.fallback_reasons()
    return samples


def text_tokens(texts: Sequence[str], encode: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Texts as ids ``[n]``, one after the other, and what `encode` puts before any text ``[m]``.

    Raises:
        ValueError: if there is no text in them.
    """
    if not any(part.strip() for part in texts):
        raise ValueError("the text is empty")
    prefix, tokens = (encode(part)[0].cpu().long() for part in ("", "\n".join(texts)))
    if len(prefix) and torch.equal(tokens[: len(prefix)], prefix):
        tokens = tokens[len(prefix) :]
    return tokens, prefix
