"""Adapter for worker.py: the gated delta rule of vLLM's CPU kernels; only their library is used."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable

LIBRARY = "_C_AVX512.abi3.so"
# A gate of 0, for which there is no finite input: softplus of this is 0 in fp32.
NO_DECAY = -100.0


def _forward(q, k, v, g, beta, state) -> dict[str, Callable]:
    import torch

    q, k, v, beta = (x.bfloat16() for x in (q, k, v, beta))
    state = torch.zeros(1, v.shape[2], q.shape[3], v.shape[3])
    bounds = torch.tensor([0, q.shape[1]], dtype=torch.int32)
    slots = torch.zeros(1, dtype=torch.int32)

    def run():
        state.zero_()
        return torch.ops._C.chunk_gated_delta_rule_cpu(
            q, k, v, g, beta, state, True, bounds, False, True, slots, 1e-6
        )[0]

    return {"bf16": run}


def _decode(q, k, v, g, beta, state) -> dict[str, Callable]:
    """It makes g and beta from what they are made of in a model, of which these are inverses."""
    import torch

    # Sequences of one token each lie one after the other, as it has them.
    batch, _, heads, _ = v.shape
    q, k, v = (x.bfloat16().transpose(0, 1).contiguous() for x in (q, k, v))
    a = torch.where(g == 0, NO_DECAY, torch.log(torch.expm1(-g)))[:, 0].bfloat16()
    b = torch.logit(beta.double())[:, 0].bfloat16()
    zeros = torch.zeros(heads)
    slots = torch.arange(batch, dtype=torch.int32)
    bounds = torch.arange(batch + 1, dtype=torch.int32)

    def run():
        return torch.ops._C.fused_sigmoid_gating_delta_rule_update_cpu(
            zeros, zeros.bfloat16(), q, k, v, a, b, state, slots, bounds, True, 1.0, 20.0
        )

    return {"bf16": run}


WORK = {"gdn_forward": _forward, "gdn_decode": _decode}


def load(arrays: dict, *, work: str, threads: int, device: str) -> dict[str, Callable]:
    """The ops that its layers of the kind call."""
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    package = pathlib.Path(importlib.util.find_spec("vllm").origin).parent
    torch.ops.load_library(str(package / LIBRARY))
    names = ("q", "k", "v", "g", "beta")
    state = torch.from_numpy(arrays["state"].copy()) if "state" in arrays else None
    return WORK[work](*(torch.from_numpy(arrays[name]) for name in names), state)
