"""The quantized store: pages in a pool, reached by a block table, and an int8 tail."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcore.reference.turbo.blocks import (
    CODE_MAX,
    PAGE_TOKENS,
    SLAB_INDEX_BITS,
    TAIL_SLOTS,
    WIDTHS,
    block_bytes,
    block_page,
    pack_blocks,
    slab_bits,
    stage1,
    stage1_scale,
    tail_head_dim,
    unpack_blocks,
)
from kvcore.reference.turbo.calibrate import calibrated


def turbo_quantize(
    k: Tensor,
    v: Tensor,
    k_balance: Tensor | None = None,
    k_mean: Tensor | None = None,
    left_padding: Tensor | None = None,
    *,
    k_bits: Sequence[int] = (4,),
    v_bits: Sequence[int] = (4,),
    sink_pages: int = 1,
    tail_margin: float = 1.25,
    check_values: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kvcore.turbo_quantize`."""
    batch, kv_heads, kv_len, head_dim = k.shape
    widths = [_per_head("k_bits", k_bits, kv_heads), _per_head("v_bits", v_bits, kv_heads)]
    lens = [kv_len] * batch
    if left_padding is not None:
        lens = [kv_len - padding for padding in left_padding.tolist()]

    owners = {bits: [] for bits in WIDTHS}
    for b in range(batch):
        for kv in range(2):
            for head in range(kv_heads):
                for page in range(lens[b] // PAGE_TOKENS):
                    bits = 8 if page < sink_pages else widths[kv][head]
                    owners[bits].append((b, kv, head, page))
    pools = [
        torch.zeros(len(owners[bits]), block_bytes(bits, head_dim), dtype=torch.uint8)
        for bits in WIDTHS
    ]
    per_head = (batch, 2, kv_heads)
    block_table = torch.full((*per_head, kv_len // PAGE_TOKENS), -1, dtype=torch.int32)
    for slab, places in enumerate(filter(None, owners.values())):
        entries = torch.arange(len(places), dtype=torch.int32) + (slab << SLAB_INDEX_BITS)
        block_table[tuple(torch.tensor(places).T)] = entries

    tail = torch.zeros(*per_head, TAIL_SLOTS, block_bytes(8, head_dim), dtype=torch.uint8)
    tail[..., 4:8] = 255  # page_idx -1: neither slot holds a page
    tail_scale = torch.zeros(per_head)
    clamp_count = torch.zeros(per_head, dtype=torch.int64)
    seq_lens = torch.zeros(batch, dtype=torch.int32)
    turbo_append(
        k,
        v,
        [pool for pool in pools if len(pool)],
        block_table,
        tail,
        tail_scale,
        clamp_count,
        seq_lens,
        k_balance,
        k_mean,
        left_padding,
        tail_margin=tail_margin,
    )
    return *pools, block_table, tail, tail_scale, clamp_count, seq_lens


def turbo_append(
    k: Tensor,
    v: Tensor,
    pool: list[Tensor],
    block_table: Tensor,
    tail: Tensor,
    tail_scale: Tensor,
    clamp_count: Tensor,
    seq_lens: Tensor,
    k_balance: Tensor | None = None,
    k_mean: Tensor | None = None,
    left_padding: Tensor | None = None,
    *,
    tail_margin: float = 1.25,
    check_values: bool = False,
) -> None:
    """See :func:`kvcore.turbo_append`."""
    stored = torch.stack([calibrated(k, k_balance, k_mean), v.float()], 1)
    for b in range(k.shape[0]):
        x = stored[b] if left_padding is None else stored[b, :, :, int(left_padding[b]) :]
        num_new = x.shape[2]
        if num_new == 0:
            continue
        amax = torch.where(x.isfinite(), x.abs(), 0).amax((2, 3))
        margin = torch.tensor(tail_margin, dtype=torch.float32)
        tail_scale[b] = torch.maximum(tail_scale[b], stage1_scale(amax) * margin)

        begin = int(seq_lens[b])
        end = begin + num_new
        last_page = (end - 1) // PAGE_TOKENS
        for page in range(begin // PAGE_TOKENS, last_page + 1):
            page_begin, page_end = page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS
            first, last = max(begin, page_begin), min(end, page_end)
            new = x[:, :, first - begin : last - begin]
            slot = tail[b, :, :, page % TAIL_SLOTS]
            if last - first == PAGE_TOKENS:
                codes, scale = stage1(new)
                keep = page >= last_page - 1
            else:
                if first == page_begin:
                    codes = torch.zeros(*x.shape[:2], PAGE_TOKENS, x.shape[3], dtype=torch.int32)
                    scale = tail_scale[b]
                else:
                    codes, scale = _read_slot(slot)
                place = slice(first - page_begin, last - page_begin)
                codes[:, :, place], scale, clamped = _buffer(new, scale)
                clamp_count[b] += clamped
                keep = True
            if keep:
                _write_slot(slot, codes, scale, page)
            if last == page_end:
                _flush(codes, scale, pool, block_table[b, :, :, page])
        seq_lens[b] = end


def turbo_rewind(
    pool: list[Tensor],
    block_table: Tensor,
    tail: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor,
    *,
    check_values: bool = False,
) -> None:
    """See :func:`kvcore.turbo_rewind`."""
    for b, new_len in enumerate(new_lens.tolist()):
        page = new_len // PAGE_TOKENS
        slot = tail[b, :, :, page % TAIL_SLOTS]
        # All heads move together, so the first tells which page the slot holds.
        if new_len % PAGE_TOKENS and int(block_page(slot)[0, 0]) != page:
            codes, scale = _read_pages(pool, block_table[b, :, :, page : page + 1], slot)
            _write_slot(slot, codes[:, :, 0], scale[:, :, 0], page)
        seq_lens[b] = new_len


def turbo_dequantize(
    pool: list[Tensor],
    block_table: Tensor,
    tail: Tensor,
    seq_lens: Tensor,
    k_balance: Tensor | None = None,
    k_mean: Tensor | None = None,
    *,
    kv_len: int,
    right_align: bool = False,
    dtype: torch.dtype = torch.float32,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvcore.turbo_dequantize`."""
    codes, scale = read_store(pool, block_table, tail, seq_lens)
    batch, _, kv_heads, _, _, head_dim = codes.shape
    k, v = (codes * scale[..., None, None]).flatten(3, 4).unbind(1)
    if k_balance is not None:
        k = k * k_balance.unsqueeze(2)
    if k_mean is not None:
        k = k + k_mean.unsqueeze(2)
    outputs = torch.zeros(2, batch, kv_heads, kv_len, head_dim, dtype=dtype)
    for b, seq_len in enumerate(seq_lens.tolist()):
        begin = kv_len - seq_len if right_align else 0
        outputs[0, b, :, begin : begin + seq_len] = k[b, :, :seq_len]
        outputs[1, b, :, begin : begin + seq_len] = v[b, :, :seq_len]
    return outputs[0], outputs[1]


def read_store(
    pool: list[Tensor], block_table: Tensor, tail: Tensor, seq_lens: Tensor
) -> tuple[Tensor, Tensor]:
    """Stage-1 codes and scales of every page of a store, the open one included.

    Returns:
        codes int32 ``[batch, 2, kv_heads, pages, 64, head_dim]`` and scale fp32
        ``[batch, 2, kv_heads, pages]``, where pages suffices for the longest sequence. Codes of
        tokens past the end of a sequence are unspecified; those of pages past it are 0.
    """
    batch, _, kv_heads = block_table.shape[:3]
    head_dim = tail_head_dim(tail.shape[-1])
    lens = seq_lens.tolist()
    num_pages = max([-(-seq_len // PAGE_TOKENS) for seq_len in lens], default=0)
    codes = torch.zeros(batch, 2, kv_heads, num_pages, PAGE_TOKENS, head_dim, dtype=torch.int32)
    scale = torch.zeros(batch, 2, kv_heads, num_pages)
    for b, seq_len in enumerate(lens):
        full = seq_len // PAGE_TOKENS
        slot = tail[b, :, :, full % TAIL_SLOTS]
        codes[b, :, :, :full], scale[b, :, :, :full] = _read_pages(
            pool, block_table[b, :, :, :full], slot
        )
        if seq_len % PAGE_TOKENS:
            codes[b, :, :, full], scale[b, :, :, full] = _read_slot(slot)
    return codes, scale


def _per_head(name: str, bits: Sequence[int], kv_heads: int) -> list[int]:
    if len(bits) not in (1, kv_heads) or any(width not in WIDTHS for width in bits):
        raise ValueError(f"{name}: must be 1 or {kv_heads} of 8, 4 and 2, got {list(bits)}")
    return list(bits) * kv_heads if len(bits) == 1 else list(bits)


def _buffer(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Int8 codes of tokens that join a block whose scale is already fixed.

    Args:
        x: fp32 ``[2, kv_heads, tokens, head_dim]``.
        scale: fp32 ``[2, kv_heads]``.

    Returns:
        codes int32, shape of x; the block's scale afterwards; how many codes were clamped.
    """
    codes, clamped = [], torch.zeros(scale.shape, dtype=torch.int64)
    for token in x.unbind(2):
        finite = token.isfinite()
        code = (token / scale.unsqueeze(-1)).round()
        code = torch.where(finite & ~scale.isnan().unsqueeze(-1), code, 0)
        clamped += (code.abs() > CODE_MAX).sum(-1)
        codes.append(code.clamp(-CODE_MAX, CODE_MAX).int())
        scale = torch.where(finite.all(-1), scale, torch.nan)
    return torch.stack(codes, 2), scale, clamped


def _read_slot(slot: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[2, kv_heads, 64, head_dim]`` and scale of a tail slot ``[2, kv_heads, bytes]``."""
    head_dim = tail_head_dim(slot.shape[-1])
    k, v = (unpack_blocks(slot[kv], head_dim, kv) for kv in range(2))
    return torch.stack([k[0], v[0]]), torch.stack([k[1], v[1]])


def _write_slot(slot: Tensor, codes: Tensor, scale: Tensor, page: int) -> None:
    for kv in range(2):
        slot[kv] = pack_blocks(codes[kv], scale[kv], 8, kv, page)


def _flush(codes: Tensor, scale: Tensor, pool: list[Tensor], entries: Tensor) -> None:
    """Write one full page of all heads where its block table entries ``[2, kv_heads]`` say."""
    for kv, slab, mask, rows in _places(pool, entries):
        bits = slab_bits(pool[slab].shape[1], codes.shape[-1])
        pool[slab][rows] = pack_blocks(codes[kv][mask], scale[kv][mask], bits, kv)


def _read_pages(pool: list[Tensor], entries: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[2, kv_heads, pages, 64, head_dim]`` and scale of the pages of entries."""
    head_dim = tail_head_dim(slot.shape[-1])
    codes = torch.zeros(*entries.shape, PAGE_TOKENS, head_dim, dtype=torch.int32)
    scale = torch.zeros(entries.shape)
    for kv, slab, mask, rows in _places(pool, entries):
        codes[kv][mask], scale[kv][mask] = unpack_blocks(pool[slab][rows], head_dim, kv)
    return codes, scale


def _places(pool: list[Tensor], entries: Tensor):
    """Group entries ``[2, ...]`` by K|V and slab: yields kv, slab, mask and rows of the slab."""
    slabs, rows = entries >> SLAB_INDEX_BITS, entries & ((1 << SLAB_INDEX_BITS) - 1)
    if (entries < 0).any() or (slabs >= len(pool)).any():
        raise ValueError(
            f"block_table: entries of full pages must name one of {len(pool)} slabs, "
            f"got {entries.flatten().tolist()}"
        )
    for kv in range(2):
        for slab in slabs[kv].unique().tolist():
            mask = slabs[kv] == slab
            yield kv, slab, mask, rows[kv][mask].long()
