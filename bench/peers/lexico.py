"""Orthogonal matching pursuit that a user would otherwise run: scikit-learn's, and in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def scikit_learn(x: Tensor, dictionary: Tensor, sparsity: int) -> dict[str, Callable[[], Tensor]]:
    """Codes ``[num_vectors, atoms]`` of fp32 vectors, in the two formulations for many targets.

    The Gram matrix of the second is computed beforehand, which favours the peer.
    """
    from sklearn.linear_model import orthogonal_mp, orthogonal_mp_gram
    from threadpoolctl import threadpool_limits

    atoms, targets = dictionary.T.contiguous().numpy(), x.T.contiguous().numpy()
    gram = atoms.T @ atoms

    def plain():
        with threadpool_limits(torch.get_num_threads()):
            codes = orthogonal_mp(atoms, targets, n_nonzero_coefs=sparsity)
        return torch.from_numpy(codes.T)

    def with_gram():
        with threadpool_limits(torch.get_num_threads()):
            # Copied inside: it changes both.
            products = atoms.T @ targets
            codes = orthogonal_mp_gram(gram, products, n_nonzero_coefs=sparsity)
        return torch.from_numpy(codes.T)

    return {
        "scikit-learn orthogonal_mp": plain,
        "scikit-learn orthogonal_mp_gram": with_gram,
    }


def batched_omp(
    x: Tensor, dictionary: Tensor, gram: Tensor, sparsity: int
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2412.08890 for a batch of vectors at once, in plain torch.

    Correlations with all atoms are kept up to date with the Gram matrix and an inverse Cholesky
    factor. Nothing is specific to a device or to a machine.

    Args:
        x: ``[num_vectors, head_dim]``.
        dictionary: ``[atoms, head_dim]``, rows of norm 1.
        gram: ``dictionary @ dictionary.T``.
        sparsity: atoms of a code.

    Returns:
        Indices and values ``[num_vectors, sparsity]``.
    """
    num_vectors, atoms = len(x), len(dictionary)
    correlations = x @ dictionary.T
    indices = torch.zeros(num_vectors, sparsity, dtype=torch.int64)
    # Directions of the selected atoms, orthogonal to each other: their products with all atoms, and
    # how they are made of the selected atoms.
    products = torch.zeros(num_vectors, sparsity, atoms)
    factors = torch.zeros(num_vectors, sparsity, sparsity)
    lengths = torch.zeros(num_vectors, sparsity)
    rows = torch.arange(num_vectors)
    for k in range(sparsity):
        atom = correlations.abs().argmax(1)
        indices[:, k] = atom
        z = products[rows, :k, atom][:, None]
        gamma = torch.rsqrt(1 - (z * z).sum(2)).clamp_max(1e6)
        product = gram[atom] - torch.bmm(z, products[:, :k])[:, 0]
        products[:, k] = gamma * product
        factors[:, k, :k] = -gamma * torch.bmm(z, factors[:, :k, :k])[:, 0]
        factors[:, k, k] = gamma[:, 0]
        lengths[:, k] = gamma[:, 0] * correlations[rows, atom]
        correlations -= lengths[:, k, None] * products[:, k]
    return indices, torch.bmm(lengths[:, None], factors)[:, 0]
