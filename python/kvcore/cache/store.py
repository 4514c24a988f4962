"""The quantized K and V of one layer, and how they grow, shrink and are shared. No transformers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcore import ops
from kvcore.cache.calibration import calibrate, left_padding_tensor
from kvcore.cache.pages import PagePool
from kvcore.cache.settings import PAGE_TOKENS, TurboSettings
from kvcore.cache.tensors import ordinary_tensors

_append = torch.ops.kvcore.turbo_append.default
_decode = torch.ops.kvcore.turbo_decode.default


class TurboStore:
    """Pages, block table, tail and calibration of one layer, ``csrc/turbo/README.md``'s store.

    ``num_tokens`` counts every token the layer was given; the first ``padding[b]`` of sequence b
    were padding and are not stored, so ``seq_lens = num_tokens - padding``.

    A block is named by the block table for exactly the full pages of each sequence. Sequences may
    share blocks (beams do): full pages are never written again, and a page that is about to fill
    always gets a block that no row names. Who is the last user of a block is read off the table.
    """

    def __init__(
        self,
        settings: TurboSettings,
        head_bits: np.ndarray,
        pool: PagePool,
        tensors: dict[str, Tensor | None],
        padding: np.ndarray,
        num_tokens: int,
    ) -> None:
        self.settings = settings
        self.is_calibrated = True
        self.head_bits = head_bits
        self.pool = pool
        self.block_table: Tensor = tensors["block_table"]
        self.tail: Tensor = tensors["tail"]
        self.tail_scale: Tensor = tensors["tail_scale"]
        self.clamp_count: Tensor = tensors["clamp_count"]
        self.seq_lens: Tensor = tensors["seq_lens"]
        self.k_balance: Tensor | None = tensors["k_balance"]
        self.k_mean: Tensor | None = tensors["k_mean"]
        self.padding = padding
        self.num_tokens = num_tokens
        self.host_table = _host(self.block_table)
        self._may_have_garbage = False
        self.set_tokens(num_tokens, padding)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "host_table"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        # Of the copied table: on the CPU the two are the same memory.
        self.host_table = _host(self.block_table)

    @classmethod
    def quantize(
        cls, k: Tensor, v: Tensor, padding: np.ndarray, settings: TurboSettings
    ) -> TurboStore:
        """Calibrates on K and V and stores them.

        Args:
            k: ``[batch, kv_heads, kv_len, head_dim]``, after the rotary embedding.
            v: shape and dtype of k.
            padding: int64 ``[batch]``, leading tokens of each sequence that are not stored.
            settings: widths and calibration.
        """
        with ordinary_tensors():
            k, v = k.detach(), v.detach()
            begin = calibrate(k, v, padding, settings)
            first, *then = begin.phases(padding, k.shape[2])
            *pools, block_table, tail, tail_scale, clamp_count, seq_lens = ops.turbo_quantize(
                k,
                v,
                begin.k_balance,
                begin.k_mean,
                left_padding_tensor(first, k.device),
                k_bits=begin.head_bits[0].tolist(),
                v_bits=begin.head_bits[1].tolist(),
                sink_pages=settings.sink_pages,
                tail_margin=settings.tail_margin,
            )
            tensors = {
                "block_table": block_table,
                "tail": tail,
                "tail_scale": tail_scale,
                "clamp_count": clamp_count,
                "seq_lens": seq_lens,
                "k_balance": begin.k_balance,
                "k_mean": begin.k_mean,
            }
            slabs = [pool for pool in pools if pool.shape[0]]
            pool = PagePool.adopt(slabs, k.shape[3], k.device)
            store = cls(settings, begin.head_bits, pool, tensors, padding, k.shape[2])
            for left in then:
                # A short sequence fills no page, so nothing needs a block.
                begin.adopt(store.tail_scale)
                store.append_op(k, v, left_padding_tensor(left, k.device))
            return store

    @property
    def device(self) -> torch.device:
        return self.seq_lens.device

    @property
    def batch(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.tail.shape[2]

    @property
    def head_dim(self) -> int:
        return self.pool.head_dim

    def lens(self) -> np.ndarray:
        """int64 ``[batch]``: tokens stored of each sequence."""
        return self.num_tokens - self.padding

    def append(self, k: Tensor, v: Tensor, new_padding: np.ndarray | None = None) -> None:
        """Stores ``num_new`` tokens per sequence.

        Args:
            k: ``[batch, kv_heads, num_new, head_dim]``, not requiring a gradient.
            v: shape and dtype of k.
            new_padding: int64 ``[batch]``, how many leading ones of each sequence are padding; only
                a sequence without tokens can have any.

        If anything fails, the store is as it was.
        """
        num_tokens = self.num_tokens + k.shape[2]
        if num_tokens < self.next_fill and new_padding is None:
            self.append_to_open_page(k, v, num_tokens)
            return
        padding = self.padding if new_padding is None else self.padding + new_padding
        left = None if new_padding is None else left_padding_tensor(new_padding, k.device)
        counts = token_counts(num_tokens, padding)
        cells = self._open_pages(num_tokens - padding)
        try:
            self.append_op(k, v, left)
        except BaseException:
            self._close_pages(cells)
            raise
        vars(self).update(counts)

    def append_to_open_page(self, k: Tensor, v: Tensor, num_tokens: int) -> None:
        """Stores tokens that fill no page: all there will be are fewer than ``next_fill``."""
        self.append_op(k, v, None)
        self.num_tokens = num_tokens

    def append_op(self, k: Tensor, v: Tensor, left_padding: Tensor | None) -> None:
        """The op alone: pages that fill must have blocks, and the host's count is not kept."""
        _append(
            k,
            v,
            self.pool.slabs,
            self.block_table,
            self.tail,
            self.tail_scale,
            self.clamp_count,
            self.seq_lens,
            self.k_balance,
            self.k_mean,
            left_padding,
            tail_margin=self.settings.tail_margin,
        )

    def decode(self, q: Tensor, *, scale: float | None, causal: bool) -> Tensor:
        """Attention of ``q`` ``[batch, q_heads, q_len, head_dim]`` over the store, shape of q."""
        return _decode(
            q,
            self.pool.slabs,
            self.block_table,
            self.tail,
            self.seq_lens,
            self.k_balance,
            self.k_mean,
            causal=causal,
            scale=scale,
            sas_threshold=self.settings.sas_threshold,
        )[0]

    def dequantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, kv_heads, num_tokens, head_dim]``; padding is zero."""
        with torch.no_grad():
            return ops.turbo_dequantize(
                self.pool.slabs,
                self.block_table,
                self.tail,
                self.seq_lens,
                self.k_balance,
                self.k_mean,
                kv_len=self.num_tokens,
                right_align=True,
                dtype=dtype,
            )

    def dequantize_left(self, kv_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, kv_heads, kv_len, head_dim]``; each sequence begins at 0."""
        with torch.no_grad():
            return ops.turbo_dequantize(
                self.pool.slabs,
                self.block_table,
                self.tail,
                self.seq_lens,
                self.k_balance,
                self.k_mean,
                kv_len=kv_len,
                dtype=dtype,
            )

    def rewind(self, num_tokens: int) -> None:
        """Drops the newest tokens, so that ``num_tokens`` stay (padding counted)."""
        padding = np.minimum(self.padding, num_tokens)
        new_lens = num_tokens - padding
        with ordinary_tensors():
            lens = torch.from_numpy(new_lens.astype(np.int32)).to(self.seq_lens.device)
            table = self._table_of(new_lens)
            counts = token_counts(num_tokens, padding)
            ops.turbo_rewind(self.pool.slabs, self.block_table, self.tail, self.seq_lens, lens)
        vars(self).update(counts)
        if table is not None:
            self._may_have_garbage = True
            self.host_table[...] = table
            self._publish_table()

    def _table_of(self, new_lens: np.ndarray) -> np.ndarray | None:
        """The table once these lengths are left; None if it stays as it is.

        A page that was full and is open again keeps no block: another sequence may share it.
        """
        left = new_lens // PAGE_TOKENS
        if (left == self.lens() // PAGE_TOKENS).all():
            return None
        is_dropped = np.arange(self.host_table.shape[3]) >= left[:, None, None, None]
        return np.where(is_dropped, np.int32(-1), self.host_table)

    def select(self, indices: list[int]) -> None:
        """Makes sequence i the former sequence ``indices[i]``; blocks are shared, not copied."""
        with ordinary_tensors():
            index = torch.tensor(indices, dtype=torch.int64, device=self.seq_lens.device)
            selected = {name: getattr(self, name).index_select(0, index) for name in self.names()}
            host_table = _host(selected["block_table"])
        counts = token_counts(self.num_tokens, self.padding[indices])
        vars(self).update(selected, host_table=host_table, _may_have_garbage=True, **counts)

    def to(self, device: torch.device) -> None:
        """Moves every tensor to a device."""
        with ordinary_tensors():
            moved = {name: getattr(self, name).to(device) for name in self.names()}
            slabs = [slab.to(device) for slab in self.pool.slabs]
        for name, tensor in moved.items():
            setattr(self, name, tensor)
        self.pool.slabs[:] = slabs
        self.pool.device = device
        self.host_table = _host(self.block_table)

    def names(self) -> tuple[str, ...]:
        """The attributes that are tensors with one row per sequence."""
        calibration = () if self.k_balance is None else ("k_balance", "k_mean")
        return ("block_table", "tail", "tail_scale", "clamp_count", "seq_lens", *calibration)

    def set_tokens(self, num_tokens: int, padding: np.ndarray) -> None:
        """Adopts a token count."""
        vars(self).update(token_counts(num_tokens, padding))

    def _open_pages(self, new_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives a block to every page that fills on the way to ``new_lens``.

        Returns:
            The sequences and pages that got one.
        """
        first, last = self.lens() // PAGE_TOKENS, new_lens // PAGE_TOKENS
        counts = last - first
        sequences = np.repeat(np.arange(len(counts)), counts)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        pages = np.repeat(first, counts) + np.arange(len(sequences)) - starts
        if not len(pages):
            return sequences, pages
        self._widen_table(int(last.max()))
        # [2, kv_heads, cells]: the pages of one head take neighbouring blocks.
        bits = np.where(pages < self.settings.sink_pages, 8, self.head_bits[:, :, None])
        entries = np.empty(bits.shape, dtype=np.int32)
        widths, needed = np.unique(bits, return_counts=True)
        for width, count in zip(widths.tolist(), needed.tolist(), strict=True):
            self._reserve(width, count, column=count * len(counts) // len(pages) or 1)
        # Blocks that were taken are garbage until the table names them. So are those that it still
        # names because there was no memory to undo an append that had failed.
        stale = bool((self.host_table[sequences, :, :, pages] >= 0).any())
        had_garbage, self._may_have_garbage = self._may_have_garbage or stale, True
        for width, count in zip(widths.tolist(), needed.tolist(), strict=True):
            entries[bits == width] = self.pool.allocate(width, count)
        self.host_table[sequences, :, :, pages] = np.moveaxis(entries, 2, 0)
        self._publish_table()
        self._may_have_garbage = had_garbage
        return sequences, pages

    def _close_pages(self, cells: tuple[np.ndarray, np.ndarray]) -> None:
        sequences, pages = cells
        self._may_have_garbage = True
        self.host_table[sequences, :, :, pages] = -1
        self._publish_table()

    def _reserve(self, bits: int, count: int, column: int) -> None:
        if self.pool.num_free(bits) >= count:
            return
        self.collect()
        missing = count - self.pool.num_free(bits)
        if missing > 0:
            self.pool.grow(bits, missing, column)

    def collect(self) -> None:
        """Frees the blocks that no sequence uses any more."""
        if self._may_have_garbage:
            self.pool.keep(self.host_table[self.host_table >= 0])
            self._may_have_garbage = False

    def _widen_table(self, num_pages: int) -> None:
        capacity = self.block_table.shape[3]
        if num_pages <= capacity:
            return
        shape = (*self.block_table.shape[:3], max(num_pages, capacity + capacity // 8 + 8))
        with ordinary_tensors():
            wider = torch.full(shape, -1, dtype=torch.int32, device=self.block_table.device)
            wider[..., :capacity] = self.block_table
            host_table = _host(wider)
        self.block_table, self.host_table = wider, host_table

    def _publish_table(self) -> None:
        if self.block_table.device.type != "cpu":
            self.block_table.copy_(torch.from_numpy(self.host_table))

    def tensors(self) -> dict[str, list[Tensor]]:
        """Every tensor of the store, by what it is for."""
        calibration = [] if self.k_balance is None else [self.k_balance, self.k_mean]
        return {
            "pool": list(self.pool.slabs),
            "tail": [self.tail, self.tail_scale, self.clamp_count, self.seq_lens],
            "table": [self.block_table],
            "calibration": calibration,
        }

    def report(self) -> dict:
        """What the memory report says of the store beside bytes and tokens."""
        self.collect()
        widths = self.pool.bytes_by_width()
        pool = {bits: total for bits, (total, _) in widths.items()}
        pool["free"] = sum(free for _, free in widths.values())
        k_bits, v_bits = self.head_bits.tolist()
        k_clamped, v_clamped = self.clamp_count.sum(dim=(0, 2)).tolist()
        return {
            "pool": pool,
            "k_bits": k_bits,
            "v_bits": v_bits,
            "k_clamped": k_clamped,
            "v_clamped": v_clamped,
            "clamped": k_clamped + v_clamped,
        }


def token_counts(num_tokens: int, padding: np.ndarray) -> dict[str, object]:
    """The attributes of a store that follow from its token count, made before it is changed."""
    lens = num_tokens - padding
    fills = (lens // PAGE_TOKENS + 1) * PAGE_TOKENS + padding
    return {
        "num_tokens": num_tokens,
        "padding": padding,
        # At which count the next page of any sequence fills.
        "next_fill": int(fills.min()) if len(fills) else num_tokens + PAGE_TOKENS,
        # Asked in every step, so kept as plain values.
        "is_padded": bool(padding.any()),
        "may_have_empty": not lens.all(),
    }


def _host(block_table: Tensor) -> np.ndarray:
    """The block table as the host changes it: the same memory where that is possible."""
    return block_table.cpu().numpy() if block_table.device.type != "cpu" else block_table.numpy()
