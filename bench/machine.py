"""What this machine is, and what it can do at most: the ceilings that shares refer to."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import re

import commit
import torch
from timer import interleave, summary

import kvcore
from kvcore import _C


def _cpu_name() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    field = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
    if len(field) < 3:  # not an x86
        return platform.processor() or platform.machine()
    return f"{field['model name']} (family {field['cpu family']}, model {field['model']})"


def describe(device: torch.device) -> dict[str, object]:
    """Device, versions, commit: what a figure means nothing without."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_name(),
        "isa": _C.cpu_isa()["active"],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        **commit.describe(),
        "kvcore": kvcore.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(description: dict[str, object]) -> str:
    """Folder name of a device's results."""
    name = f"{description['device']} {description['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ceilings(rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Measured limits: memory in GB/s, matrix products in TFLOP/s (int8: TOP/s)."""
    # Beyond every cache, and enough to fill the device.
    big, n = (1 << 31, 8192) if device.type == "cuda" else (1 << 30, 2048)
    x, y = (torch.ones(big // 4, device=device) for _ in range(2))
    a32, b32 = (torch.randn(n, n, device=device) for _ in range(2))
    a16, b16 = a32.bfloat16(), b32.bfloat16()
    a8 = torch.randint(-119, 120, (n, n), dtype=torch.int8, device=device)
    b8 = a8.t().contiguous().t()
    work = {  # name: (function, bytes or operations, unit)
        "read": (lambda: x.sum(), big, "GB/s"),
        "copy": (lambda: y.copy_(x), 2 * big, "GB/s"),
        "in-place multiply": (lambda: x.mul_(1.0), 2 * big, "GB/s"),
        "fp32 matmul": (lambda: a32 @ b32, 2 * n**3, "TFLOP/s"),
        "bf16 matmul": (lambda: a16 @ b16, 2 * n**3, "TFLOP/s"),
        "int8 matmul": (lambda: torch._int_mm(a8, b8), 2 * n**3, "TOP/s"),
    }
    samples = interleave({name: entry[0] for name, entry in work.items()}, rounds, device)
    result = {}
    for name, (_, amount, unit) in work.items():
        # The best round: a ceiling is what the machine can do, not what it usually does.
        rate = amount / min(samples[name]) / (1e9 if unit == "GB/s" else 1e12)
        result[name] = {"value": rate, "unit": unit, "median_s": summary(samples[name])["median"]}
    return result
