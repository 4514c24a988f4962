"""Self-checks of the gated delta rule's ops: each on small inputs, compared with its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import kvcore
from kvcore.doctor.mismatch import compare
from kvcore.reference import gdn as reference

_OPTIONS = {"qk_l2norm": True, "beta_sigmoid": True}


def _inputs(head_dim: int) -> list[Tensor]:
    """q, k, v, g, beta, A_log, dt_bias and a state for each of two sequences."""
    generator = torch.Generator().manual_seed(head_dim)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    qkv = [random(2, 100, heads, head_dim) for heads in (2, 2, 4)]
    gates = [random(2, 100, 4), random(2, 100, 4), random(4), random(4)]
    return [*qkv, *gates, random(2, 4, head_dim, head_dim)]


def _moved(tensors: Sequence[Tensor], device: str) -> tuple[list[Tensor], list[Tensor]]:
    return [x.to(device) for x in tensors], [x.double() for x in tensors]


def _chunk_scan(head_dim: int, device: str) -> str:
    ours, theirs = _moved(_inputs(head_dim), device)
    actual = kvcore.gdn_chunk_scan(*ours, **_OPTIONS)
    return compare(actual, reference.gdn_chunk_scan(*theirs, **_OPTIONS))


def _chunk_scan_backward(head_dim: int, device: str) -> str:
    inputs = _inputs(head_dim)
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(inputs[2].shape, generator=generator)
    ours, theirs = _moved([d_out, *inputs], device)
    residuals = kvcore.gdn_chunk_scan(*ours[1:], **_OPTIONS)[2:]
    actual = kvcore.gdn_chunk_scan_backward(*ours[:6], *residuals, *ours[6:], **_OPTIONS)
    expected = reference.gdn_chunk_scan_backward(*theirs[:6], *residuals, *theirs[6:], **_OPTIONS)
    # The gradients of A_log and dt_bias are sums over all tokens, in which most cancels.
    dg, shifted = expected[3], theirs[4] + theirs[7]
    parts = (dg * torch.nn.functional.softplus(shifted) / shifted.sigmoid(), dg)
    sizes = {i: part.abs().sum((0, 1)) for i, part in zip((5, 6), parts, strict=True)}
    return compare(actual, expected, sizes)


def _step_inputs(head_dim: int) -> list[Tensor]:
    *tokens, A_log, dt_bias, state = _inputs(head_dim)
    return [*(x[:, :3] for x in tokens), state, A_log, dt_bias]


def _recurrent_step(head_dim: int, device: str) -> str:
    ours, theirs = _moved(_step_inputs(head_dim), device)
    actual = kvcore.gdn_recurrent_step(*ours, **_OPTIONS)
    return compare(actual, reference.gdn_recurrent_step(*theirs, **_OPTIONS))


def _recurrent_step_in_place(head_dim: int, device: str) -> str:
    ours, theirs = _moved(_step_inputs(head_dim), device)
    ours[5] = ours[5].clone()
    out = kvcore.gdn_recurrent_step_(*ours, **_OPTIONS)
    return compare((out, ours[5]), reference.gdn_recurrent_step(*theirs, **_OPTIONS))


def _conv_inputs(head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    sizes = ((2, head_dim, 50), (head_dim, 4), (head_dim,))
    return [torch.randn(*size, generator=generator) for size in sizes]


def _conv1d(head_dim: int, device: str) -> str:
    ours, theirs = _moved(_conv_inputs(head_dim), device)
    actual = kvcore.gdn_conv1d(*ours, silu=True)
    return compare([actual], [reference.gdn_conv1d(*theirs, silu=True)])


def _conv1d_backward(head_dim: int, device: str) -> str:
    inputs = _conv_inputs(head_dim)
    ours, theirs = _moved([inputs[0].flip(2), *inputs], device)
    actual = kvcore.gdn_conv1d_backward(*ours, silu=True)
    return compare(actual, reference.gdn_conv1d_backward(*theirs, silu=True))


def _conv1d_update(head_dim: int, device: str) -> str:
    x, weight, bias = _conv_inputs(head_dim)
    state = x[:, :, :3].clone()
    ours, theirs = _moved([x[:, :, 3:5], state, weight, bias], device)
    ours[1] = ours[1].clone()
    actual = kvcore.gdn_conv1d_update(*ours, silu=True)
    expected = reference.gdn_conv1d_update(*theirs, silu=True)
    return compare((actual, ours[1]), (expected, theirs[1]))


def _norm_inputs(head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    sizes = ((2, 50, head_dim), (head_dim,), (2, 50, head_dim))
    return [torch.randn(*size, generator=generator) for size in sizes]


def _rms_norm(head_dim: int, device: str) -> str:
    ours, theirs = _moved(_norm_inputs(head_dim), device)
    actual = kvcore.gdn_rms_norm(*ours, weight_offset=1.0)
    return compare(actual, reference.gdn_rms_norm(*theirs, weight_offset=1.0))


def _rms_norm_backward(head_dim: int, device: str) -> str:
    x, weight, gate = _norm_inputs(head_dim)
    rstd = reference.gdn_rms_norm(x, weight)[1]
    ours, theirs = _moved([x.flip(1), x, weight, rstd, gate], device)
    actual = kvcore.gdn_rms_norm_backward(*ours)
    return compare(actual, reference.gdn_rms_norm_backward(*theirs))


CHECKS: dict[str, Callable[[int, str], str]] = {
    "gdn_chunk_scan": _chunk_scan,
    "gdn_chunk_scan_backward": _chunk_scan_backward,
    "gdn_recurrent_step": _recurrent_step,
    "gdn_recurrent_step_": _recurrent_step_in_place,
    "gdn_conv1d": _conv1d,
    "gdn_conv1d_backward": _conv1d_backward,
    "gdn_conv1d_update": _conv1d_update,
    "gdn_rms_norm": _rms_norm,
    "gdn_rms_norm_backward": _rms_norm_backward,
}
