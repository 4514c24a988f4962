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


def under_autocast(dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the tensors in ``dtype``, or in autocast's where that is None.

    Models then make K in fp32 and V in autocast's dtype, and attention casts both. Outside of
    autocast tensors stay as they are, and so does fp64, which autocast leaves alone.
    """
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(device)
    return tuple(x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in tensors)
