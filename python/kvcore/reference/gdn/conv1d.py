"""Causal depthwise convolution of tokens, the step before the delta rule."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcore.reference.gdn.recurrence import working_dtype


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """x already begins with ``width - 1`` earlier tokens."""
    y = F.conv1d(x, weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if silu else y


def gdn_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    silu: bool = False,
    check_values: bool = False,
) -> Tensor:
    """Reference of :func:`kvcore.gdn_conv1d`."""
    dtype = working_dtype(x)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    bounds = [0, x.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    parts = [
        _convolve(F.pad(x[:, :, begin:end].to(dtype), (w.shape[1] - 1, 0)), w, b, silu)
        for begin, end in itertools.pairwise(bounds)
        if end > begin
    ]
    return torch.cat(parts, 2).to(x.dtype) if parts else x.clone()


def gdn_conv1d_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of :func:`kvcore.gdn_conv1d_backward`: torch's derivative of the forward."""
    dtype = working_dtype(x)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    inputs = [y.detach().requires_grad_() for y in (x, weight.to(dtype), bias.to(dtype))]
    with torch.enable_grad():
        out = gdn_conv1d(*inputs, cu_seqlens, silu=silu)
        return torch.autograd.grad(
            out, inputs, d_out.to(out.dtype), allow_unused=True, materialize_grads=True
        )


def gdn_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    *,
    silu: bool = False,
    check_values: bool = False,
) -> Tensor:
    """Reference of :func:`kvcore.gdn_conv1d_update`."""
    dtype = working_dtype(x)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    slots = range(x.shape[0]) if state_indices is None else state_indices.tolist()
    out = torch.zeros_like(x)
    state_len = conv_state.shape[2]
    for i, slot in enumerate(slots):
        if slot < 0:
            continue
        tokens = torch.cat([conv_state[slot].to(dtype), x[i].to(dtype)], 1)
        if x.shape[2] == 0:
            continue
        needed = tokens[None, :, state_len - (w.shape[1] - 1) :]
        out[i] = _convolve(needed, w, b, silu)[0].to(x.dtype)
        conv_state[slot] = tokens[:, tokens.shape[1] - state_len :].to(conv_state.dtype)
    return out
