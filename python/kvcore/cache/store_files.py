"""A store as facts and tensors, without spare room, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcore.cache.file_format import store_facts
from kvcore.cache.pages import PagePool
from kvcore.cache.settings import (
    PAGE_TOKENS,
    SLAB_INDEX_BITS,
    WIDTHS,
    TurboSettings,
    block_bytes,
)
from kvcore.cache.static_store import StaticStore
from kvcore.cache.store import TurboStore
from kvcore.cache.tensors import ordinary_tensors

_ROW_MASK = (1 << SLAB_INDEX_BITS) - 1


def export_store(store: TurboStore) -> tuple[dict, dict[str, Tensor]]:
    """Facts for JSON, and tensors on the CPU.

    Blocks are in the order in which the table first names them; the table numbers the non-empty
    ones of ``pool8``, ``pool4``, ``pool2`` as ``turbo_quantize`` does.
    """
    num_pages = int((store.lens() // PAGE_TOKENS).max(initial=0))
    table = store.host_table[..., :num_pages].copy()
    # A store of fixed capacity has blocks for what is to come.
    is_full = np.arange(num_pages) < (store.lens() // PAGE_TOKENS)[:, None]
    table[~np.broadcast_to(is_full[:, None, None], table.shape)] = -1
    used, first, inverse = np.unique(table[table >= 0], return_index=True, return_inverse=True)
    widths = {block_bytes(bits, store.head_dim): bits for bits in WIDTHS}
    slab_bits = np.array([widths[slab.shape[1]] for slab in store.pool.slabs], dtype=np.int64)
    slabs, rows = used >> SLAB_INDEX_BITS, (used & _ROW_MASK).astype(np.int64)
    order = np.argsort(first)
    names = np.empty(len(used), dtype=np.int32)
    tensors, number = {}, 0
    for width in WIDTHS:
        mine = order[slab_bits[slabs[order]] == width]
        pool = torch.empty((len(mine), block_bytes(width, store.head_dim)), dtype=torch.uint8)
        for slab in np.unique(slabs[mine]):
            place = np.flatnonzero(slabs[mine] == slab)
            index = torch.from_numpy(rows[mine[place]]).to(store.tail.device)
            pool[torch.from_numpy(place)] = store.pool.slabs[slab].index_select(0, index).cpu()
        tensors[f"pool{width}"] = pool
        names[mine] = (number << SLAB_INDEX_BITS) + np.arange(len(mine))
        number += len(mine) > 0
    table[table >= 0] = names[inverse]
    tensors |= {name: getattr(store, name).cpu() for name in store.names() if name != "seq_lens"}
    tensors["block_table"] = torch.from_numpy(table)
    facts = {
        **store_facts(store),
        "k_bits": store.head_bits[0].tolist(),
        "v_bits": store.head_bits[1].tolist(),
        "blocks": [len(tensors[f"pool{width}"]) for width in WIDTHS],
        "calibrated": store.k_balance is not None,
    }
    return facts, tensors


def restore_store(
    settings: TurboSettings, facts: dict, tensors: dict[str, Tensor], device: torch.device
) -> TurboStore:
    """The store that :func:`export_store` described; everything has been checked."""
    padding = np.array(facts["padding"], dtype=np.int64)
    lens = torch.from_numpy((facts["num_tokens"] - padding).astype(np.int32))
    with ordinary_tensors():
        held = {name: tensor.to(device) for name, tensor in tensors.items()}
        held["seq_lens"] = lens.to(device)
    slabs = [held.pop(f"pool{width}") for width in WIDTHS]
    pool = PagePool.adopt([slab for slab in slabs if len(slab)], facts["head_dim"], device)
    for name in ("k_balance", "k_mean"):
        held.setdefault(name, None)
    head_bits = np.array([facts["k_bits"], facts["v_bits"]])
    return TurboStore(settings, head_bits, pool, held, padding, facts["num_tokens"])


def fill_store(store: StaticStore, facts: dict, tensors: dict[str, Tensor]) -> None:
    """Makes an empty store the one that :func:`export_store` described."""
    if facts["num_tokens"] > store.capacity:
        raise ValueError(
            f"TurboCache: max_cache_len must be at least {facts['num_tokens']}, "
            f"got {store.capacity}"
        )
    device = store.tail.device
    store.head_bits = np.array([facts["k_bits"], facts["v_bits"]])
    table = tensors["block_table"].numpy()
    store.pool.keep(np.empty(0, dtype=np.int32))
    store.host_table[:] = -1
    number = 0
    for width, count in zip(WIDTHS, facts["blocks"], strict=True):
        if not count:
            continue
        entries = store.pool.allocate(width, count)
        slabs, rows = entries >> SLAB_INDEX_BITS, (entries & _ROW_MASK).astype(np.int64)
        for slab in np.unique(slabs):
            place = torch.from_numpy(np.flatnonzero(slabs == slab))
            index = torch.from_numpy(rows)[place].to(device)
            store.pool.slabs[slab][index] = tensors[f"pool{width}"][place].to(device)
        mine = (table >= 0) & (table >> SLAB_INDEX_BITS == number)
        store.host_table[..., : table.shape[3]][mine] = entries[table[mine] & _ROW_MASK]
        number += 1
    for name in store.names():
        if name not in ("block_table", "seq_lens"):
            getattr(store, name).copy_(tensors[name])
    store.set_tokens(facts["num_tokens"], np.array(facts["padding"], dtype=np.int64))
    store.seq_lens.copy_(torch.from_numpy(store.lens().astype(np.int32)))
    store.is_calibrated = True
    store.fill_table()
