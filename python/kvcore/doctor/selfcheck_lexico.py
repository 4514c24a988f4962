"""Self-checks of lexico's ops: each on small inputs, compared with its reference."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import kvcore
from kvcore.doctor.mismatch import Mismatch, close, equal
from kvcore.reference import lexico as reference

_SPARSITY = 8
_ATOMS = 256
_TILES = 128  # of a full tail
_TOKENS = 50  # of the tails that are not full, of two tiles


@functools.cache
def _inputs(head_dim: int) -> tuple[Tensor, Tensor]:
    """Vectors and a dictionary."""
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(2, 2, _TOKENS, head_dim, generator=generator)
    atoms = torch.randn(_ATOMS, head_dim, generator=generator)
    return x, torch.nn.functional.normalize(atoms, dim=1)


@functools.cache
def _codes(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """indices, coefficients and scale of the vectors."""
    indices, coefficients, scale, _ = reference.lexico_encode(
        *_inputs(head_dim), sparsity=_SPARSITY
    )
    return indices, coefficients, scale


@functools.cache
def _tails(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tails of K and V, of the same codes, and their lengths."""
    batch, kv_heads = _inputs(head_dim)[0].shape[:2]
    tails = [reference.empty_tail(batch, kv_heads, 2, _SPARSITY) for _ in range(2)]
    lens = torch.zeros(batch, dtype=torch.int32)
    reference.lexico_append(*_codes(head_dim), *_codes(head_dim), *tails, lens)
    return *tails, lens


@functools.cache
def _full_tail(head_dim: int) -> Tensor:
    """A full tail of one head: the first tile of the others, over and over."""
    return _tails(head_dim)[0][:1, :1, :1].repeat(1, 1, _TILES, 1)


@functools.cache
def _blocks(head_dim: int) -> tuple[Tensor, Tensor]:
    """The full tail sealed, as K and as V."""
    tail = _full_tail(head_dim)
    return reference.lexico_seal(tail, tail, v_atoms=_ATOMS)


def _encode(head_dim: int, device: str) -> str:
    x, dictionary = _inputs(head_dim)
    actual = kvcore.lexico_encode(x.to(device), dictionary.to(device), sparsity=_SPARSITY)
    *codes, residual = (part.cpu() for part in actual)
    *_, expected = reference.lexico_encode(x, dictionary, sparsity=_SPARSITY)
    worst = (residual - expected).abs().max().item()
    if not worst <= 1e-3:
        raise Mismatch(f"residuals are off by {worst:.1e}, more than 1e-3")
    # Two atoms may be equally good, so what is compared is what the codes stand for.
    rebuilt = reference.lexico_reconstruct(*codes, dictionary)
    errors = (rebuilt - x).norm(dim=-1) / x.norm(dim=-1)
    worst = (errors - residual).abs().max().item()
    if not worst <= 0.01:
        raise Mismatch(f"codes err by {worst:.1e} more or less than the residuals they come with")
    return f"difference {worst:.0e}"


def _reconstruct(head_dim: int, device: str) -> str:
    arguments = (*_codes(head_dim), _inputs(head_dim)[1])
    actual = kvcore.lexico_reconstruct(*(x.to(device) for x in arguments)).cpu()
    expected = reference.lexico_reconstruct(*arguments)
    worst = ((actual - expected).norm() / expected.norm()).item()
    if not worst <= 1e-5:
        raise Mismatch(f"vectors are off by {worst:.1e} relative, more than 1e-5")
    return f"relative difference {worst:.0e}"


def _append(head_dim: int, device: str) -> str:
    codes = [x.to(device) for x in _codes(head_dim)]
    tails = [torch.zeros_like(x).to(device) for x in _tails(head_dim)]
    kvcore.lexico_append(*codes, *codes, *tails)
    names = ("k_tail", "v_tail", "tail_lens")
    for name, actual, expected in zip(names, tails, _tails(head_dim), strict=True):
        equal(actual, expected, name)
    return "bit-exact"


def _unpack(head_dim: int, device: str) -> str:
    actual = kvcore.lexico_unpack(_tails(head_dim)[0].to(device), kv_len=_TOKENS)
    names = ("indices", "coefficients", "scale")
    for name, a, e in zip(names, actual, _codes(head_dim), strict=True):
        equal(a, e, name)
    return "bit-exact"


def _seal(head_dim: int, device: str) -> str:
    tail = _full_tail(head_dim).to(device)
    actual = kvcore.lexico_seal(tail, tail, v_atoms=_ATOMS)
    for name, a, e in zip(("k_block", "v_block"), actual, _blocks(head_dim), strict=True):
        equal(a, e, name)
    return "bit-exact"


def _unseal(head_dim: int, device: str) -> str:
    options = {"k_sparsity": _SPARSITY, "v_sparsity": _SPARSITY, "v_atoms": _ATOMS}
    actual = kvcore.lexico_unseal(*(x.to(device) for x in _blocks(head_dim)), **options)
    expected = reference.lexico_unseal(*_blocks(head_dim), **options)
    for name, a, e in zip(("k_tail", "v_tail"), actual, expected, strict=True):
        equal(a, e, name)
    return "bit-exact"


def _attention(head_dim: int, device: str) -> str:
    x, dictionary = _inputs(head_dim)
    q = torch.cat([x, -x], 1)[:, :, :5]
    rest = (*_tails(head_dim), dictionary, dictionary, x, x)
    actual = kvcore.lexico_attention(q.to(device), [], [], *(y.to(device) for y in rest))
    return f"cosine {close(actual, reference.lexico_attention(q, [], [], *rest)):.7f}"


CHECKS: dict[str, Callable[[int, str], str]] = {
    "lexico_encode": _encode,
    "lexico_reconstruct": _reconstruct,
    "lexico_append": _append,
    "lexico_seal": _seal,
    "lexico_unseal": _unseal,
    "lexico_unpack": _unpack,
    "lexico_attention": _attention,
}
