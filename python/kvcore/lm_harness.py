"""lm-evaluation-harness with kvcore's caches: its model type ``kvcore``.

    kvcore lm-eval --model_args pretrained=PATH_OR_ID,cache=turbo:4 --tasks TASK ...

or, with the harness's own functions, ``import kvcore.lm_harness`` and then ``model="kvcore"``.

Left alone, the harness scores the log-likelihood of an answer in one forward pass, in which no
cache is ever read: any compression would come out lossless. Here the context is prefilled, and its
last token and those of the answer are fed in steps that attend over the cache. Generative tasks
give the cache to ``generate``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm

from kvcore.demo import models
from kvcore.eval import prefill, repeated, specs, stepwise_scores
from kvcore.eval.peers import why_not


class RefusedError(ValueError):
    """A cache that a model cannot have, or that cannot be what is measured."""


@register_model("kvcore")
class KVCoreLM(HFLM):
    """`HFLM` through a cache.

    Args:
        pretrained: hybrid or control (shipped with kvcore, in fp32), or what `HFLM` takes.
        cache: as of ``kvcore eval`` (`kvcore.eval.specs`).
        dictionaries: of a lexico cache; None: beside the model's weights.
        chunk: tokens of a step in log-likelihoods, at most; 1 is decoding itself.
        **arguments: those of `HFLM`.

    Raises:
        RefusedError: for an unknown cache, one that the model cannot have, or an encoder-decoder
            model.
    """

    def __init__(
        self,
        pretrained: Any,
        cache: str = "turbo:4",
        dictionaries: str | None = None,
        chunk: int = 32,
        **arguments: Any,
    ) -> None:
        try:
            self.choice = specs.parse(cache, dictionaries)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        if self.choice.evicts:
            # Answers that share a context share its prefill, which has lost nothing; and generate
            # takes positions from the number of tokens in the cache.
            raise RefusedError(f"cache {cache}: caches that evict tokens are for kvcore eval alone")
        if int(chunk) < 1:
            raise RefusedError(f"chunk must be at least 1, got {chunk}")
        self.chunk = int(chunk)
        if isinstance(pretrained, str) and pretrained in models.NAMES:
            arguments = {"tokenizer": models.tokenizer(), "dtype": "float32", **arguments}
            pretrained = str(models.path(pretrained))
        super().__init__(pretrained=pretrained, **arguments)
        if self.backend != "causal":
            raise RefusedError(f"the model must be a decoder alone, got {self.backend}")
        reason = why_not(self.choice, self.model)
        if reason is not None:
            raise RefusedError(f"cache {cache}: {reason}")

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **arguments: Any
    ) -> Tensor:
        with self.choice.attention(self.model):
            cache = self.choice.make(self.model)
            return super()._model_generate(
                context, max_length, stop, past_key_values=cache, **arguments
            )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each answer, and whether it is what greedy decoding would say.

        Answers to one context share its prefill, and those of one length run together, up to the
        batch size. Others do not: a cache cuts tokens into pages and blocks by their number and
        scales them by the largest of a step, padding counted, so that a score would depend on what
        else is in its batch.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        contexts = [self._fitting(context, answer) for _, context, answer in requests]

        def prompt(i: int) -> list[int]:
            # The last token predicts the first of the answer, and has to read the cache for it.
            return contexts[i][:-1]

        def length(i: int) -> int:
            return len(requests[i][2])

        order = sorted(range(len(requests)), key=lambda i: (prompt(i), length(i)))
        size = self._answers_together(override_bs)
        hidden = disable_tqdm or self.rank != 0
        bar = tqdm(total=len(order), desc="answers through the cache", disable=hidden)
        with self.choice.attention(self.model), self._autocast(), bar:
            for shared, group in itertools.groupby(order, prompt):
                ids = torch.tensor([shared], device=self.device)
                prefilled = prefill(self.model, ids) if shared else None
                for _, alike in itertools.groupby(group, length):
                    # Without a prompt to begin with, a cache may scale one by the other.
                    for part in _parts(list(alike), size if shared else 1):
                        fed = [contexts[i][-1:] + requests[i][2] for i in part]
                        for i, found in zip(part, self._score(shared, fed, prefilled), strict=True):
                            answers[i] = found
                            if requests[i][0] is not None:
                                self.cache_hook.add_partial("loglikelihood", requests[i][0], found)
                        bar.update(len(part))
        return answers

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _answers_together(self, override_bs: int | None) -> int:
        size = override_bs or self.batch_size  # which may be "auto"
        # All sequences of a batch have the same heads at 2 bits: one would choose those of another.
        depend = getattr(self.choice, "low_bit_heads", 0) > 0
        return size if isinstance(size, int) and not depend else 1

    def _fitting(self, context: list[int], answer: list[int]) -> list[int]:
        """The end of a context that fits the model; the last token of the answer is not fed."""
        room = self.max_length + 1 - len(answer)
        if not answer or not context or room < 1:
            raise RefusedError(
                f"an answer must have from 1 to {self.max_length} tokens and a context before it, "
                f"got {len(answer)} after {len(context)}"
            )
        return context[-room:]

    def _score(
        self, prompt: list[int], fed: list[list[int]], prefilled: Any
    ) -> list[tuple[float, bool]]:
        """Of rows of a context's last token and an answer each, of one length, behind a prompt."""
        ids = torch.tensor([prompt + row for row in fed], device=self.device)
        scores = stepwise_scores(
            self.model,
            lambda: self.choice.make(self.model),
            ids,
            context_len=len(prompt),
            chunk=self.chunk,
            prefilled=prefilled and repeated(prefilled, len(fed)),
        )
        answers = ids[:, len(prompt) + 1 :]
        totals = scores.gather(-1, answers[..., None]).sum((1, 2)).tolist()
        greedy = (scores.argmax(-1) == answers).all(1).tolist()
        return list(zip(totals, greedy, strict=True))


def _parts(items: list[int], size: int) -> list[list[int]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def main(options: Sequence[str]) -> int:
    """Runs the harness's command with `options`, its model being ``kvcore``; returns 0."""
    from lm_eval.__main__ import cli_evaluate

    words = list(options)
    if words[:1] not in (["ls"], ["validate"]):
        words = ["run", "--model", "kvcore", *words[words[:1] == ["run"] :]]
    sys.argv = ["lm-eval", *words]
    cli_evaluate()
    return 0
