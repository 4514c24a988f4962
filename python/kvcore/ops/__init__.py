"""Typed wrappers of ``torch.ops.kvcore``: defaults and documentation, no logic.

:func:`merge_attention` alone is written in torch ops; :func:`check_errors` asks the devices.
"""

from kvcore.ops.errors import check_errors
from kvcore.ops.lexico import lexico_encode, lexico_reconstruct
from kvcore.ops.merge import merge_attention
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
    "check_errors",
    "lexico_encode",
    "lexico_reconstruct",
    "merge_attention",
    "turbo_append",
    "turbo_attention",
    "turbo_calibrate",
    "turbo_decode",
    "turbo_dequantize",
    "turbo_head_priority",
    "turbo_quantize",
    "turbo_rewind",
]
