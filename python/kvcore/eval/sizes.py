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
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storage_bytes(*values: Any) -> int:
    # A view keeps its whole storage alive, and two views of one storage share it.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(values)}
    return sum(storage.nbytes() for storage in storages.values())


def cache_bytes(cache: Any) -> CacheBytes:
    """Bytes of a transformers `Cache`, compressed or not, over all its layers.

    Layers that know their size (``nbytes()``) are asked; of the others the storages of keys and
    values are counted. Convolution and recurrent states count as ``state``.
    """
    kv = state = 0
    for layer in cache.layers:
        state += _storage_bytes(
            getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None)
        )
        if hasattr(layer, "nbytes"):
            kv += layer.nbytes()
        else:
            kv += _storage_bytes(getattr(layer, "keys", None), getattr(layer, "values", None))
    return CacheBytes(kv, state)
