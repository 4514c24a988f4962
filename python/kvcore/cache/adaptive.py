"""A dictionary that grows with the context it codes (arXiv 2412.08890, section 3.4).

A vector that no code of the dictionary comes near enough to becomes an atom itself, and its code is
then one pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcore import ops
from kvcore.cache.dictionaries import Pair


class AdaptiveCodes(NamedTuple):
    """Codes of vectors as :func:`kvcore.lexico_encode` gives them, and the atoms now in use."""

    indices: Tensor
    coefficients: Tensor
    scale: Tensor
    residual: Tensor
    atoms: int


class SessionPair(NamedTuple):
    """K's and V's dictionary of one store: a copy of the model's, and room for more atoms.

    How many of the rows are atoms is known to the codes that use them.
    """

    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, pair: Pair, rooms: tuple[int, int]) -> SessionPair:
        grown = []
        for dictionary, room in zip(pair, rooms, strict=True):
            more = dictionary.new_zeros((room, dictionary.shape[1]))
            grown.append(torch.cat([dictionary, more]) if room else dictionary)
        return cls(*grown)


def encode_adaptive(
    x: Tensor, dictionary: Tensor, atoms: int, *, sparsity: int, tolerance: float
) -> AdaptiveCodes:
    """Codes of vectors over a dictionary that takes in those it cannot express.

    A vector misses if the residual of its code is above ``tolerance``. Misses become atoms in their
    order, as long as there is room, but not one that an atom made before it in this call is near
    enough to, on its own. All misses that are then near to an atom are coded again; those for which
    there was no room keep their codes.

    Args:
        x: ``[batch, heads, tokens, head_dim]``, fp32, fp16 or bf16.
        dictionary: fp32 ``[capacity, head_dim]``, at most 32,768 rows; the first ``atoms`` are
            atoms of norm 1, the others are room, and may be written to.
        atoms: rows in use, at least 1.
        sparsity: atoms of a code.
        tolerance: relative error of a code that is enough, in (0, 1).

    Returns:
        The codes, and how many rows of the dictionary are in use now. Whoever keeps the number of
        before can go on as if the call had not been.

    Raises:
        ValueError: for ``atoms`` or ``tolerance`` out of range; others as lexico_encode.
    """
    if not 1 <= atoms <= len(dictionary):
        raise ValueError(
            f"encode_adaptive: atoms must be in [1, {len(dictionary)}], the rows of the "
            f"dictionary, got {atoms}"
        )
    if not 0 < tolerance < 1:
        raise ValueError(f"encode_adaptive: tolerance must be in (0, 1), got {tolerance}")
    options = {"sparsity": sparsity, "tolerance": tolerance}
    codes = ops.lexico_encode(x, dictionary[:atoms], **options)
    # What has no finite scale has a residual of no use.
    missed = (codes[3] > tolerance) & codes[2].isfinite()
    if atoms == len(dictionary) or not missed.any():
        return AdaptiveCodes(*codes, atoms)
    vectors = x[missed]
    unit = torch.nn.functional.normalize(vectors.double(), dim=1).float()
    new, served = _choose(unit, len(dictionary) - atoms, tolerance)
    dictionary[atoms : atoms + len(new)] = unit[new]
    atoms += len(new)
    again = ops.lexico_encode(vectors[served][None, None], dictionary[:atoms], **options)
    places = missed.nonzero()[served].unbind(1)
    for kept, part in zip(codes, again, strict=True):
        kept[places] = part[0, 0]
    return AdaptiveCodes(*codes, atoms)


def _choose(unit: Tensor, room: int, tolerance: float) -> tuple[list[int], Tensor]:
    """Which of the vectors ``[num_vectors, head_dim]`` of norm 1 become atoms, and bool
    ``[num_vectors]``, which are near to one of them."""
    # An atom leaves of a vector sqrt(1 - cosine^2) of its norm.
    near = (1 - tolerance**2) ** 0.5
    served = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    new: list[int] = []
    while len(new) < room:
        left = (~served).nonzero()
        if not len(left):
            break
        first = int(left[0])
        new.append(first)
        served |= (unit @ unit[first]).abs() >= near
        served[first] = True
    return new, served
