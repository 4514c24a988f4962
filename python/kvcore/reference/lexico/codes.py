"""Sparse codes of vectors over a dictionary."""

import torch
from torch import Tensor

# Constants of csrc/lexico/layout.h.
COEFFICIENT_MAX = 127
E4M3_MAX = 448
STOP_CORRELATION = 2.0**-20
MIN_DISTANCE_SQUARED = 2.0**-16


def orthogonal_matching_pursuit(
    x: Tensor, dictionary: Tensor, *, sparsity: int, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Greedy sparse codes: the most correlated atom joins, then all coefficients are refitted.

    Args:
        x: ``[num_vectors, head_dim]``, finite.
        dictionary: ``[atoms, head_dim]``, rows of norm 1, dtype of x.
        sparsity: atoms of a code at most.
        tolerance: a vector is done when the norm of its residual is at most this times its own.

    Returns:
        ``indices`` int64 and ``values`` ``[num_vectors, sparsity]``, in the order of selection and
        zeros where fewer atoms were selected.
    """
    num_vectors = len(x)
    indices = torch.zeros(num_vectors, sparsity, dtype=torch.int64)
    values = x.new_zeros(num_vectors, sparsity)
    norm = x.norm(dim=1)
    active = norm > 0
    residual = x.clone()
    for k in range(sparsity):
        active = active & (residual.norm(dim=1) > tolerance * norm)
        if not active.any():
            break
        rows = active.nonzero().squeeze(1)
        correlations = residual[rows] @ dictionary.T
        # argmax may return any of several equal maxima; the first one is wanted.
        magnitude = correlations.abs()
        best, _ = magnitude.max(1, keepdim=True)
        atom = (magnitude == best).int().argmax(1)

        kept = dictionary[indices[rows, :k]]  # [rows, k, head_dim]
        new = dictionary[atom]
        distance = new.square().sum(1)
        if k:
            # The squared distance of the new atom from the span of the others.
            products = kept @ new.unsqueeze(2)
            inverse = torch.linalg.solve(kept @ kept.mT, products)
            distance = distance - (products * inverse).sum((1, 2))
        negligible = best.squeeze(1) <= STOP_CORRELATION * norm[rows]
        keep = ~negligible & (distance > MIN_DISTANCE_SQUARED)
        active[rows[~keep]] = False
        rows = rows[keep]
        indices[rows, k] = atom[keep]
        atoms = dictionary[indices[rows, : k + 1]]
        targets = atoms @ x[rows].unsqueeze(2)
        fitted = torch.linalg.solve(atoms @ atoms.mT, targets)
        values[rows, : k + 1] = fitted.squeeze(2)
        residual[rows] = x[rows] - (fitted.mT @ atoms).squeeze(1)
    return indices, values


def _half_at_least(x: Tensor) -> Tensor:
    """The least fp16 that is not below x >= 0."""
    half = x.half()
    # Positive halves are in the order of their bits.
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.double() < x.double(), above, half)


def lexico_encode(
    x: Tensor,
    dictionary: Tensor,
    gram: Tensor | None = None,
    *,
    sparsity: int,
    tolerance: float = 0.0,
    dtype: torch.dtype = torch.int8,
    check_values: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of vectors; ``gram`` changes nothing but the time that backends take."""
    head_dim = x.shape[-1]
    vectors = x.double().reshape(-1, head_dim)
    finite = vectors.isfinite().all(1, keepdim=True)
    safe = vectors.where(finite, 0)
    # A power of two, so that no square over- or underflows, and nothing is rounded.
    exponent = torch.frexp(safe.abs().amax(1, keepdim=True)).exponent
    scaled = torch.ldexp(safe, -exponent)
    indices, values = orthogonal_matching_pursuit(
        scaled, dictionary.double(), sparsity=sparsity, tolerance=tolerance
    )
    explained = (values.unsqueeze(1) @ dictionary.double()[indices]).squeeze(1)
    norm = scaled.norm(dim=1)
    residual = (scaled - explained).norm(dim=1) / norm.where(norm > 0, 1)
    residual = residual.where(finite.squeeze(1), torch.nan).float()

    values = torch.ldexp(values, exponent)
    scale = torch.ones_like(values[:, :1]).half()
    stored = finite
    if dtype != torch.float32:
        largest = COEFFICIENT_MAX if dtype == torch.int8 else E4M3_MAX
        scale = _half_at_least((values.abs().amax(1, keepdim=True) / largest).float())
        stored = finite & scale.isfinite()
        values = values / scale.double().where(scale > 0, 1)
        values = values.round() if dtype == torch.int8 else values.float()
    coefficients = values.where(stored, 0).to(dtype)
    scale = scale.where(stored, torch.nan)
    shape = x.shape[:-1]
    return (
        indices.to(torch.int16).view(*shape, sparsity),
        coefficients.view(*shape, sparsity),
        scale.view(shape),
        residual.view(shape),
    )


def lexico_reconstruct(
    indices: Tensor,
    coefficients: Tensor,
    scale: Tensor,
    dictionary: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    check_values: bool = False,
) -> Tensor:
    """``scale * sum_j coefficients[j] * dictionary[indices[j]]``, rounded once to ``dtype``."""
    atoms = dictionary.double()[indices.long()]  # [..., sparsity, head_dim]
    sums = (coefficients.float().double().unsqueeze(-1) * atoms).sum(-2)
    return (sums * scale.double().unsqueeze(-1)).to(dtype)
