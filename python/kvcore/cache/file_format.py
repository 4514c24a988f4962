"""What a cache file holds and how each part is checked. Nothing here touches a cache.

A file is a :class:`~kvcore.cache.safe_file.FileKind` of three parts: ``model`` (the facts that a
model must share), ``settings`` and ``layers`` (one object per layer).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kvcore.cache.safe_file import FileKind
from kvcore.cache.settings import (
    HEAD_DIMS,
    PAGE_TOKENS,
    SLAB_INDEX_BITS,
    TAIL_SLOTS,
    WIDTHS,
    block_bytes,
)

CODE_MAX = 119
MIN_BALANCE = 2.0**-8
MAX_LAYERS = 1 << 16

# Largest step of a narrow code: the ceiling of the range of int8 codes over the levels.
_MAX_STEP = {4: 16, 2: 80}


class CacheFileError(ValueError):
    """A cache file that is damaged, not made for this model, or not a cache file."""


FILE = FileKind("cache file", CacheFileError, "kvcore-cache", "1", ("model", "settings", "layers"))
# Tensors of tokens as they came, which have no mark for what is not finite.
EXACT_TENSORS = ("keys", "values")
check, check_names = FILE.check, FILE.check_names
get_int, get_ints = FILE.get_int, FILE.get_ints


# ---- the store of a quantized layer

STORE_FACTS = frozenset(
    {
        "batch",
        "kv_heads",
        "head_dim",
        "num_tokens",
        "padding",
        "k_bits",
        "v_bits",
        "blocks",
        "calibrated",
    }
)


def store_facts(store) -> dict:
    """What :func:`store_sizes` checks, of any store."""
    return {
        "batch": store.batch,
        "kv_heads": store.kv_heads,
        "head_dim": store.head_dim,
        "num_tokens": store.num_tokens,
        "padding": store.padding.tolist(),
    }


def store_sizes(layer: dict, field: str) -> tuple[int, int, int, int, list[int]]:
    """Checks batch, kv_heads, head_dim, num_tokens and padding of any store; returns them."""
    batch = get_int(layer, "batch", field, 0, 1 << 24)
    kv_heads = get_int(layer, "kv_heads", field, 1, 1 << 16)
    head_dim = get_int(layer, "head_dim", field, 1)
    check(head_dim in HEAD_DIMS, f"{field}.head_dim", f"one of {HEAD_DIMS}", head_dim)
    num_tokens = get_int(layer, "num_tokens", field, 0)
    padding = get_ints(layer, "padding", field, 0, num_tokens)
    check(len(padding) == batch, f"{field}.padding", f"{batch} long", len(padding))
    return batch, kv_heads, head_dim, num_tokens, padding


def store_form(layer: dict, field: str) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Checks what the metadata say of a store; returns dtype and shape of its tensors.

    ``layer`` has batch, kv_heads, head_dim, num_tokens, padding, k_bits, v_bits (of each head),
    sink_pages, calibrated and blocks (how many of 8, 4 and 2 bits).
    """
    batch, kv_heads, head_dim, num_tokens, padding = store_sizes(layer, field)
    for name in ("k_bits", "v_bits"):
        bits = get_ints(layer, name, field, 2, 8)
        check(len(bits) == kv_heads, f"{field}.{name}", f"{kv_heads} long", len(bits))
        check(set(bits) <= set(WIDTHS), f"{field}.{name}", "8, 4 or 2", bits)
    blocks = get_ints(layer, "blocks", field, 0, 1 << SLAB_INDEX_BITS)
    check(len(blocks) == len(WIDTHS), f"{field}.blocks", "3 long", len(blocks))
    calibrated = layer.get("calibrated")
    check(isinstance(calibrated, bool), f"{field}.calibrated", "a bool", calibrated)
    pages = (num_tokens - min(padding, default=num_tokens)) // PAGE_TOKENS
    per_head = [batch, 2, kv_heads]
    form = {
        f"pool{bits}": (torch.uint8, [count, block_bytes(bits, head_dim)])
        for bits, count in zip(WIDTHS, blocks, strict=True)
    }
    form |= {
        "block_table": (torch.int32, [*per_head, pages]),
        "tail": (torch.uint8, [*per_head, TAIL_SLOTS, block_bytes(8, head_dim)]),
        "tail_scale": (torch.float32, per_head),
        "clamp_count": (torch.int64, per_head),
    }
    if calibrated:
        form["k_balance"] = form["k_mean"] = (torch.float32, [batch, kv_heads, head_dim])
    return form


def check_store(layer: dict, tensors: dict[str, Tensor], sink_pages: int, field: str) -> None:
    """Checks the values of a store whose form was checked."""
    lens = layer["num_tokens"] - np.array(layer["padding"], dtype=np.int64)
    head_bits = np.array([layer["k_bits"], layer["v_bits"]])
    table = tensors["block_table"].numpy()
    pages = np.arange(table.shape[3])
    is_full = (pages < (lens // PAGE_TOKENS)[:, None])[:, None, None]
    check(
        (table[~np.broadcast_to(is_full, table.shape)] == -1).all(),
        f"{field}.block_table",
        "-1 past the full pages",
        "other entries",
    )
    bits = np.where(pages < sink_pages, 8, head_bits[:, :, None])
    _check_entries(table, is_full, bits, layer["blocks"], field)

    for width in WIDTHS:
        _check_blocks(tensors[f"pool{width}"], width, layer["head_dim"], f"{field}.pool{width}")
    tail = tensors["tail"]
    flat = tail.reshape(-1, tail.shape[-1])
    _check_blocks(flat, 8, layer["head_dim"], f"{field}.tail", is_tail=True)
    held = tail[..., 4:8].contiguous().view(torch.int32)[..., 0].numpy()
    slots = np.arange(TAIL_SLOTS)
    check(
        ((held == -1) | ((held >= 0) & (held % TAIL_SLOTS == slots))).all(),
        f"{field}.tail",
        "headers of pages that belong in their slots",
        "other pages",
    )
    open_pages = (lens // PAGE_TOKENS)[:, None, None]
    slot_of = np.broadcast_to(open_pages % TAIL_SLOTS, held.shape[:3])[..., None]
    holds_open = np.take_along_axis(held, slot_of, 3)[..., 0] == open_pages
    is_whole = (lens % PAGE_TOKENS == 0)[:, None, None]
    check((holds_open | is_whole).all(), f"{field}.tail", "the open page's codes", "other pages")

    check((tensors["clamp_count"] >= 0).all(), f"{field}.clamp_count", "at least 0", "less")
    _check_range(tensors["tail_scale"], 0.0, f"{field}.tail_scale")
    if layer["calibrated"]:
        _check_range(tensors["k_balance"], MIN_BALANCE, f"{field}.k_balance")
        _check_range(tensors["k_mean"], -math.inf, f"{field}.k_mean")


def _check_entries(
    table: np.ndarray, is_full: np.ndarray, bits: np.ndarray, blocks: list[int], field: str
) -> None:
    """Every full page names one block of its width, and a block is of one page of one head."""
    field = f"{field}.block_table"
    slab_bits = np.array([w for w, count in zip(WIDTHS, blocks, strict=True) if count], dtype=int)
    slab_rows = np.array([count for count in blocks if count], dtype=int)
    full = np.broadcast_to(is_full, table.shape)
    entries = table[full]
    slabs, rows = entries >> SLAB_INDEX_BITS, entries & ((1 << SLAB_INDEX_BITS) - 1)
    check(
        ((entries >= 0) & (slabs < len(slab_rows))).all(),
        field,
        f"entries of {len(slab_rows)} slabs",
        "other entries",
    )
    check((rows < slab_rows[slabs]).all(), field, "entries of blocks in the pool", "other entries")
    check(
        (slab_bits[slabs] == np.broadcast_to(bits, table.shape)[full]).all(),
        field,
        "entries of blocks of the page's width",
        "other widths",
    )
    # Sequences may share a block, but only as the same page of the same head.
    places = np.broadcast_to(np.arange(bits.size).reshape(bits.shape), table.shape)[full]
    used, first = np.unique(entries, return_index=True)
    check(
        (places == places[first][np.searchsorted(used, entries)]).all(),
        field,
        "entries that name each block for one page",
        "a block of two pages",
    )
    check(
        len(used) == slab_rows.sum(),
        field,
        f"entries of all {slab_rows.sum()} blocks",
        f"{len(used)} blocks",
    )


def _check_blocks(
    blocks: Tensor, bits: int, head_dim: int, field: str, *, is_tail: bool = False
) -> None:
    if blocks.numel() == 0:
        return
    scale = blocks[:, :4].contiguous().view(torch.float32)
    # NaN marks a page that held a non-finite value.
    is_scale = scale.isnan() | ((scale >= 0) & scale.isfinite())
    check(is_scale.all(), field, "blocks with scales of at least 0", "other scales")
    unused = blocks[:, 8:64] if is_tail else blocks[:, 4:64]
    check(not unused.any(), field, "blocks with zero in unused bytes", "other bytes")
    if bits == 8:
        codes = blocks[:, 64:].view(torch.int8)
        check(
            codes.min() >= -CODE_MAX and codes.max() <= CODE_MAX,
            field,
            f"codes in [-{CODE_MAX}, {CODE_MAX}]",
            "larger codes",
        )
        return
    step = blocks[:, 64 : 64 + head_dim]
    check(
        step.min() >= 1 and step.max() <= _MAX_STEP[bits],
        field,
        f"steps in [1, {_MAX_STEP[bits]}]",
        f"[{step.min()}, {step.max()}]",
    )
    zero = blocks[:, 64 + head_dim : 64 + 2 * head_dim].view(torch.int8)
    check(
        zero.min() >= -CODE_MAX and zero.max() <= CODE_MAX,
        field,
        f"zeros in [-{CODE_MAX}, {CODE_MAX}]",
        "larger zeros",
    )


def _check_range(values: Tensor, low: float, field: str) -> None:
    holds = values.isfinite() & (values >= low)
    check(holds.all(), field, f"finite and at least {low:g}", "other values")
