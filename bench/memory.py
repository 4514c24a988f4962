"""What a call allocates at its peak, and an allocator that keeps memory while calls are timed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pathlib
import re
import time
from collections.abc import Callable, Iterator

import torch

_PROC = pathlib.Path("/proc/self")
# Parameters of glibc's mallopt: how much free memory stays, and how many blocks are mapped apart.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
# What makes another process keep its memory from its start.
KEPT_MEMORY_ENV = {
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT[_TRIM_THRESHOLD]),
    "MALLOC_MMAP_MAX_": str(_KEPT[_MMAP_MAX]),
}


def _keep_memory(keep: bool) -> None:
    """Whether large blocks stay with the process when they are freed, where malloc is glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # otherwise as by default
        for parameter, value in (_KEPT if keep else _DEFAULTS).items():
            mallopt(parameter, value)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Calls find the memory that those before them freed.

    Otherwise what is timed of a call with a large result or large scratch memory is Linux, which
    gives it page by page: in virtual machines that can take longer than the call's own work, and
    differs from minute to minute.
    """
    _keep_memory(True)
    try:
        yield
    finally:
        _keep_memory(False)
        hand_back()


class FromSystem:
    """A variant within :func:`kept_memory` that gets its memory from the system, as by default."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run

    def __call__(self) -> object:
        return self._run()

    def timed(self) -> float:
        _keep_memory(False)
        hand_back()
        start = time.perf_counter()
        result = self._run()
        seconds = time.perf_counter() - start
        del result
        _keep_memory(True)
        return seconds


def hand_back() -> None:
    """Free memory goes back to the system, where malloc is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", (_PROC / "status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call adds at its peak: its result and its scratch memory.

    On the CPU that is how much more memory was resident, to a few hundred KiB, as Linux counts it;
    None where the system does not tell. Memory that the allocator kept from before and gives again
    is handed back to the system first. A call before that one loads code and whatever is kept.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    hand_back()
    try:
        (_PROC / "clear_refs").write_text("5")  # the high-water mark begins anew
        before = _resident("VmRSS")
        result = run()
        peak = _resident("VmHWM")
    except OSError:
        return None
    del result
    return max(peak - before, 0)
