"""What a call allocates at its peak, beside what was there before it."""

from __future__ import annotations

import ctypes
import gc
import pathlib
import re
from collections.abc import Callable

import torch

_PROC = pathlib.Path("/proc/self")


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
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "clear_refs").write_text("5")  # the high-water mark begins anew
        before = _resident("VmRSS")
        result = run()
        peak = _resident("VmHWM")
    except (AttributeError, OSError):
        return None
    del result
    return max(peak - before, 0)
