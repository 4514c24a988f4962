"""Tensors where they are hard to read: beside pages that nobody may touch, far apart."""

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from compare import assert_bitwise_equal

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


each_edge = pytest.mark.parametrize("edge", ["start", "end"])


def flat(results):
    return results if isinstance(results, tuple) else (results,)


def assert_same(actual, expected, name=""):
    for i, (a, e) in enumerate(zip(flat(actual), flat(expected), strict=True)):
        assert_bitwise_equal(a, e, f"{name} result {i}")


def assert_reads_inputs_only(op, args, kwargs, edge):
    """The result is that of tensors which end where they end, and which cannot be written."""
    expected = op(*args, **kwargs)
    fenced = guarded_all(args, edge, readonly=True)
    assert_same(op(*fenced, **kwargs), expected)


FAR = 2**31 + 64


def far_apart(x, dim):
    """The values of x, neighbours along one dimension 2^31 elements away at least in all."""
    stride = -(-FAR // max(1, x.shape[dim] - 1))
    # Pages that hold no value are never touched, and so take no memory.
    strides = [0] * 4
    inner = 1
    for i in reversed(range(4)):
        if i != dim:
            strides[i], inner = inner, inner * x.shape[i]
    strides[dim] = max(stride, inner)
    memory = torch.empty((x.shape[dim] - 1) * strides[dim] + inner, dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)
