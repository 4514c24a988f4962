"""One attention layer of a :class:`kvcore.cache.TurboCache`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcore.cache import file_format, store_files
from kvcore.cache.file_format import check
from kvcore.cache.layer import CompressedLayer
from kvcore.cache.padding import PaddingTracker
from kvcore.cache.settings import PAGE_TOKENS, TurboSettings
from kvcore.cache.store import TurboStore
from kvcore.cache.view import LazyKV, Snapshot


class TurboLayer(CompressedLayer):
    """K and V of one layer in the FlashQ store, grown token by token.

    Until a sequence has 64 tokens, K and V are held exactly: K's balance and mean are frozen when
    the store begins, and taken from a handful of tokens they would be noise that every later token
    has to live with. The first update after which some sequence has 64 tokens calibrates on
    all tokens so far and quantizes them.

    Full pages are shared by the sequences that a reordering or a repetition makes of one. A crop of
    up to 64 tokens is exact.
    """

    title = "TurboLayer"
    store_kinds = ("tail", "table", "calibration")
    settings: TurboSettings
    store: TurboStore | None

    def __init__(
        self,
        settings: TurboSettings | None = None,
        tracker: PaddingTracker | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__(settings or TurboSettings(), tracker, layer_idx)

    def _check_first(self, k: Tensor) -> None:
        if self.settings.rotary_dim > k.shape[3]:
            raise ValueError(
                f"TurboLayer: rotary_dim must be at most the head_dim of {k.shape[3]}, "
                f"got {self.settings.rotary_dim}"
            )

    def _begin(self, k: Tensor, v: Tensor, padding: np.ndarray) -> TurboStore | None:
        num_tokens = k.shape[2]
        if num_tokens - padding.min(initial=num_tokens) < PAGE_TOKENS:
            return None
        return TurboStore.quantize(k, v, padding, self.settings)

    def _step(self, k: Tensor, v: Tensor) -> tuple[LazyKV, LazyKV] | None:
        """An update by tokens that fill no page, or None if it is more than that.

        While a large model runs, code and data leave the caches between two steps, and each look at
        a tensor then costs microseconds. So the op's checks stand for the layer's, except for the
        one that it does not make; when it refuses, the layer's say why.
        """
        store = self.store
        if (
            self._is_away
            or store.may_have_empty
            or self.tracker.native is False
            or torch.is_grad_enabled()
            or k.dtype is not self.dtype
            or v.dtype is not self.dtype
        ):
            return None
        try:
            num_tokens = store.num_tokens + k.shape[2]
            if num_tokens >= store.next_fill:
                return None
            # Before the append: an update that fails has not happened.
            views = LazyKV.pair(Snapshot(self, num_tokens))
            store.append_to_open_page(k, v, num_tokens)
        except Exception:
            self._check_states(k, v)
            raise
        return views

    def _append(self, k: Tensor, v: Tensor, padding: np.ndarray | None) -> tuple[LazyKV, LazyKV]:
        # Before the append: an update that fails has not happened.
        views = LazyKV.pair(Snapshot(self, self.store.num_tokens + k.shape[2]))
        if k.shape[2]:
            self.store.append(k, v, padding)
        return views

    def report(self) -> dict:
        return {"pool": {}, **super().report()}

    # ---- files

    file_kind = "turbo"
    stored_state = "quantized"
    stored_facts = file_format.STORE_FACTS

    def file_facts(self) -> dict:
        return {"layer_k_bits": self.settings.k_bits, "layer_v_bits": self.settings.v_bits}

    def export_store(self) -> tuple[dict, dict[str, Tensor]] | None:
        store = self.synced_store()
        return (
            store_files.export_store(store) if store is not None and store.is_calibrated else None
        )

    def stored_form(self, row: dict, dtype: torch.dtype, field: str) -> dict[str, tuple]:
        settings = self.settings
        calibrates = settings.balance or settings.subtract_mean
        check(row["calibrated"] == calibrates, f"{field}.calibrated", calibrates, row["calibrated"])
        form = file_format.store_form(row, field)
        num_low = settings.num_low_heads(row["kv_heads"])
        for name in ("k_bits", "v_bits"):
            others = [getattr(settings, name)] * (row["kv_heads"] - num_low)
            widths = sorted([2] * num_low + others)
            holds = sorted(row[name]) == widths
            check(holds, f"{field}.{name}", f"{widths} in any order", row[name])
        return form

    def check_stored(self, row: dict, tensors: dict[str, Tensor], field: str) -> None:
        file_format.check_store(row, tensors, self.settings.sink_pages, field)

    def restore_store(
        self, row: dict, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._adopt_shape((row["batch"], row["kv_heads"], row["head_dim"]), dtype, device)
        self.store = store_files.restore_store(self.settings, row, tensors, device)
