"""Errors that kernels could not raise, because the host did not wait for them."""

import torch

from kvcore import _native


def check_errors(device: torch.device | str | int | None = None) -> None:
    """Raises what CUDA kernels found wrong in the values of device tensors since the last call.

    Ops on CUDA tensors do not read lengths, block tables, ``cu_seqlens`` or paddings on the host,
    which would wait for the GPU. A value that is out of range is skipped by the kernel, gives NaN
    in the output it belongs to, and is remembered on the device; this function waits for the
    device, raises and forgets. An op called with ``check_values=True`` raises by itself, before
    anything is written, and so does every op on the CPU.

    Args:
        device: a CUDA device, or None for all that this process has used.

    Raises:
        RuntimeError: naming the device and the arguments concerned.
    """
    if device is None:
        used = torch.cuda.is_initialized() and _native.status()["kvcore_cuda"].loaded
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count() if used else 0)]
    else:
        devices = [torch.device("cuda", device) if isinstance(device, int) else device]
    for each in devices:
        torch.ops.kvcore.raise_errors(torch.empty(0, device=each))
