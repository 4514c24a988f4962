"""What a user would otherwise run: the torch functions and modules of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn


def transformers_rule() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The pure torch function of transformers, chunked and differentiable."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    return inspect.unwrap(modeling.torch_chunk_gated_delta_rule)


def transformers_norm(gated: bool) -> type[nn.Module]:
    """Its RMSNorm: the one behind the delta rule, or the one of hidden states."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    return modeling.Qwen3NextRMSNormGated if gated else modeling.Qwen3NextRMSNorm
