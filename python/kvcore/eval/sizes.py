"""Bytes that a cache holds, told apart: what grows with the context and what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """``kv`` of attention layers grows with the context; ``state`` of recurrent ones does not."""

    kv: int
    state: int

    @property
    def total(self) -> int:
        return self.kv + self.state


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a wrapper, whose own storage is empty
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storages(*values: Any) -> dict[int, int]:
    """Bytes of each storage by its address."""
    # A view keeps its whole storage alive, and two views of one storage share it.
    storages = (t.untyped_storage() for t in _tensors(values))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


_STATES = ("conv_states", "recurrent_states")


def cache_bytes(cache: Any) -> CacheBytes:
    """Bytes of a transformers `Cache`, compressed or not, over all its layers.

    Layers that know their size (``nbytes()``) are asked; of the others the storages of every tensor
    that the layer holds are counted. Convolution and recurrent states count as ``state``.
    """
    kv = state = 0
    for layer in cache.layers:
        states = _storages(*(getattr(layer, name, None) for name in _STATES))
        state += sum(states.values())
        if hasattr(layer, "nbytes"):
            kv += layer.nbytes()
        else:
            held = {**_storages(vars(layer)), **dict.fromkeys(states, 0)}
            kv += sum(held.values())
    return CacheBytes(kv, state)


def bytes_16bit(config: Any, num_tokens: int) -> int:
    """Bytes in 16 bit of one sequence's K and V, in the attention layers that `config` names."""
    config = config.get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = {"full_attention": num_tokens}
    if window := getattr(config, "sliding_window", None):
        # The newest token sees itself and window - 1 others, which is what such a layer keeps.
        kept["sliding_attention"] = min(num_tokens, window - 1)
    return sum(kept.get(layer, 0) for layer in layers) * 2 * heads * head_dim * 2
