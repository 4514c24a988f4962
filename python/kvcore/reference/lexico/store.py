"""The store of codes: tails of tiles and sealed blocks, byte by byte."""

import torch
from torch import Tensor

# Constants of csrc/lexico/layout.h.
TILE_TOKENS = 32
BLOCK_TILES = 128
BLOCK_TOKENS = TILE_TOKENS * BLOCK_TILES
BLOCK_ALIGNMENT = 64

Codes = tuple[Tensor, Tensor, Tensor]


def tile_bytes(width: int) -> int:
    """Bytes of a tile whose codes have ``width`` pairs."""
    return TILE_TOKENS * (3 * width + 2)


def tail_sparsity(tail: Tensor) -> int:
    """Pairs of the codes of a tail, from the bytes of its tiles."""
    return (tail.shape[-1] // TILE_TOKENS - 2) // 3


def empty_tail(batch: int, kv_heads: int, tiles: int, sparsity: int) -> Tensor:
    """A tail without tokens."""
    return torch.zeros(batch, kv_heads, tiles, tile_bytes(sparsity), dtype=torch.uint8)


def _parts(tiles: Tensor) -> Codes:
    """Views of indices and coefficients ``[..., width, 32]`` and scale ``[..., 32]`` of tiles."""
    width = tail_sparsity(tiles)
    ends = (2 * TILE_TOKENS, 2 * TILE_TOKENS * (1 + width), tile_bytes(width))
    scale = tiles[..., : ends[0]].view(torch.float16)
    indices = tiles[..., ends[0] : ends[1]].view(torch.int16)
    coefficients = tiles[..., ends[1] : ends[2]].view(torch.int8)
    shape = (*tiles.shape[:-1], width, TILE_TOKENS)
    return indices.unflatten(-1, shape[-2:]), coefficients.unflatten(-1, shape[-2:]), scale


def lexico_append(
    k_indices: Tensor,
    k_coefficients: Tensor,
    k_scale: Tensor,
    v_indices: Tensor,
    v_coefficients: Tensor,
    v_scale: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    tail_lens: Tensor,
    *,
    check_values: bool = False,
) -> None:
    """Writes new codes behind those of the tails."""
    num_new = k_indices.shape[2]
    for tail, new in (
        (k_tail, (k_indices, k_coefficients, k_scale)),
        (v_tail, (v_indices, v_coefficients, v_scale)),
    ):
        indices, coefficients, scale = _parts(tail)
        for b, begin in enumerate(tail_lens.tolist()):
            for i in range(num_new):
                tile, lane = divmod(begin + i, TILE_TOKENS)
                indices[b, :, tile, :, lane] = new[0][b, :, i]
                coefficients[b, :, tile, :, lane] = new[1][b, :, i]
                scale[b, :, tile, lane] = new[2][b, :, i]
    tail_lens += num_new


def lexico_unpack(tail: Tensor, *, kv_len: int) -> Codes:
    """The codes of the first ``kv_len`` tokens of a tail."""
    indices, coefficients, scale = _parts(tail)
    rows = [x.transpose(-1, -2).flatten(2, 3) for x in (indices, coefficients)]
    return tuple(x[:, :, :kv_len].contiguous() for x in (*rows, scale.flatten(2, 3)))


def _pad(blocks: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """One block per head, all as long as the longest."""
    size = max((len(block) for block in blocks), default=0)
    size = -(-size // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
    out = torch.zeros(len(blocks), size, dtype=torch.uint8)
    for row, block in zip(out, blocks, strict=True):
        row[: len(block)] = block
    return out.view(*shape, size)


def _seal_k(tiles: Tensor) -> Tensor:
    indices, coefficients, scale = _parts(tiles)
    widths = (coefficients != 0).sum(1).amax(1)
    parts = [widths.to(torch.uint8)]
    for t, width in enumerate(widths.tolist()):
        # What is not zero moves to the front, in order.
        order = (coefficients[t] == 0).int().sort(dim=0, stable=True).indices[:width]
        kept = coefficients[t].gather(0, order)
        atoms = indices[t].gather(0, order) * (kept != 0)
        for part in (scale[t], atoms, kept):
            parts.append(part.contiguous().flatten().view(torch.uint8))
    return torch.cat(parts)


def _seal_v(tiles: Tensor, atoms: int) -> Tensor:
    indices, coefficients, scale = _parts(tiles)
    rows = coefficients.transpose(1, 2).flatten(0, 1)  # [tokens, sparsity]
    token, pair = (rows != 0).nonzero(as_tuple=True)
    atom = indices.transpose(1, 2).flatten(0, 1)[token, pair].long()
    order = atom.sort(stable=True).indices
    counts = torch.bincount(atom, minlength=atoms)
    parts = (
        scale,
        counts.to(torch.int16),
        token[order].to(torch.int16),
        rows[token, pair][order],
    )
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])


def lexico_seal(k_tail: Tensor, v_tail: Tensor, *, v_atoms: int) -> tuple[Tensor, Tensor]:
    """Blocks of full tails."""
    shape = k_tail.shape[:2]
    k_block = _pad([_seal_k(tiles) for tiles in k_tail.flatten(0, 1)], shape)
    v_block = _pad([_seal_v(tiles, v_atoms) for tiles in v_tail.flatten(0, 1)], shape)
    return k_block, v_block


def _unseal_k(block: Tensor, tail: Tensor) -> None:
    begin = BLOCK_TILES
    indices, coefficients, scale = _parts(tail)
    for t, width in enumerate(block[:BLOCK_TILES].tolist()):
        tile = block[begin : begin + tile_bytes(width)].clone()
        scale[t] = tile[: 2 * TILE_TOKENS].view(torch.float16)
        if width:
            indices[t, :width], coefficients[t, :width], _ = _parts(tile)
        begin += tile_bytes(width)


def _unseal_v(block: Tensor, tail: Tensor, atoms: int) -> None:
    indices, coefficients, scale = _parts(tail)
    sizes = [2 * BLOCK_TOKENS, 2 * atoms]
    scale.copy_(block[: sizes[0]].clone().view(torch.float16).view_as(scale))
    counts = block[sizes[0] : sum(sizes)].clone().view(torch.int16).long() & 0xFFFF
    pairs = int(counts.sum())
    begin = sum(sizes)
    tokens = block[begin : begin + 2 * pairs].clone().view(torch.int16).tolist()
    values = block[begin + 2 * pairs : begin + 3 * pairs].clone().view(torch.int8)
    used = [0] * BLOCK_TOKENS
    atom_of = torch.repeat_interleave(torch.arange(atoms), counts)
    for token, atom, value in zip(tokens, atom_of, values, strict=True):
        tile, lane = divmod(token, TILE_TOKENS)
        indices[tile, used[token], lane] = atom
        coefficients[tile, used[token], lane] = value
        used[token] += 1


def lexico_unseal(
    k_block: Tensor, v_block: Tensor, *, k_sparsity: int, v_sparsity: int, v_atoms: int
) -> tuple[Tensor, Tensor]:
    """Full tails from blocks; a code's pairs of V come back in the order of their atoms."""
    batch, kv_heads = k_block.shape[:2]
    k_tail = empty_tail(batch, kv_heads, BLOCK_TILES, k_sparsity)
    v_tail = empty_tail(batch, kv_heads, BLOCK_TILES, v_sparsity)
    for b in range(batch):
        for h in range(kv_heads):
            _unseal_k(k_block[b, h], k_tail[b, h])
            _unseal_v(v_block[b, h], v_tail[b, h], v_atoms)
    return k_tail, v_tail
