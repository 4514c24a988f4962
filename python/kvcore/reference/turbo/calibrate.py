"""What is measured on K and V before they are quantized."""

import torch
from torch import Tensor

from kvcore.reference.turbo.blocks import PAGE_TOKENS

MIN_BALANCE = 2.0**-8


def calibrated(k: Tensor, k_balance: Tensor | None, k_mean: Tensor | None) -> Tensor:
    """K as it is stored: ``(k - mean) / balance`` in fp32, the shape of k."""
    k = k.float()
    if k_mean is not None:
        k = k - k_mean.unsqueeze(2)
    if k_balance is not None:
        k = k / k_balance.unsqueeze(2)
    return k


def turbo_calibrate(
    k: Tensor,
    left_padding: Tensor | None = None,
    *,
    balance: bool = True,
    subtract_mean: bool = True,
    rotary_dim: int = -1,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvcore.turbo_calibrate`."""
    batch, kv_heads, _, head_dim = k.shape
    half = (head_dim if rotary_dim == -1 else rotary_dim) // 2
    k_balance = torch.ones(batch, kv_heads, head_dim)
    k_mean = torch.zeros(batch, kv_heads, head_dim)
    for b, padding in enumerate(_padding(left_padding, batch)):
        x = k[b, :, padding:].float()
        if x.shape[1] == 0:
            continue
        if subtract_mean:
            mean = _mean(x)
            k_mean[b] = torch.where(mean.isfinite(), mean, 0)
        difference = x - k_mean[b].unsqueeze(1)
        amax = torch.where(difference.isfinite(), difference.abs(), 0).amax(1)
        # A rotation moves energy between the two channels of a pair from one token to the next.
        pair = torch.maximum(amax[:, :half], amax[:, half : 2 * half])
        amax = torch.cat([pair, pair, amax[:, 2 * half :]], 1)
        largest = amax.amax(1, keepdim=True)
        if balance:
            root = _sqrt(amax / largest)
            power = (root * _sqrt(root)).clamp_min(MIN_BALANCE)
            k_balance[b] = torch.where(largest > 0, power, 1)
    return k_balance, k_mean


def turbo_head_priority(
    x: Tensor, left_padding: Tensor | None = None, *, check_values: bool = False
) -> Tensor:
    """See :func:`kvcore.turbo_head_priority`."""
    batch, heads = x.shape[:2]
    priority = torch.zeros(batch, heads)
    for b, padding in enumerate(_padding(left_padding, batch)):
        tokens = x[b, :, padding:].float()
        if tokens.shape[1] == 0:
            continue
        low, high = tokens.amin(1).double(), tokens.amax(1).double()
        gap = high.amax(1) - low.amin(1)
        value = gap * (high - low).std(1, correction=0)
        finite = tokens.isfinite().all(2).all(1)
        priority[b] = torch.where(finite, value, torch.nan).float()
    return priority


def _padding(left_padding: Tensor | None, batch: int) -> list[int]:
    return [0] * batch if left_padding is None else left_padding.tolist()


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, which torch's fp32 square root on the CPU is not."""
    return x.double().sqrt().float()


def _mean(x: Tensor) -> Tensor:
    """Mean over tokens of ``[heads, tokens, head_dim]``: fp64 sums in the order of the contract."""
    heads, num_tokens, head_dim = x.shape
    total = torch.zeros(heads, head_dim, dtype=torch.float64)
    for block in x.double().split(PAGE_TOKENS, 1):
        block_sum = torch.zeros_like(total)
        for token in block.unbind(1):
            block_sum = block_sum + token
        total = total + block_sum
    return (total / num_tokens).float()
