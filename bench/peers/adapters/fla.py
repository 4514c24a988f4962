"""Adapter for worker.py: flash-linear-attention's Triton kernels of the gated delta rule."""

from __future__ import annotations

from collections.abc import Callable


def load(arrays: dict, *, work: str, threads: int, device: str) -> dict[str, Callable]:
    """Prompts by the chunked kernel, single tokens by the recurrent one."""
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    torch.set_grad_enabled(False)
    on_device = {n: torch.from_numpy(x).to(device) for n, x in arrays.items()}
    inputs = {n: on_device[n].bfloat16() for n in ("q", "k", "v", "beta")}
    inputs["g"] = on_device["g"]
    function = chunk_gated_delta_rule if work == "gdn_forward" else fused_recurrent_gated_delta_rule

    def run():
        return function(
            **inputs,
            initial_state=on_device.get("state"),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )[0]

    return {"bf16": run}
