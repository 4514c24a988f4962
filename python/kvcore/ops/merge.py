"""Exact merge of partial attention results, in plain torch ops: any device, compiled or not."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _check(condition: bool, argument: str, expected: object, actual: object) -> None:
    if not condition:
        raise RuntimeError(f"merge_attention: {argument} must be {expected}, got {actual}")


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a context from the attention over its parts.

    Part i is softmax-normalised over its own keys and ``lses[i]`` is the logarithm of what it was
    divided by, so the whole is ``sum_i exp(lse_i - lse) out_i`` with ``lse = ln sum_i exp(lse_i)``:
    for a context split over devices, calls or caches. Computed in fp32, summed in the order given.

    Args:
        outs: one or more ``[..., head_dim]`` of one shape, dtype and device.
        lses: as many fp32 ``[...]``, natural log; -inf where a part has no key.

    Returns:
        ``out`` with shape and dtype of the parts, and ``lse`` fp32 ``[...]``. Rows without
        a key in any part give 0 and -inf; NaN in either input of a part gives NaN in that row.

    Raises:
        RuntimeError: ``merge_attention: <argument> must be <expected>, got <actual>``.
    """
    _check(len(outs) > 0, "outs", "at least one tensor", "none")
    _check(len(lses) == len(outs), "lses", f"{len(outs)} tensors like outs", len(lses))
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check(out.dim() > 0, f"outs[{i}]", "[..., head_dim]", "a scalar")
        _check(out.shape == outs[0].shape, f"outs[{i}]", list(outs[0].shape), list(out.shape))
        _check(out.dtype == outs[0].dtype, f"outs[{i}]", outs[0].dtype, out.dtype)
        _check(out.device == outs[0].device, f"outs[{i}]", f"on {outs[0].device}", out.device)
        _check(lse.shape == out.shape[:-1], f"lses[{i}]", list(out.shape[:-1]), list(lse.shape))
        _check(lse.dtype == torch.float32, f"lses[{i}]", torch.float32, lse.dtype)
        _check(lse.device == out.device, f"lses[{i}]", f"on {out.device}", lse.device)

    lse = torch.logsumexp(torch.stack(tuple(lses)), dim=0)
    # -inf - -inf would be NaN where no part has a key.
    base = lse.masked_fill(lse == -torch.inf, 0)
    out = torch.zeros_like(outs[0], dtype=torch.float32)
    for part, part_lse in zip(outs, lses, strict=True):
        out = out + (part_lse - base).exp().unsqueeze(-1) * part.float()
    return out.to(outs[0].dtype), lse
