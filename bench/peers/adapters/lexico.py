"""Adapter for worker.py: the pursuit that Lexico's authors published."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def load(arrays: dict, *, work: str, threads: int, device: str) -> dict[str, Callable]:
    """Codes of all vectors in one call, as its cache makes them: rows of a CSR matrix."""
    import torch
    from lexico.omp import omp

    class Codes:
        """What the pursuit returns; its vectors, if somebody asks for an array."""

        def __init__(self, row_starts, indices, values) -> None:
            self.parts = row_starts, indices, values

        def __array__(self, dtype=None, copy=None) -> np.ndarray:
            row_starts, indices, values = (x.cpu().float() for x in self.parts)
            rows = torch.repeat_interleave(row_starts.diff().long())
            rebuilt = torch.zeros(len(row_starts) - 1, atoms.shape[1])
            rebuilt.index_add_(0, rows, values[:, None] * atoms[indices.long()])
            return rebuilt.numpy()

    if work != "encode":
        raise ValueError(f"work must be encode, got {work!r}")
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    atoms, x = (torch.from_numpy(np.array(arrays[name])) for name in ("dictionary", "x"))
    sparsity = int(arrays["sparsity"])
    columns = atoms.T.contiguous()[None]
    return {"omp": lambda: Codes(*omp(columns, x[None], n_nonzero_coefs=sparsity))}
