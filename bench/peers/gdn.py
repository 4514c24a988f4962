"""Gated delta rules that a user would otherwise run: torch functions of transformers, vLLM's op."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor


def transformers_rule() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The pure torch function of transformers, chunked and differentiable."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    return inspect.unwrap(modeling.torch_chunk_gated_delta_rule)


def vllm_name() -> str:
    """What its op is made for is AMX; without it a slower path is taken."""
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    return "vLLM CPU" if "amx_bf16" in flags else "vLLM CPU, without AMX"


def vllm_rule() -> Callable[..., Tensor] | None:
    """vLLM's CPU op, if the package `vllm-cpu` is there or VLLM_CPU_LIBRARY names its library.

    Only the library is loaded; it needs the torch that it was built with.
    """
    library = os.environ.get("VLLM_CPU_LIBRARY")
    if library is None:
        package = importlib.util.find_spec("vllm")
        if package is None or package.origin is None:
            return None
        library = str(pathlib.Path(package.origin).parent / "_C_AVX512.abi3.so")
    torch.ops.load_library(library)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        state = torch.zeros(1, v.shape[2], q.shape[3], v.shape[3])
        bounds = torch.tensor([0, q.shape[1]], dtype=torch.int32)
        slots = torch.zeros(1, dtype=torch.int32)
        return torch.ops._C.chunk_gated_delta_rule_cpu(
            q, k, v, g, beta, state, True, bounds, False, True, slots, 1e-6
        )[0]

    return run
