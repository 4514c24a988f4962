"""Generation with a chosen cache, streamed and timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcore.eval import CacheBytes, bytes_16bit, cache_bytes
from kvcore.eval.caches import CacheChoice


@dataclasses.dataclass(frozen=True)
class Generated:
    """Tokens made after a prompt, what the cache held at the end, and how long it took."""

    tokens: list[int]
    prompt_len: int
    bytes: CacheBytes
    # Bytes of the same K and V in 16 bit, the width that compression factors are stated against.
    bytes_16bit: int
    prefill_seconds: float
    decode_seconds: float  # of all tokens but the first, which the prefill yields
    cache: Any = dataclasses.field(repr=False, compare=False)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone; NaN for fewer than two tokens."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps > 0 else float("nan")


class _Stream:
    """Gets each new token from ``generate`` and notes when the first arrived."""

    def __init__(self, on_token: Callable[[int], None] | None) -> None:
        self.on_token = on_token
        self.is_prompt = True
        self.tokens: list[int] = []
        self.first_at = self.last_at = 0.0

    def put(self, value: Tensor) -> None:
        if self.is_prompt:  # generate sends the prompt first
            self.is_prompt = False
            return
        self.last_at = time.perf_counter()
        for token in value.flatten().tolist():
            if not self.tokens:
                self.first_at = self.last_at
            self.tokens.append(token)
            if self.on_token is not None:
                self.on_token(token)

    def end(self) -> None:
        pass


def generate(
    model: Any,
    prompt: Tensor,
    choice: CacheChoice,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """Continues `prompt` (int64 ``[1, tokens]``) with the chosen cache.

    Args:
        model: a causal language model of transformers.
        prompt: token ids.
        choice: the cache.
        max_new_tokens: at least 1.
        temperature: 0 takes the most likely token.
        seed: of the sampling.
        stop_at_eos: end at the model's end-of-text token, where it has one.
        on_token: called with each token as it is made.
    """
    if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must have shape [1, tokens], got {list(prompt.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    sampling = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    if not stop_at_eos:
        sampling["eos_token_id"] = None
    stream = _Stream(on_token)
    with choice.attention(model), torch.no_grad():
        cache = choice.make(model)
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=stream,
            **sampling,
        )
    return Generated(
        tokens=stream.tokens,
        prompt_len=prompt.shape[1],
        bytes=cache_bytes(cache),
        bytes_16bit=bytes_16bit(model.config, cache.get_seq_length()),
        prefill_seconds=stream.first_at - start,
        decode_seconds=stream.last_at - stream.first_at,
        cache=cache,
    )
