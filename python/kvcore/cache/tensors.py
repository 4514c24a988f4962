"""How the tensors of caches are made and counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor


@contextlib.contextmanager
def ordinary_tensors():
    """Tensors made here can be changed in place later, inside and outside inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each allocation once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
