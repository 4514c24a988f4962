"""What a compressed layer returns as K and V: tensors that are built only if someone reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from kvcore.cache.layer import CompressedLayer


class Snapshot:
    """A layer as it was when it was read: its first ``num_tokens`` tokens of one state.

    Appending leaves those tokens in place, so the snapshot stays readable; anything else that
    changes the layer (crop, reorder, select, repeat, reset) ends it.
    """

    __slots__ = ("_tensors", "epoch", "layer", "num_tokens", "width")

    def __init__(self, layer: CompressedLayer, num_tokens: int, width: int | None = None) -> None:
        self.layer = layer
        self.num_tokens = num_tokens
        # Tokens that readers see: the rest is zero.
        self.width = width or self.num_tokens
        self.epoch = layer.epoch
        self._tensors: list[Tensor] | None = None

    @property
    def is_current(self) -> bool:
        """Whether the layer holds these tokens and no others."""
        return self.epoch == self.layer.epoch and self.num_tokens == self.layer.store.num_tokens

    def rebuild(self) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, kv_heads, num_tokens or more, head_dim]``; padding is zero."""
        return self.layer.dequantize()

    def attend(self, q: Tensor, *, scale: float | None, causal: bool) -> Tensor:
        """Attention of ``q`` ``[batch, q_heads, q_len, head_dim]`` over the tokens, shape of q.

        Only while the snapshot is current.
        """
        return self.layer.store.decode(q, scale=scale, causal=causal)

    def materialize(self, kv_idx: int) -> Tensor:
        """K (0) or V (1), ``[batch, kv_heads, width, head_dim]``; padding is zero."""
        if self.epoch != self.layer.epoch:
            raise RuntimeError(
                "kvcore: these keys and values were read from the cache before it was cropped, "
                "reordered, selected from or reset; call update() again to read it"
            )
        if self._tensors is None:
            # K is always read with V: one pass builds both. They live as long as the view does.
            tensors = self.rebuild()
            room = (0, 0, 0, self.width - self.num_tokens)
            tensors = [tensor[:, :, : self.num_tokens] for tensor in tensors]
            self._tensors = [pad(tensor, room) if room[3] else tensor for tensor in tensors]
        return self._tensors[kv_idx]


class LazyKV(Tensor):
    """K or V of a snapshot. kvcore's attention reads the store; any other op, the rebuilt tensor.

    So a model that runs another attention function over a compressed cache is slow, never wrong.
    Tokens are rebuilt as they are stored at that time: once their page is full, at its width.
    """

    __slots__ = ("kv_idx", "snapshot")

    @staticmethod
    def __new__(cls, snapshot: Snapshot, kv_idx: int) -> LazyKV:
        layer = snapshot.layer
        shape = layer.shape_of(snapshot.width)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.device)
        self.snapshot = snapshot
        self.kv_idx = kv_idx
        return self

    @classmethod
    def pair(cls, snapshot: Snapshot) -> tuple[LazyKV, LazyKV]:
        """K and V."""
        return cls(snapshot, 0), cls(snapshot, 1)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def materialize(self) -> Tensor:
        """The tensor, ``[batch, kv_heads, width, head_dim]``."""
        return self.snapshot.materialize(self.kv_idx)

    def __setitem__(self, index: object, value: object) -> None:
        # It would change the rebuilt tensor, which kvcore's attention does not read.
        raise RuntimeError(_read_only("an assignment to a part"))

    def share_memory_(self) -> LazyKV:
        # torch would share a storage that is not there, and crash.
        raise RuntimeError(_read_only("share_memory_()"))

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.materialize().clone()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                if argument.is_write and isinstance(value, cls):
                    raise RuntimeError(_read_only(func))
        args = tree_map_only(cls, cls.materialize, args)
        return func(*args, **tree_map_only(cls, cls.materialize, kwargs))

    def __repr__(self, *, tensor_contents=None) -> str:
        name = "KV"[self.kv_idx]
        return f"LazyKV({name}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _read_only(change: object) -> str:
    return (
        f"kvcore: {change} would change keys or values inside a compressed cache, which are "
        "read-only; clone() them first"
    )
