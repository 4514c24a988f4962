"""Gated delta rules that a user would otherwise run: the torch functions of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor


def transformers_rule() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The pure torch function of transformers, chunked and differentiable."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    return inspect.unwrap(modeling.torch_chunk_gated_delta_rule)
