"""RMSNorm (arXiv 1910.07467), with the gate that follows it in the delta rule's layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvcore.reference.gdn.recurrence import working_dtype


def gdn_rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`kvcore.gdn_rms_norm`."""
    dtype = working_dtype(x)
    wide = x.to(dtype)
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    out = wide * rstd[..., None] * (weight.to(dtype) + weight_offset)
    out = out if gate is None else out * F.silu(gate.to(dtype))
    return out.to(x.dtype), rstd


def gdn_rms_norm_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    gate: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of :func:`kvcore.gdn_rms_norm_backward`: the equations of csrc/gdn/README.md."""
    dtype = working_dtype(x)
    normed = x.to(dtype) * rstd.to(dtype)[..., None]
    w, d = weight.to(dtype) + weight_offset, d_out.to(dtype)
    dgate = x.new_empty(0)
    if gate is not None:
        g = gate.to(dtype)
        s = g.sigmoid()
        dgate = (d * normed * w * s * (1 + g * (1 - s))).to(x.dtype)
        d = d * g * s
    dweight = (d * normed).flatten(0, -2).sum(0) if x.dim() > 1 else d * normed
    d_normed = d * w
    mean = (d_normed * normed).mean(-1, keepdim=True)
    dx = rstd.to(dtype)[..., None] * (d_normed - normed * mean)
    return dx.to(x.dtype), dweight, dgate
