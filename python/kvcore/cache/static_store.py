"""A store of fixed capacity whose tensors never move, for compiled decoding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcore.cache.calibration import calibrate, left_padding_tensor
from kvcore.cache.pages import PagePool
from kvcore.cache.settings import PAGE_TOKENS, TAIL_SLOTS, TurboSettings, block_bytes
from kvcore.cache.store import TurboStore, token_counts
from kvcore.cache.tensors import ordinary_tensors


class StaticStore(TurboStore):
    """A store that holds a block for every page up front.

    Everything is changed in place, so a compiled graph keeps its addresses and the host has nothing
    to do between two steps. The host's count of tokens is therefore set before it is needed: see
    ``sync``.
    """

    def __init__(
        self,
        settings: TurboSettings,
        shape: tuple[int, int, int],
        capacity: int,
        device: torch.device,
    ) -> None:
        """Allocates everything.

        Args:
            settings: widths and calibration.
            shape: batch, kv_heads and head_dim.
            capacity: most tokens of a sequence, padding counted.
            device: of every tensor.
        """
        batch, kv_heads, head_dim = shape
        self.capacity = capacity
        num_pages = capacity // PAGE_TOKENS
        head_bits = np.array([[settings.k_bits] * kv_heads, [settings.v_bits] * kv_heads])
        # Which heads will be the low ones is not known yet, but how many is.
        head_bits[:, : settings.num_low_heads(kv_heads)] = 2
        pool = PagePool(head_dim, device)
        sinks = min(settings.sink_pages, num_pages)
        counts = dict(zip(*np.unique(head_bits, return_counts=True), strict=True))
        blocks = {int(bits): batch * (num_pages - sinks) * n for bits, n in counts.items()}
        blocks[8] = blocks.get(8, 0) + batch * sinks * 2 * kv_heads
        for bits, rows in blocks.items():
            if rows:
                pool.grow(bits, rows, column=0)
        per_head = (batch, 2, kv_heads)
        calibration = (batch, kv_heads, head_dim)
        calibrates = settings.balance or settings.subtract_mean
        with ordinary_tensors(), device:
            tensors = {
                "block_table": torch.full((*per_head, num_pages), -1, dtype=torch.int32),
                "tail": torch.zeros(
                    (*per_head, TAIL_SLOTS, block_bytes(8, head_dim)), dtype=torch.uint8
                ),
                "tail_scale": torch.zeros(per_head),
                "clamp_count": torch.zeros(per_head, dtype=torch.int64),
                "seq_lens": torch.zeros(batch, dtype=torch.int32),
                "k_balance": torch.ones(calibration) if calibrates else None,
                "k_mean": torch.zeros(calibration) if calibrates else None,
            }
        padding = np.zeros(batch, dtype=np.int64)
        super().__init__(settings, head_bits, pool, tensors, padding, 0)
        self.clear()

    def begin(self, k: Tensor, v: Tensor, padding: np.ndarray) -> None:
        """Calibrates an empty store on its first tokens and stores them, as ``quantize`` does.

        ``padding`` is that among these tokens; nothing is calibrated while there is nothing else.
        """
        if (padding == k.shape[2]).all():
            self.append(k, v, padding)
            return
        with ordinary_tensors():
            begin = calibrate(k, v, padding, self.settings)
        num_tokens = self.num_tokens + k.shape[2]
        self._check_capacity(num_tokens)
        before = token_counts(self.num_tokens, self.padding)
        counts = token_counts(num_tokens, self.padding + padding)
        try:
            if self.k_balance is not None:
                self.k_balance.copy_(begin.k_balance)
                self.k_mean.copy_(begin.k_mean)
            if (begin.head_bits != self.head_bits).any():
                self.head_bits = begin.head_bits
                self.fill_table()
            for i, left in enumerate(begin.phases(padding, k.shape[2])):
                if i:
                    begin.adopt(self.tail_scale)
                self.append_op(k, v, left_padding_tensor(left, k.device))
        except BaseException:
            self.clear()
            vars(self).update(before)
            raise
        vars(self).update(counts, is_calibrated=True)

    def append(self, k: Tensor, v: Tensor, new_padding: np.ndarray | None = None) -> None:
        num_tokens = self.num_tokens + k.shape[2]
        self._check_capacity(num_tokens)
        left = None if new_padding is None else left_padding_tensor(new_padding, k.device)
        padding = self.padding if new_padding is None else self.padding + new_padding
        counts = token_counts(num_tokens, padding)
        self.append_op(k, v, left)
        vars(self).update(counts)

    def _check_capacity(self, num_tokens: int) -> None:
        if num_tokens > self.capacity:
            raise ValueError(
                f"TurboCache: max_cache_len must be at least {num_tokens} for these tokens, "
                f"got {self.capacity}"
            )

    def sync(self, num_tokens: int) -> None:
        """Tells the host how many tokens compiled steps have stored by now."""
        self.set_tokens(num_tokens, self.padding)

    def rewind(self, num_tokens: int) -> None:
        super().rewind(num_tokens)
        self.fill_table()

    def select(self, indices: list[int]) -> None:
        if len(indices) != self.batch:
            raise ValueError(
                f"TurboCache: a cache with max_cache_len keeps its batch of {self.batch}, "
                f"got {len(indices)} sequences"
            )
        with ordinary_tensors():
            index = torch.tensor(indices, dtype=torch.int64, device=self.seq_lens.device)
            selected = {name: getattr(self, name).index_select(0, index) for name in self.names()}
        for name, tensor in selected.items():
            getattr(self, name).copy_(tensor)
        if self.host_table is not None and self.block_table.device.type != "cpu":
            self.host_table[:] = self.host_table[indices]
        self.set_tokens(self.num_tokens, self.padding[indices])
        self.fill_table()

    def clear(self) -> None:
        """Forgets every token."""
        self.tail.zero_()
        self.tail[..., 4:8] = 255  # header.page_idx = -1: neither slot holds a page
        for tensor in (self.tail_scale, self.clamp_count, self.seq_lens):
            tensor.zero_()
        self.is_calibrated = False
        self.set_tokens(0, np.zeros_like(self.padding))
        self.fill_table()

    def to(self, device: torch.device) -> None:
        if device != self.seq_lens.device:
            raise RuntimeError("TurboCache: a cache with max_cache_len cannot be offloaded")

    def fill_table(self) -> None:
        """Gives every page that is not full a block of its own.

        Full pages may be shared by sequences; then blocks of a dropped sequence are free, and there
        are always enough: each page of each sequence was given one to begin with.
        """
        pages = np.arange(self.host_table.shape[3])
        sequences, empty = np.nonzero(pages >= (self.lens() // PAGE_TOKENS)[:, None])
        self.host_table[sequences, :, :, empty] = -1
        self._may_have_garbage = True
        self._open_pages(np.full(self.batch, self.host_table.shape[3] * PAGE_TOKENS))
        self._publish_table()
