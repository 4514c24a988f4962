"""TurboAttention as ``csrc/turbo/README.md`` specifies it: names and arguments of the ops.

Codes, steps, zeros and scales are bit-exact with every backend; attention agrees to a cosine of
0.99999, because only the order of its fp32 sums is free.
"""

from kvcore.reference.attention import exact_attention
from kvcore.reference.turbo.attention import turbo_attention, turbo_decode
from kvcore.reference.turbo.calibrate import turbo_calibrate, turbo_head_priority
from kvcore.reference.turbo.store import (
    turbo_append,
    turbo_dequantize,
    turbo_quantize,
    turbo_rewind,
)

__all__ = [
    "exact_attention",
    "turbo_append",
    "turbo_attention",
    "turbo_calibrate",
    "turbo_decode",
    "turbo_dequantize",
    "turbo_head_priority",
    "turbo_quantize",
    "turbo_rewind",
]
