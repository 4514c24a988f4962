"""Tokens that are not compressed, and how the tensors of caches are made."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor


@contextlib.contextmanager
def ordinary_tensors():
    """Tensors made here can be changed in place later, inside and outside inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class ExactTokens:
    """K and V as they came; replaced as a whole, never changed.

    ``tensors`` are K and V ``[batch, kv_heads, tokens, head_dim]``, ``padding`` int64 ``[batch]``
    counts the leading tokens of each sequence that are padding.
    """

    def __init__(self, tensors: list[Tensor], padding: np.ndarray) -> None:
        self.tensors = tensors
        self.padding = padding

    @classmethod
    def copy_of(cls, k: Tensor, v: Tensor, padding: np.ndarray) -> ExactTokens:
        """Copies: what the caller does to its tensors later is not the cache's business, and a
        slice would keep a larger tensor alive."""
        with ordinary_tensors():
            return cls([tensor.detach().clone() for tensor in (k, v)], padding)

    @property
    def num_tokens(self) -> int:
        return self.tensors[0].shape[2]

    def cut(self, num_tokens: int) -> ExactTokens:
        """The first tokens."""
        with ordinary_tensors():
            tensors = [tensor[:, :, :num_tokens].clone() for tensor in self.tensors]
        return ExactTokens(tensors, np.minimum(self.padding, num_tokens))

    def selected(self, indices: list[int]) -> ExactTokens:
        """The sequences ``indices``, in that order."""
        with ordinary_tensors():
            return ExactTokens([tensor[indices] for tensor in self.tensors], self.padding[indices])

    def to(self, device: torch.device) -> ExactTokens:
        return ExactTokens([tensor.to(device) for tensor in self.tensors], self.padding)
