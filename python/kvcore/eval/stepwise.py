"""Teacher-forced scoring: each scored token is predicted from what the cache returns.

One forward pass over a whole text never reads its cache, and scores any compression as lossless.
So a context is prefilled, and the tokens after it are fed in steps that attend over the cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvcore.cache.settings import PAGE_TOKENS


def _forward(
    model: Any, tokens: Tensor, cache: Any, *, last_only: bool, begin: int | None = None
) -> Tensor:
    """With `begin`, the position of the first token, the cache's length says nothing of it."""
    kwargs = {}
    if begin is not None:
        stop = begin + tokens.shape[1]
        kwargs["position_ids"] = torch.arange(begin, stop, device=tokens.device)[None]
    if last_only and "logits_to_keep" in inspect.signature(model.forward).parameters:
        kwargs["logits_to_keep"] = (
            1  # a prefill's logits over a large vocabulary outweigh the model
        )
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, **kwargs).logits


def _steps(begin: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most `chunk` positions, none with a page's last among others."""
    while begin < end:
        last_of_page = begin // PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS - 1
        stop = min(begin + chunk, end, max(last_of_page, begin + 1))
        yield begin, stop
        begin = stop


def fill_from_prefill(cache: Any, prefilled: Any) -> None:
    """Gives an empty cache what the same prompt left in a full cache.

    That is what the prompt's own forward pass would have given it, as long as attention over a
    prompt does not read the cache (kvcore's caches return the exact K and V of the first update). A
    prompt then has to be run once for any number of caches.

    Args:
        cache: a new `Cache`; layers of other types than `prefilled`'s get K and V by ``update``.
        prefilled: a transformers `DynamicCache` of one forward pass; it stays as it is.
    """
    for index, layer in enumerate(prefilled.layers):
        if type(cache.layers[index]) is type(layer):
            cache.layers[index] = copy.deepcopy(layer)
        else:
            cache.layers[index].update(layer.keys, layer.values)


def prefill(model: Any, tokens: Tensor) -> Any:
    """A full `DynamicCache` that holds tokens, int64 ``[batch, length]``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        _forward(model, tokens, cache, last_only=True)
    return cache


def repeated(prefilled: Any, times: int) -> Any:
    """What `prefill` made of one sequence, for `times` that begin with it; itself if that is 1."""
    if times == 1:
        return prefilled
    from kvcore.cache.linear import repeat_layer

    prefilled = copy.deepcopy(prefilled)
    for layer in prefilled.layers:
        repeat_layer(layer, times)
    return prefilled


def stepwise_scores(
    model: Any,
    cache_factory: Callable[[], Any],
    tokens: Tensor,
    *,
    context_len: int,
    chunk: int = 1,
    positions: Tensor | None = None,
    prefilled: Any | None = None,
    evicts: bool = False,
    on_cache: Callable[[Any], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Log-probabilities of the tokens after a context, each predicted through the cache.

    The first `context_len` tokens are prefilled; the rest but the last are then fed `chunk` at a
    time, each step attending causally over the cache. The prediction that the prefill itself makes
    (of token `context_len`) is not scored: it need not have read the cache.

    Args:
        model: a causal language model of transformers in evaluation mode, with the attention
            implementation that suits the cache.
        cache_factory: returns a new empty cache.
        tokens: int64 ``[batch, length]``, sequences of equal length without padding.
        context_len: prefilled tokens; with 0 the first token is a step of its own.
        chunk: tokens per step, at most. 1 is decoding; more is faster and reads nearly the same,
            because the token that fills a page (`PAGE_TOKENS`) gets a step of its own: in a step
            with others these would read their own page at its final width, too early.
        positions: int64 ``[n]``, ascending: keep only the predictions made by tokens at these
            positions of the sequence (in ``[context_len, length - 2]``).
        prefilled: what `prefill` made of the first `context_len` tokens; the prompt is then not run
            again. See `fill_from_prefill` for when that is the same.
        evicts: the cache may hold fewer tokens than it was given, so the model is told positions.
        on_cache: called with the filled cache at the end.
        on_step: called after each forward pass with the number of tokens it took.

    Returns:
        fp32 natural-log ``[batch, steps, vocab]``, ``steps = length - context_len - 1``: entry i
        predicts token ``context_len + i + 1``. With `positions`, ``[batch, n, vocab]``.

    Raises:
        ValueError: for lengths that leave nothing to score.
    """
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have shape [batch, length], got {list(tokens.shape)}")
    length = tokens.shape[1]
    if not 0 <= context_len <= length - 2:
        raise ValueError(
            f"context_len must lie in [0, {length - 2}] for {length} tokens, got {context_len}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    keep = torch.zeros(length, dtype=torch.bool)
    if prefilled is not None and prefilled.get_seq_length() != context_len:
        raise ValueError(
            f"prefilled must hold context_len = {context_len} tokens, got "
            f"{prefilled.get_seq_length()}"
        )
    if positions is None:
        keep[context_len : length - 1] = True
    else:
        if positions.numel() and not (
            context_len <= int(positions.min()) and int(positions.max()) <= length - 2
        ):
            raise ValueError(
                f"positions must lie in [{context_len}, {length - 2}], got "
                f"{int(positions.min())} to {int(positions.max())}"
            )
        keep[positions] = True

    cache = cache_factory()
    kept = []
    with torch.no_grad():
        if prefilled is not None:
            fill_from_prefill(cache, prefilled)
        elif context_len:
            begin = 0 if evicts else None
            _forward(model, tokens[:, :context_len], cache, last_only=True, begin=begin)
            if on_step is not None:
                on_step(tokens.shape[0] * context_len)
        # What a cache is given first it may return exactly, however much it is.
        first = [] if context_len else [(0, 1)]
        for start, stop in [*first, *_steps(context_len or 1, length - 1, chunk)]:
            begin = start if evicts else None
            logits = _forward(model, tokens[:, start:stop], cache, last_only=False, begin=begin)
            logits = logits[:, keep[start:stop].to(logits.device)]
            kept.append(torch.log_softmax(logits.float(), dim=-1))
            if on_step is not None:
                on_step(tokens.shape[0] * (stop - start))
    if on_cache is not None:
        on_cache(cache)
    return torch.cat(kept, dim=1)
