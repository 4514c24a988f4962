"""Memory that ends where it ends: tensors beside pages that nobody may touch."""

import ctypes
import mmap

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
PROT_NONE, PROT_READ = 0, 1


def _protect(address: int, size: int, protection: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(x: Tensor, edge: str = "end", *, readonly: bool = False) -> Tensor:
    """A contiguous copy in pages of its own, between two that no access survives.

    edge says which end of the copy touches such a page: then reading one byte further ends the
    process. A readonly copy does not survive being written either.
    """
    if x.numel() == 0:
        return x.clone()
    pages = -(-x.nbytes // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    offset = _PAGE if edge == "start" else (pages + 1) * _PAGE - x.nbytes
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    copy.copy_(x)
    _protect(address, _PAGE, PROT_NONE)
    _protect(address + (pages + 1) * _PAGE, _PAGE, PROT_NONE)
    if readonly:
        _protect(address + _PAGE, pages * _PAGE, PROT_READ)
    return copy


def guarded_all(values, edge: str = "end", *, readonly: bool = False):
    """The same of a structure of lists, tuples and dictionaries; what is no tensor stays."""
    if isinstance(values, dict):
        return {k: guarded_all(v, edge, readonly=readonly) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(guarded_all(v, edge, readonly=readonly) for v in values)
    return guarded(values, edge, readonly=readonly) if isinstance(values, Tensor) else values
