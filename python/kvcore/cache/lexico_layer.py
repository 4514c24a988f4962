"""One attention layer of a :class:`kvcore.cache.LexicoCache`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcore.cache import lexico_files
from kvcore.cache.dictionaries import Dictionaries
from kvcore.cache.layer import CompressedLayer
from kvcore.cache.lexico_settings import LexicoSettings
from kvcore.cache.lexico_store import Context, LexicoStore
from kvcore.cache.padding import PaddingTracker
from kvcore.cache.view import LazyKV, Snapshot


class LexicoSnapshot(Snapshot):
    """A layer as it was when it was read, with the tokens that were not coded then."""

    __slots__ = ("context",)

    def __init__(self, layer: LexicoLayer, num_tokens: int, context: Context | None = None) -> None:
        super().__init__(layer, num_tokens)
        self.context = context

    def rebuild(self) -> tuple[Tensor, Tensor]:
        return self.context.dequantize()

    def attend(self, q: Tensor, *, scale: float | None, causal: bool) -> Tensor:
        return self.context.decode(q, scale=scale, causal=causal)


class LexicoLayer(CompressedLayer):
    """K and V of one layer as codes over its dictionaries, but for the newest tokens.

    The store begins with the first update. :meth:`update` returns exact tensors of it; afterwards,
    the tokens of the call and at least the ``buffer_tokens`` before them are read as they came, and
    those before as coded. A crop that takes no token out of the codes is exact.
    """

    title = "LexicoLayer"
    store_kinds = ("blocks", "tail", "buffer", "session")
    settings: LexicoSettings
    store: LexicoStore | None

    def __init__(
        self,
        settings: LexicoSettings,
        dictionaries: Dictionaries,
        tracker: PaddingTracker | None = None,
        layer_idx: int = 0,
    ) -> None:
        self.dictionaries = dictionaries
        super().__init__(settings, tracker, layer_idx)

    def _check_first(self, k: Tensor) -> None:
        head_dim = self.dictionaries.head_dim
        if k.shape[3] != head_dim:
            raise ValueError(
                f"LexicoLayer: key_states must have the head_dim of the dictionaries, {head_dim}, "
                f"got {k.shape[3]}"
            )

    def _new_store(self, batch: int, kv_heads: int) -> LexicoStore:
        pair = self.dictionaries.pair(self.layer_idx, self.device)
        shape = (batch, kv_heads, self.dictionaries.head_dim)
        return LexicoStore.empty(self.settings, pair, shape, self.dtype, self.device)

    def _begin(self, k: Tensor, v: Tensor, padding: np.ndarray) -> LexicoStore:
        store = self._new_store(*k.shape[:2])
        store.append(k.detach(), v.detach(), padding)
        return store

    def _append(self, k: Tensor, v: Tensor, padding: np.ndarray | None) -> tuple[LazyKV, LazyKV]:
        # Views need the context, which comes of the append: what they allocate comes first.
        views = LazyKV.pair(LexicoSnapshot(self, self.store.num_tokens + k.shape[2]))
        views[0].snapshot.context = self.store.append(k, v, padding)
        return views

    def _snapshot(self) -> LexicoSnapshot:
        self.prefetch()
        return LexicoSnapshot(self, self.store.num_tokens, self.store.context())

    # ---- files

    file_kind = "lexico"
    stored_state = "coded"
    stored_facts = lexico_files.STORE_FACTS

    def export_store(self) -> tuple[dict, dict[str, Tensor]] | None:
        if self.store is None:
            return None
        given = self.dictionaries.atoms()[self.layer_idx]
        return lexico_files.export_store(self.store, given)

    def stored_form(self, row: dict, dtype: torch.dtype, field: str) -> dict[str, tuple]:
        pair = self.dictionaries[self.layer_idx]
        return lexico_files.store_form(row, self.settings, pair, dtype, field)

    def check_stored(self, row: dict, tensors: dict[str, Tensor], field: str) -> None:
        pair = self.dictionaries.pair(self.layer_idx, torch.device("cpu"))
        lexico_files.check_store(row, tensors, self.settings, pair, field)

    def restore_store(
        self, row: dict, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._adopt_shape((row["batch"], row["kv_heads"], row["head_dim"]), dtype, device)
        store = self._new_store(row["batch"], row["kv_heads"])
        lexico_files.fill_store(store, row, tensors, device)
        self.store = store
