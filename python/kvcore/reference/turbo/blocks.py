"""Blocks: codes of one page of K or V for one head, and the bytes they are kept in.

A transcription of ``csrc/turbo/layout.h``. ``kv`` is 0 for K and 1 for V.
"""

from functools import lru_cache

import torch
from torch import Tensor

PAGE_TOKENS = 64
CODE_MAX = 119
INTERLEAVE = 4
CHUNK = 32
HEADER_BYTES = 64
TAIL_SLOTS = 2
SLAB_INDEX_BITS = 21
WIDTHS = (8, 4, 2)
# At 2 bit stage 2 also tries a step that does not reach across a channel's range: this many eighths
# of the one that does.
SHORT_STEP_EIGHTHS = 7
# The smallest normal number: zero tiles need no special case.
MIN_SCALE = 2.0**-126


def code_offset(bits: int, head_dim: int) -> int:
    """Offset of the codes inside a block, after the header and, below 8 bit, steps and zeros."""
    return HEADER_BYTES + (0 if bits == 8 else 2 * head_dim)


def block_bytes(bits: int, head_dim: int) -> int:
    """Bytes of a block, which is the row size of a slab."""
    return code_offset(bits, head_dim) + PAGE_TOKENS * head_dim * bits // 8


def tail_head_dim(slot_bytes: int) -> int:
    """Channels of a tail slot, which is an 8-bit block."""
    return (slot_bytes - HEADER_BYTES) // PAGE_TOKENS


def slab_bits(row_bytes: int, head_dim: int) -> int:
    """Width of a slab, told from its row size."""
    for bits in WIDTHS:
        if block_bytes(bits, head_dim) == row_bytes:
            return bits
    expected = [block_bytes(bits, head_dim) for bits in WIDTHS]
    raise ValueError(f"pool: bytes of a row must be one of {expected}, got {row_bytes}")


def stage1_scale(amax: Tensor) -> Tensor:
    """Scale that maps ``amax`` to the largest code."""
    return (amax / CODE_MAX).clamp_min(MIN_SCALE)


def stage1(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes of blocks (equation 4), each with a scale of its own.

    Args:
        x: fp32 ``[..., tokens, head_dim]``.

    Returns:
        codes int32, shape of x, and scale fp32 ``[...]``, NaN for a block with a non-finite value.
    """
    finite = x.isfinite().all(-1).all(-1)
    scale = stage1_scale(x.abs().amax((-2, -1)))
    codes = (x / scale[..., None, None]).round().clamp(-CODE_MAX, CODE_MAX)
    codes = torch.where(finite[..., None, None], codes, 0)
    return codes.int(), torch.where(finite, scale, torch.nan)


def stage2(codes: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of fewer bits, per channel (equations 9-11), by the step with the least squared error.

    Args:
        codes: int32 ``[..., 64, head_dim]``, of stage 1.
        bits: 4 or 2.

    Returns:
        narrow codes, shape of codes, and step and zero ``[..., head_dim]``, all int32.
    """
    levels = 2**bits - 1
    least = codes.amin(-2)
    value_range = codes.amax(-2) - least
    exact_step = value_range.float() / levels
    nearest = exact_step.round().int()
    steps = [nearest, exact_step.ceil().int()]
    if bits == 2:
        steps.append((nearest * SHORT_STEP_EIGHTHS + 4) // 8)
    best = None
    for step in (step.clamp_min(1) for step in steps):
        # Codes that the steps do not reach are clipped at both ends alike, or sums of many values
        # would drift.
        excess = (value_range - levels * step).clamp_min(0)
        zero = least + (excess / 2).round().int()
        narrow = ((codes - zero.unsqueeze(-2)) / step.unsqueeze(-2)).round().clamp(0, levels).int()
        error = (widen(narrow, step, zero) - codes).square().sum(-2)
        if best is None:
            best = (error, narrow, step, zero)
        else:
            better = error < best[0]
            narrow = torch.where(better.unsqueeze(-2), narrow, best[1])
            best = (
                torch.minimum(error, best[0]),
                narrow,
                torch.where(better, step, best[2]),
                torch.where(better, zero, best[3]),
            )
    return best[1:]


def widen(narrow: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Int8 codes that narrow codes stand for."""
    return narrow * step.unsqueeze(-2) + zero.unsqueeze(-2)


@lru_cache
def code_positions(bits: int, head_dim: int, kv: int) -> tuple[Tensor, Tensor]:
    """Byte of each code inside the codes of a block, and how far it is shifted left there.

    Returns:
        two int64 tensors ``[64, head_dim]``, indexed by token and channel.
    """
    token = torch.arange(PAGE_TOKENS).view(-1, 1).expand(-1, head_dim)
    channel = torch.arange(head_dim).view(1, -1).expand(PAGE_TOKENS, -1)
    none = torch.zeros_like(token)
    if kv == 0:
        group, lane = channel // INTERLEAVE, channel % INTERLEAVE
        if bits == 8:
            return (group * PAGE_TOKENS + token) * INTERLEAVE + lane, none
        row = channel // CHUNK * 4 + group % 4
        second = group % 8 // 4
        if bits == 4:
            return (row * PAGE_TOKENS + token) * INTERLEAVE + lane, 4 * second
        late = token // CHUNK
        return (row * CHUNK + token % CHUNK) * INTERLEAVE + lane, 2 * (second + 2 * late)
    group, lane = token // INTERLEAVE, token % INTERLEAVE
    if bits == 8:
        return (group * head_dim + channel) * INTERLEAVE + lane, none
    second, chunk = group % 8 // 4, token // CHUNK
    if bits == 4:
        row, shift = chunk * 4 + group % 4, 4 * second
    else:
        row, shift = group % 4, 2 * (second + 2 * chunk)
    return (row * head_dim + channel) * INTERLEAVE + lane, shift


def pack_codes(codes: Tensor, bits: int, kv: int) -> Tensor:
    """Bytes of codes: ``[n, 64, head_dim]`` to uint8 ``[n, code bytes]``."""
    num_blocks, _, head_dim = codes.shape
    byte, shift = code_positions(bits, head_dim, kv)
    # The codes of a byte occupy different bits, so their sum is their union.
    packed = torch.zeros(num_blocks, PAGE_TOKENS * head_dim * bits // 8, dtype=torch.int32)
    shifted = (codes & (2**bits - 1)) << shift
    packed.scatter_add_(1, byte.flatten().expand(num_blocks, -1), shifted.flatten(1).int())
    return packed.to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, head_dim: int, kv: int) -> Tensor:
    """Codes of bytes: uint8 ``[n, code bytes]`` to int32 ``[n, 64, head_dim]``."""
    byte, shift = code_positions(bits, head_dim, kv)
    codes = (packed[:, byte.flatten()].int() >> shift.flatten()) & (2**bits - 1)
    if bits == 8:
        codes = codes - 256 * (codes >= 128)
    return codes.int().view(-1, PAGE_TOKENS, head_dim)


def pack_blocks(codes: Tensor, scale: Tensor, bits: int, kv: int, page_idx: int = 0) -> Tensor:
    """Blocks of one width from stage-1 codes, stage 2 included.

    Args:
        codes: int32 ``[n, 64, head_dim]``.
        scale: fp32 ``[n]``.
        bits: 8, 4 or 2.
        kv: 0 for K, 1 for V.
        page_idx: the page a tail slot holds; 0 in the pool.

    Returns:
        uint8 ``[n, block_bytes]``.
    """
    num_blocks = codes.shape[0]
    pages = torch.full((num_blocks, 1), page_idx, dtype=torch.int32)
    header = torch.zeros(num_blocks, HEADER_BYTES, dtype=torch.uint8)
    header[:, :4] = scale.contiguous().view(-1, 1).view(torch.uint8)
    header[:, 4:8] = pages.view(torch.uint8)
    if bits == 8:
        return torch.cat([header, pack_codes(codes, bits, kv)], 1)
    narrow, step, zero = stage2(codes, bits)
    zero = zero.to(torch.int8).view(torch.uint8)
    return torch.cat([header, step.to(torch.uint8), zero, pack_codes(narrow, bits, kv)], 1)


def unpack_blocks(blocks: Tensor, head_dim: int, kv: int) -> tuple[Tensor, Tensor]:
    """Stage-1 codes that blocks of one width stand for, and their scales.

    Args:
        blocks: uint8 ``[n, block_bytes]``.
        head_dim: channels.
        kv: 0 for K, 1 for V.

    Returns:
        codes int32 ``[n, 64, head_dim]`` and scale fp32 ``[n]``.
    """
    bits = slab_bits(blocks.shape[1], head_dim)
    scale = blocks[:, :4].contiguous().view(torch.float32).view(-1)
    codes = unpack_codes(blocks[:, code_offset(bits, head_dim) :], bits, head_dim, kv)
    if bits == 8:
        return codes, scale
    step = blocks[:, HEADER_BYTES : HEADER_BYTES + head_dim].int()
    zero = blocks[:, HEADER_BYTES + head_dim : HEADER_BYTES + 2 * head_dim]
    return widen(codes, step, zero.contiguous().view(torch.int8).int()), scale


def block_page(blocks: Tensor) -> Tensor:
    """``page_idx`` of the headers of ``[..., block_bytes]``, int32 ``[...]``."""
    return blocks[..., 4:8].contiguous().view(torch.int32).squeeze(-1)
