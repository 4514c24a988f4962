"""What differs between transformers 5.0 and 5.23, in one place."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


def query_length(query_length: int | Tensor) -> int:
    """The argument of ``get_mask_sizes``: a length, or ``cache_position`` up to 5.3."""
    return query_length.shape[0] if isinstance(query_length, Tensor) else query_length


@functools.cache
def _crop_takes_length() -> bool:
    return "max_length" in inspect.signature(DynamicLayer.crop).parameters


def length_after_crop(tokens_to_remove: int, seen: int) -> int:
    """Tokens that stay after ``crop``: its argument was the length to leave up to 5.12."""
    if tokens_to_remove < 0:
        return max(0, seen + tokens_to_remove)
    if tokens_to_remove == 0 and not _crop_takes_length():
        return seen
    return min(seen, tokens_to_remove)


def index_list(indices: Tensor, batch: int) -> list[int]:
    """Sequence numbers in [0, batch) out of an int or bool index tensor."""
    if isinstance(indices, Tensor) and indices.dtype == torch.bool:
        if tuple(indices.shape) != (batch,):
            raise IndexError(f"kvcore: indices must be bool [{batch}], got {list(indices.shape)}")
        indices = indices.nonzero()[:, 0]
    numbers = torch.as_tensor(indices).reshape(-1).tolist()
    for number in numbers:
        if not -batch <= number < batch:
            raise IndexError(f"kvcore: indices must be in [0, {batch}), got {number}")
    return [number % batch for number in numbers]
