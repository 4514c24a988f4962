"""The sparse codes of one layer's older tokens, ``csrc/lexico/README.md``'s store."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from kvcore import ops
from kvcore.cache.adaptive import SessionPair, encode_adaptive
from kvcore.cache.dictionaries import Pair
from kvcore.cache.lexico_settings import (
    BLOCK_TILES,
    BLOCK_TOKENS,
    TILE_TOKENS,
    LexicoSettings,
    tile_bytes,
)
from kvcore.cache.tensors import ordinary_tensors

# csrc/lexico/cpu/encode.cpp and encode_kernels.h.
_MAX_GRAM_ATOMS = 8192
_ATOM_ALIGNMENT = 128


class Block(NamedTuple):
    """4096 tokens of every sequence, uint8 ``[batch, kv_heads, bytes]`` of K and of V.

    Sequences of the same number in ``rows`` hold the same codes: beams of one prompt, which may
    then change places without a copy.
    """

    k: Tensor
    v: Tensor
    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes of the first ``num_tokens`` tokens of every sequence. Replaced, never changed.

    The successor of an object may write into its tails, but behind its ``tail_lens``. So whoever
    holds an object can read it for as long as its successors only add tokens.
    """

    settings: LexicoSettings
    blocks: tuple[Block, ...]
    k_tail: Tensor  # uint8 [batch, kv_heads, tiles, bytes]
    v_tail: Tensor
    tail_lens: Tensor  # int32 [batch]
    tail_len: int  # that of every sequence
    atoms: tuple[int, int]  # rows of K's and V's dictionary that are atoms

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        settings: LexicoSettings,
        device: torch.device,
        atoms: tuple[int, int],
    ) -> Codes:
        widths = (settings.k_sparsity, settings.v_sparsity)
        with ordinary_tensors(), device:
            tails = [
                torch.zeros((batch, kv_heads, 0, tile_bytes(width)), dtype=torch.uint8)
                for width in widths
            ]
            lens = torch.zeros(batch, dtype=torch.int32)
        return cls(settings, (), *tails, lens, 0, atoms)

    @property
    def num_tokens(self) -> int:
        return len(self.blocks) * BLOCK_TOKENS + self.tail_len

    def extended(self, k: Tensor, v: Tensor, pair: Pair | SessionPair) -> Codes:
        """These codes and those of more tokens.

        Args:
            k: ``[batch, kv_heads, num_new, head_dim]``, fp32, fp16 or bf16.
            v: shape and dtype of k.
            pair: the dictionaries.
        """
        codes, begin = self, 0
        with ordinary_tensors():
            while begin < k.shape[2]:
                end = min(k.shape[2], begin + BLOCK_TOKENS - codes.tail_len)
                codes = codes._appended(k[:, :, begin:end], v[:, :, begin:end], pair)
                begin = end
        return codes

    def _appended(self, k: Tensor, v: Tensor, pair: Pair | SessionPair) -> Codes:
        """With tokens for which a tail has room; a tail that they fill becomes a block."""
        settings = self.settings
        tail_len = self.tail_len + k.shape[2]
        k_coded, k_atoms = _encode(
            k, pair.k, self.atoms[0], settings.k_sparsity, settings.k_tolerance
        )
        v_coded, v_atoms = _encode(
            v, pair.v, self.atoms[1], settings.v_sparsity, settings.v_tolerance
        )
        atoms = k_atoms, v_atoms
        tails = [_widened(tail, tail_len) for tail in (self.k_tail, self.v_tail)]
        tail_lens = self.tail_lens.clone()
        ops.lexico_append(*k_coded, *v_coded, *tails, tail_lens)
        if tail_len < BLOCK_TOKENS:
            return Codes(settings, self.blocks, *tails, tail_lens, tail_len, atoms)
        rows = tuple(range(len(tail_lens)))
        block = Block(*ops.lexico_seal(*tails, v_atoms=pair.v.shape[0]), rows)
        empty = Codes.empty(len(rows), k.shape[1], settings, k.device, atoms)
        return dataclasses.replace(empty, blocks=(*self.blocks, block))

    def cut(self, num_tokens: int, pair: Pair | SessionPair) -> Codes:
        """The codes of the first tokens; those of a block that is cut come back into tails."""
        if num_tokens == self.num_tokens:
            return self
        num_blocks, tail_len = divmod(num_tokens, BLOCK_TOKENS)
        with ordinary_tensors():
            tails = self.k_tail, self.v_tail
            if num_blocks < len(self.blocks):
                if tail_len:
                    tails = self._unsealed(self.blocks[num_blocks], pair)
                else:
                    tails = [tail[:, :, :0].clone() for tail in tails]
            lens = torch.full_like(self.tail_lens, tail_len)
        return Codes(self.settings, self.blocks[:num_blocks], *tails, lens, tail_len, self.atoms)

    def selected(self, indices: list[int]) -> Codes:
        """Those of the sequences ``indices``, in that order."""
        with ordinary_tensors():
            index = torch.tensor(indices, dtype=torch.int64, device=self.tail_lens.device)
            blocks = []
            for block in self.blocks:
                rows = tuple(block.rows[i] for i in indices)
                if rows != block.rows:
                    block = Block(*(x.index_select(0, index) for x in block[:2]), rows)
                blocks.append(block)
            held = (self.k_tail, self.v_tail, self.tail_lens)
            held = [tensor.index_select(0, index) for tensor in held]
        return Codes(self.settings, tuple(blocks), *held, self.tail_len, self.atoms)

    def to(self, device: torch.device) -> Codes:
        with ordinary_tensors():
            blocks = tuple(Block(b.k.to(device), b.v.to(device), b.rows) for b in self.blocks)
            held = [x.to(device) for x in (self.k_tail, self.v_tail, self.tail_lens)]
        return Codes(self.settings, blocks, *held, self.tail_len, self.atoms)

    def reconstruct(self, pair: Pair | SessionPair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, kv_heads, num_tokens, head_dim]``."""
        parts: tuple[list, list] = ([], [])
        tails = [(self._unsealed(block, pair), BLOCK_TOKENS) for block in self.blocks]
        tails.append(((self.k_tail, self.v_tail), self.tail_len))
        for both, kv_len in tails:
            for tail, dictionary, held in zip(both, pair, parts, strict=True):
                codes = ops.lexico_unpack(tail, kv_len=kv_len)
                held.append(ops.lexico_reconstruct(*codes, dictionary, dtype=dtype))
        k, v = (held[0] if len(held) == 1 else torch.cat(held, 2) for held in parts)
        return k, v

    def _unsealed(self, block: Block, pair: Pair | SessionPair) -> tuple[Tensor, Tensor]:
        return ops.lexico_unseal(
            block.k,
            block.v,
            k_sparsity=self.settings.k_sparsity,
            v_sparsity=self.settings.v_sparsity,
            v_atoms=pair.v.shape[0],
        )

    def tensors(self) -> dict[str, list[Tensor]]:
        """Every tensor, by what it is for."""
        return {
            "blocks": [tensor for block in self.blocks for tensor in block[:2]],
            "tail": [self.k_tail, self.v_tail, self.tail_lens],
        }


def _encode(
    x: Tensor, dictionary: Tensor, atoms: int, sparsity: int, tolerance: float
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Codes over the first rows of a dictionary, and how many rows are atoms then."""
    if atoms == len(dictionary):
        return ops.lexico_encode(x, dictionary, sparsity=sparsity, tolerance=tolerance)[:3], atoms
    codes = encode_adaptive(x, dictionary, atoms, sparsity=sparsity, tolerance=tolerance)
    return codes[:3], codes.atoms


def _widened(tail: Tensor, num_tokens: int) -> Tensor:
    """The tail, or a longer copy of it that has room for so many tokens."""
    tiles = tail.shape[2]
    missing = -(-num_tokens // TILE_TOKENS) - tiles
    if missing <= 0:
        return tail
    # A share of what there is, so that a token is copied a few times at most while the tail grows;
    # a prompt's tail, the first, has no spare room.
    tiles = min(tiles + max(missing, tiles // 8), BLOCK_TILES)
    wider = tail.new_zeros((*tail.shape[:2], tiles, tail.shape[3]))
    wider[:, :, : tail.shape[2]] = tail
    return wider


def encoder_workspace(settings: LexicoSettings, pair: Pair | SessionPair, num_vectors: int) -> int:
    """Bytes that coding so many vectors of K and of V takes while it runs.

    The codes before they are stored, a copy of a dictionary in the order of the search, and, if
    there are so many vectors that it pays, the products of all its atoms with each other.
    """
    if not num_vectors:
        return 0
    codes, scratch = 0, 0
    for dictionary, sparsity in zip(pair, (settings.k_sparsity, settings.v_sparsity), strict=True):
        atoms, head_dim = dictionary.shape
        codes += num_vectors * (3 * sparsity + 2 + 4)  # with an fp32 residual each
        padded = -(-atoms // _ATOM_ALIGNMENT) * _ATOM_ALIGNMENT
        pays = atoms <= _MAX_GRAM_ATOMS and num_vectors >= atoms // sparsity
        # Whole products, and what most searches need of them.
        scratch = max(scratch, padded * (2 * head_dim + (3 * atoms if pays else 0)))
    return codes + scratch
