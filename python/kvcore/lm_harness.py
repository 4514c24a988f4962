"""lm-evaluation-harness with kvcore's caches: its model type ``kvcore``.

    kvcore lm-eval --model_args pretrained=PATH_OR_ID,cache=turbo:4 --tasks TASK ...

or, with the harness's own functions, ``import kvcore.lm_harness`` and then ``model="kvcore"``.

Left alone, the harness scores the log-likelihood of an answer in one forward pass, in which no
cache is ever read: any compression would come out lossless. Here the context is prefilled, and its
last token and those of the answer are fed in steps that attend over the cache. Generative tasks
give the cache to ``generate``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm

from kvcore.demo import models
from kvcore.eval import prefill, specs, stepwise_scores
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

        Answers are scored one by one: the steps of one would read the padding of another.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        shared: tuple[list[int], Any] = ([], None)
        # Answers to one question stand together, and its context is run once.
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        hidden = disable_tqdm or self.rank != 0
        attention = self.choice.attention(self.model)
        with attention, tqdm(order, desc="answers through the cache", disable=hidden) as bar:
            for i in bar:
                request, context, answer = requests[i]
                context = self._fitting(context, answer)
                # Its last token predicts the first of the answer, and has to read the cache for it.
                prompt = context[:-1]
                if shared[0] != prompt:
                    ids = torch.tensor([prompt], device=self.device)
                    shared = prompt, prefill(self.model, ids) if prompt else None
                answers[i] = self._score(context + answer, len(answer), shared[1])
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, answers[i])
        return answers

    def _fitting(self, context: list[int], answer: list[int]) -> list[int]:
        """The end of a context that fits the model; the last token of the answer is not fed."""
        room = self.max_length + 1 - len(answer)
        if not answer or not context or room < 1:
            raise RefusedError(
                f"an answer must have from 1 to {self.max_length} tokens and a context before it, "
                f"got {len(answer)} after {len(context)}"
            )
        return context[-room:]

    def _score(self, tokens: list[int], count: int, prefilled: Any) -> tuple[float, bool]:
        """Of the last `count` tokens."""
        ids = torch.tensor([tokens], device=self.device)
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            scores = stepwise_scores(
                self.model,
                lambda: self.choice.make(self.model),
                ids,
                context_len=len(tokens) - count - 1,
                chunk=self.chunk,
                prefilled=prefilled,
            )[0]
        targets = ids[0, -count:]
        total = scores.gather(-1, targets[:, None]).sum().item()
        return total, bool((scores.argmax(-1) == targets).all())


def main(options: Sequence[str]) -> int:
    """Runs the harness's command with `options`, its model being ``kvcore``; returns 0."""
    from lm_eval.__main__ import cli_evaluate

    words = list(options)
    if words[:1] not in (["ls"], ["validate"]):
        words = ["run", "--model", "kvcore", *words[words[:1] == ["run"] :]]
    sys.argv = ["lm-eval", *words]
    cli_evaluate()
    return 0
