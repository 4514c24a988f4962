"""Tokens that are not compressed, and which cannot be."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcore.cache import reasons
from kvcore.cache.settings import HEAD_DIMS
from kvcore.cache.tensors import ordinary_tensors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def why_unsupported(
    k_shape: tuple[int, ...], v_shape: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    """Why K and V of this kind cannot be stored; None if they can."""
    if k_shape != v_shape:
        detail = f"K is {list(k_shape)} and V is {list(v_shape)} without tokens"
        name = "different K and V"
    elif k_shape[2] not in HEAD_DIMS:
        detail = f"got {k_shape[2]}, supported are {', '.join(map(str, HEAD_DIMS))}"
        name = "head_dim"
    elif dtype not in _DTYPES:
        detail = f"got {dtype}, supported are float32, float16 and bfloat16"
        name = "dtype"
    else:
        return None
    reasons.record(f"unsupported {name}", f"{detail}; the layer is cached exactly")
    return name
