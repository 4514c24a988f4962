"""A dictionary that grows with what it codes, one vector at a time."""

import torch
from torch import Tensor

from kvcore.reference.lexico.codes import lexico_encode


def encode_adaptive(
    x: Tensor, dictionary: Tensor, *, sparsity: int, tolerance: float, room: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Codes over a dictionary that takes up to ``room`` of the vectors in as atoms.

    A vector whose code misses more than ``tolerance`` of its norm becomes an atom, unless one that
    was made of an earlier vector leaves no more of it. Missed vectors that have such an atom, their
    own or another's, are coded with all atoms there are in the end.

    Args:
        x: ``[batch, heads, tokens, head_dim]``.
        dictionary: ``[atoms, head_dim]``, rows of norm 1.
        sparsity: atoms of a code.
        tolerance: in (0, 1).
        room: atoms that may be added.

    Returns:
        What ``lexico_encode`` returns, and the dictionary with the new atoms behind.
    """
    codes = lexico_encode(x, dictionary, sparsity=sparsity, tolerance=tolerance)
    flat = x.double().flatten(0, 2)
    scale, residual = codes[2].flatten(), codes[3].flatten()
    new: list[Tensor] = []
    served = []
    for i, vector in enumerate(flat):
        if not (residual[i] > tolerance and scale[i].isfinite()):
            continue
        rests = [(vector - (vector @ atom) * atom).norm() for atom in new]
        if not any(rest <= tolerance * vector.norm() for rest in rests):
            if len(new) == room:
                continue
            new.append(vector / vector.norm())
        served.append(i)
    grown = torch.cat([dictionary, *(atom[None].to(dictionary.dtype) for atom in new)])
    if served:
        again = lexico_encode(
            flat[served][None, None].to(x.dtype), grown, sparsity=sparsity, tolerance=tolerance
        )
        for kept, part in zip(codes, again, strict=True):
            kept.flatten(0, 2)[served] = part[0, 0]
    return codes, grown
