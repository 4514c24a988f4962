"""Typed wrappers of ``torch.ops.kvcore``: defaults and documentation, no logic."""

from kvcore.ops.turbo import (
    turbo_append,
    turbo_attention,
    turbo_calibrate,
    turbo_decode,
    turbo_dequantize,
    turbo_head_priority,
    turbo_quantize,
    turbo_rewind,
)

__all__ = [
    "turbo_append",
    "turbo_attention",
    "turbo_calibrate",
    "turbo_decode",
    "turbo_dequantize",
    "turbo_head_priority",
    "turbo_quantize",
    "turbo_rewind",
]
