"""Adapter for worker.py: ExecuTorch's quantized attention and its gated delta rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _quantized(x) -> tuple:
    """int8 codes of fp32 rows, with a zero point and a scale for each row: its own convention."""
    import torch

    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    codes = (x / scale + zero).round().clamp(-128, 127)
    return codes.to(torch.int8), zero.to(torch.int8), scale


def _decode(arrays: dict) -> dict[str, Callable]:
    import torch

    tensors = [_quantized(torch.from_numpy(arrays[name])) for name in "qkv"]
    codes = [x for x, _, _ in tensors]
    points = [x for _, *pair in tensors for x in pair]
    q_len, kv_len = codes[0].shape[2], codes[1].shape[2]
    start, causal, scale = kv_len - q_len, q_len > 1, codes[0].shape[3] ** -0.5

    def run():
        return torch.ops.llama.custom_quantized_sdpa(
            *codes, start, None, 0.0, causal, scale, *points, True
        )

    return {"int8": run}


def _delta_rule(arrays: dict) -> dict[str, Callable]:
    """Keys and queries are normalised, scaled and repeated beforehand, which favours the peer."""
    import torch

    q, k, v, g, beta = (torch.from_numpy(arrays[x]) for x in ("q", "k", "v", "g", "beta"))
    batch, _, heads, dim = v.shape
    group = heads // k.shape[2]
    q, k = (torch.nn.functional.normalize(x, dim=-1).repeat_interleave(group, 2) for x in (q, k))
    inputs = [q * dim**-0.5, k, v, g.exp(), beta]
    inputs = [x.transpose(1, 2).contiguous() for x in inputs]
    state = arrays.get("state")
    if state is None:
        state = np.zeros((batch, heads, k.shape[3], dim), np.float32)
    state = torch.from_numpy(np.array(state))
    results = {"out": torch.empty_like(inputs[2]), "final_state_out": torch.empty_like(state)}

    def run():
        torch.ops.llama.gated_delta_rule.out(*inputs, state, **results)
        return results["out"].transpose(1, 2)

    return {"fp32": run}


WORK = {"decode": _decode, "gdn_forward": _delta_rule, "gdn_decode": _delta_rule}


def load(arrays: dict, *, work: str, threads: int, device: str) -> dict[str, Callable]:
    """Its custom ops, as torch calls them: what an exported model would run."""
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.extension.pybindings import portable_lib

    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    portable_lib._unsafe_reset_threadpool(threads)
    return WORK[work](arrays)
