"""A store of codes as facts and tensors, without spare room, and back, checked."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcore import ops
from kvcore.cache.codes import Block, Codes
from kvcore.cache.dictionaries import Pair, norms
from kvcore.cache.file_format import FILE, check, get_int, store_facts, store_sizes
from kvcore.cache.lexico_settings import (
    BLOCK_TOKENS,
    COEFFICIENT_MAX,
    MAX_ATOMS,
    TILE_TOKENS,
    LexicoSettings,
    tile_bytes,
)
from kvcore.cache.lexico_store import LexicoStore
from kvcore.cache.tensors import ordinary_tensors

LEXICO_FILE = dataclasses.replace(FILE, format="kvcore-lexico-cache")
# ``blocks`` has the bytes of a head of every block, of K and of V.
STORE_FACTS = frozenset(
    {"batch", "kv_heads", "head_dim", "num_tokens", "padding", "buffer_len", "blocks", "atoms"}
)


def export_store(store: LexicoStore, given: tuple[int, int]) -> tuple[dict, dict[str, Tensor]]:
    """Facts for JSON, and tensors; ``given`` are the atoms of the model's dictionaries."""
    codes = store.codes
    tiles = _num_tiles(codes.tail_len)
    recent = store.buffer[:, :, :, : store.buffer_len]
    tensors = {
        "k_tail": codes.k_tail[:, :, :tiles],
        "v_tail": codes.v_tail[:, :, :tiles],
        "keys": recent[0],
        "values": recent[1],
    }
    for i, block in enumerate(codes.blocks):
        tensors |= {f"k_block.{i}": block.k, f"v_block.{i}": block.v}
    for name, table, first, last in zip("kv", store.pair, given, codes.atoms, strict=True):
        tensors[f"{name}_atoms"] = table[first:last]
    facts = {
        **store_facts(store),
        "buffer_len": store.buffer_len,
        "atoms": list(codes.atoms),
        "blocks": [[block.k.shape[2], block.v.shape[2]] for block in codes.blocks],
    }
    return facts, tensors


def store_form(
    row: dict, settings: LexicoSettings, pair: Pair, dtype: torch.dtype, field: str
) -> dict[str, tuple]:
    """Checks what the metadata say of a store; returns dtype and shape of its tensors."""
    batch, kv_heads, head_dim, num_tokens, _ = store_sizes(row, field)
    expected = pair.k.shape[1]
    check(head_dim == expected, f"{field}.head_dim", f"the dictionaries' {expected}", head_dim)
    given = (len(pair.k), len(pair.v))
    atoms = FILE.get_ints(row, "atoms", field, 1, MAX_ATOMS)
    most = [sum(both) for both in zip(given, settings.room(given, head_dim), strict=True)]
    holds = len(atoms) == 2 and all(a <= b <= c for a, b, c in zip(given, atoms, most, strict=True))
    check(holds, f"{field}.atoms", f"from {list(given)} to {most}", atoms)
    buffer_len = get_int(row, "buffer_len", field, 0, min(num_tokens, settings.capacity))
    blocks = row["blocks"]
    num_blocks, tail_len = divmod(num_tokens - buffer_len, BLOCK_TOKENS)
    holds = isinstance(blocks, list) and len(blocks) == num_blocks
    check(holds, f"{field}.blocks", f"{num_blocks} pairs of sizes", blocks)
    form = {"keys": (dtype, [batch, kv_heads, buffer_len, head_dim])}
    form["values"] = form["keys"]
    for name, first, last in zip("kv", given, atoms, strict=True):
        form[f"{name}_atoms"] = (torch.float32, [last - first, head_dim])
    for name, width in (("k_tail", settings.k_sparsity), ("v_tail", settings.v_sparsity)):
        shape = [batch, kv_heads, _num_tiles(tail_len), tile_bytes(width)]
        form[name] = (torch.uint8, shape)
    for i, sizes in enumerate(blocks):
        check(
            isinstance(sizes, list) and len(sizes) == 2,
            f"{field}.blocks[{i}]",
            "the bytes of K and of V",
            sizes,
        )
        for name, size in zip(("k_block", "v_block"), sizes, strict=True):
            form[f"{name}.{i}"] = (torch.uint8, [batch, kv_heads, size])
    return form


def check_store(
    row: dict, tensors: dict[str, Tensor], settings: LexicoSettings, pair: Pair, field: str
) -> None:
    """Checks the values of a store whose form was checked."""
    for name in ("k_atoms", "v_atoms"):
        check(*norms(tensors[name], f"{field}.{name}"))
    # What a store of the file's own would have.
    rooms = settings.room((len(pair.k), len(pair.v)), row["head_dim"])
    capacity = len(pair.v) + rooms[1]
    atoms = row["atoms"]
    num_blocks, tail_len = divmod(row["num_tokens"] - row["buffer_len"], BLOCK_TOKENS)
    for i in range(num_blocks):
        both = [tensors[f"{name}.{i}"] for name in ("k_block", "v_block")]
        tails = _open_block(both, settings, capacity, f"{field}.blocks[{i}]")
        _check_codes(tails, BLOCK_TOKENS, atoms, (f"{field}.k_block.{i}", f"{field}.v_block.{i}"))
        # What a block is made of is in it, in the one order, and nothing else.
        sealed = ops.lexico_seal(*tails, v_atoms=capacity)
        for name, block, again in zip("kv", both, sealed, strict=True):
            spare = block.shape[2] - again.shape[2]
            holds = spare >= 0 and torch.equal(pad(again, (0, spare)), block)
            check(holds, f"{field}.{name}_block.{i}", "as lexico_seal makes it", "other bytes")
    tails = [tensors[name] for name in ("k_tail", "v_tail")]
    _check_codes(tails, tail_len, atoms, (f"{field}.k_tail", f"{field}.v_tail"))


def restore_codes(
    row: dict, tensors: dict[str, Tensor], settings: LexicoSettings, device: torch.device
) -> Codes:
    """The codes that :func:`export_store` described; everything has been checked."""
    tail_len = (row["num_tokens"] - row["buffer_len"]) % BLOCK_TOKENS
    rows = tuple(range(row["batch"]))
    with ordinary_tensors():
        held = {name: tensor.to(device) for name, tensor in tensors.items()}
        blocks = [
            Block(held[f"k_block.{i}"], held[f"v_block.{i}"], rows)
            for i in range(len(row["blocks"]))
        ]
        lens = torch.full((row["batch"],), tail_len, dtype=torch.int32, device=device)
    tails = held["k_tail"], held["v_tail"]
    return Codes(settings, tuple(blocks), *tails, lens, tail_len, tuple(row["atoms"]))


def fill_store(
    store: LexicoStore, row: dict, tensors: dict[str, Tensor], device: torch.device
) -> None:
    """Makes an empty store the one that :func:`export_store` described."""
    codes = restore_codes(row, tensors, store.settings, device)
    recent = torch.stack([tensors["keys"], tensors["values"]]).to(device)
    padding = np.array(row["padding"], dtype=np.int64)
    for name, table, last in zip("kv", store.pair, row["atoms"], strict=True):
        added = tensors[f"{name}_atoms"]
        if len(added):
            table[last - len(added) : last] = added.to(device)
    store.restore(codes, recent, padding)


def _num_tiles(tokens: int) -> int:
    return -(-tokens // TILE_TOKENS)


def _open_block(
    both: list[Tensor], settings: LexicoSettings, v_atoms: int, field: str
) -> tuple[Tensor, Tensor]:
    try:
        return ops.lexico_unseal(
            *both,
            k_sparsity=settings.k_sparsity,
            v_sparsity=settings.v_sparsity,
            v_atoms=v_atoms,
        )
    except RuntimeError as error:
        check(False, field, "blocks of codes", error)
        raise


def _check_codes(
    tails: tuple[Tensor, Tensor], kv_len: int, atoms: list[int], fields: tuple[str, str]
) -> None:
    for tail, count, field in zip(tails, atoms, fields, strict=True):
        indices, coefficients, scale = ops.lexico_unpack(tail, kv_len=kv_len)
        is_index = (indices >= 0) & (indices < count)
        check(is_index.all(), field, f"indices in [0, {count})", "others")
        is_code = coefficients >= -COEFFICIENT_MAX
        limits = f"coefficients in [-{COEFFICIENT_MAX}, {COEFFICIENT_MAX}]"
        check(is_code.all(), field, limits, "a smaller one")
        # NaN marks a vector that was not finite.
        is_scale = scale.isnan() | ((scale >= 0) & scale.isfinite())
        check(is_scale.all(), field, "scales of at least 0", "others")
