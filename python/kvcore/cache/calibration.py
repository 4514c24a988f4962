"""What a store is begun with: K's balance and mean, widths of heads, the scale of new tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from kvcore import ops
from kvcore.cache.settings import PAGE_TOKENS, TurboSettings

# With fewer tokens the mean is so close to those it was taken from that the scale of what is left
# cuts later tokens off. At 8 bits the scores of Gaussian K err by 4 % after 8 tokens, by 2 % after
# 16 and by 1.2 % after 64; without calibration by 1.2 %.
MIN_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How to begin a store.

    A sequence with too few tokens (``is_short``) takes what was measured on the longest one,
    ``donor``: the channels of K differ more from each other than from text to text.
    """

    k_balance: Tensor | None  # fp32 [batch, kv_heads, head_dim]
    k_mean: Tensor | None  # likewise
    head_bits: np.ndarray  # int64 [2, kv_heads]
    is_short: np.ndarray  # bool [batch]
    donor: int

    def phases(self, padding: np.ndarray, num_tokens: int) -> list[np.ndarray]:
        """Left padding of the appends that store the first tokens: donors go first."""
        if not self.is_short.any():
            return [padding]
        return [np.where(short, num_tokens, padding) for short in (self.is_short, ~self.is_short)]

    def adopt(self, per_sequence: Tensor) -> None:
        """Gives short sequences the donor's row, in place."""
        if self.is_short.any():
            per_sequence[torch.from_numpy(self.is_short)] = per_sequence[self.donor].clone()


def calibrate(k: Tensor, v: Tensor, padding: np.ndarray, settings: TurboSettings) -> Calibration:
    """Measures K and V.

    Args:
        k: ``[batch, kv_heads, kv_len, head_dim]``, after the rotary embedding.
        v: shape and dtype of k.
        padding: int64 ``[batch]``, leading tokens of each sequence to leave out.
        settings: widths and what to calibrate.
    """
    batch, kv_heads, num_tokens, head_dim = k.shape
    lens = num_tokens - padding
    donor = int(lens.argmax()) if batch else 0
    longest = int(lens.max(initial=0))
    is_short = lens < min(PAGE_TOKENS, longest)
    k_balance = k_mean = None
    if settings.balance or settings.subtract_mean:
        if longest < MIN_TOKENS:
            shape = (batch, kv_heads, head_dim)
            k_balance = torch.ones(shape, device=k.device)
            k_mean = torch.zeros(shape, device=k.device)
        else:
            k_balance, k_mean = ops.turbo_calibrate(
                k,
                left_padding_tensor(np.where(is_short, num_tokens, padding), k.device),
                balance=settings.balance,
                subtract_mean=settings.subtract_mean,
                rotary_dim=settings.rotary_dim,
            )
    calibration = Calibration(
        k_balance, k_mean, choose_bits(k, v, padding, settings), is_short, donor
    )
    if k_balance is not None:
        calibration.adopt(k_balance)
        calibration.adopt(k_mean)
    return calibration


def choose_bits(k: Tensor, v: Tensor, padding: np.ndarray, settings: TurboSettings) -> np.ndarray:
    """int64 ``[2, kv_heads]``: the width of every K and V head, the same for all sequences.

    The ``low_bit_heads`` share of heads with the lowest priority, summed over the sequences, take
    2 bits (equation 12 of the paper). A head with a non-finite value is never among them if that
    can be helped.
    """
    kv_heads = k.shape[1]
    bits = np.array([[settings.k_bits] * kv_heads, [settings.v_bits] * kv_heads])
    num_low = settings.num_low_heads(kv_heads)
    if num_low == 0:
        return bits
    left = left_padding_tensor(padding, k.device)
    for row, x in zip(bits, (k, v), strict=True):
        priority = ops.turbo_head_priority(x, left).double().sum(0).nan_to_num(nan=torch.inf)
        row[priority.argsort(stable=True)[:num_low].cpu().numpy()] = 2
    return bits


def left_padding_tensor(padding: np.ndarray, device: torch.device) -> Tensor | None:
    """int32 ``[batch]`` as the ops take it; None if there is no padding."""
    if not padding.any():
        return None
    return torch.from_numpy(padding.astype(np.int32)).to(device)
