"""The pages of one layer: slabs of equal blocks that are only ever added to."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcore import _C
from kvcore.cache.settings import WIDTHS, block_bytes

# A new slab holds 1/128 of the blocks that there are, so that spare room costs less than 1 % of the
# store. As slab numbers run out the share grows: 1024 slabs reach any length.
_SHARES = ((512, 128), (768, 32), (896, 8), (1024, 1))
_MIN_COLUMNS = 4


class PagePool:
    """Slabs and their free blocks.

    Stored blocks are never copied: the pool grows by a slab. Which blocks are in use is known from
    the block table alone, so blocks are not freed one by one; :meth:`keep` reclaims all that no
    table row names any more.
    """

    def __init__(self, head_dim: int, device: torch.device) -> None:
        self.head_dim = head_dim
        self.device = device
        self.slabs: list[Tensor] = []
        self._allocator = _C.PageAllocator()

    @classmethod
    def adopt(cls, slabs: list[Tensor], head_dim: int, device: torch.device) -> PagePool:
        """A pool of given slabs, uint8 ``[blocks, block_bytes]``, every block of them in use."""
        pool = cls(head_dim, device)
        widths = {block_bytes(bits, head_dim): bits for bits in WIDTHS}
        for slab in slabs:
            bits = widths[slab.shape[1]]
            pool._allocator.add_slab(slab.shape[0], bits)
            pool._allocator.allocate(bits, slab.shape[0])
            pool.slabs.append(slab)
        return pool

    def num_free(self, bits: int) -> int:
        return self._allocator.num_free(bits)

    def num_used(self, bits: int) -> int:
        return self._allocator.num_used(bits)

    def grow(self, bits: int, missing: int, column: int) -> None:
        """Adds at least ``missing`` free blocks; ``column`` are those of one page of all heads."""
        total = self.num_free(bits) + self.num_used(bits)
        share = next(share for limit, share in _SHARES if len(self.slabs) < limit or share == 1)
        count = max(missing, _MIN_COLUMNS * column, total // share)
        while count > 0:
            rows = min(count, _C.PageAllocator.MAX_SLAB_BLOCKS)
            self.add_slab(bits, rows)
            count -= rows

    def add_slab(self, bits: int, rows: int) -> None:
        # Zeros, because the unused bytes of a block are zero by contract. Allocated before the
        # allocator learns of it: if memory runs out nothing has changed.
        with torch.inference_mode(False):
            shape = (rows, block_bytes(bits, self.head_dim))
            slab = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._allocator.add_slab(rows, bits)
        self.slabs.append(slab)

    def allocate(self, bits: int, count: int) -> np.ndarray:
        """int32 block table entries of ``count`` free blocks, ascending."""
        return np.array(self._allocator.allocate(bits, count), dtype=np.int32)

    def bytes_by_width(self) -> dict[int, tuple[int, int]]:
        """Bytes of the slabs of each width, and how many of those are free."""
        totals = dict.fromkeys(WIDTHS, 0)
        widths = {block_bytes(bits, self.head_dim): bits for bits in WIDTHS}
        for slab in self.slabs:
            totals[widths[slab.shape[1]]] += slab.untyped_storage().nbytes()
        return {
            bits: (total, self.num_free(bits) * block_bytes(bits, self.head_dim))
            for bits, total in totals.items()
        }

    def keep(self, entries: np.ndarray) -> None:
        """Frees every block that is not among ``entries``."""
        self._allocator.keep(np.ascontiguousarray(entries, dtype=np.int32).reshape(-1))
