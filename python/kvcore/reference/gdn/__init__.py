"""Gated delta rule in plain PyTorch: the recurrence, the chunk form, the convolution and the norm.

Arguments and results are those of the ops; computed in fp32, in fp64 for fp64 inputs. Everything
but the in-place functions is differentiable.
"""

from kvcore.reference.gdn.chunk import CHUNK, gdn_chunk_scan, gdn_chunk_scan_backward
from kvcore.reference.gdn.conv1d import gdn_conv1d, gdn_conv1d_backward, gdn_conv1d_update
from kvcore.reference.gdn.recurrence import (
    delta_rule,
    gates,
    gdn_recurrent_step,
    gdn_recurrent_step_,
    unit_rows,
)
from kvcore.reference.gdn.rms_norm import gdn_rms_norm, gdn_rms_norm_backward

__all__ = [
    "CHUNK",
    "delta_rule",
    "gates",
    "gdn_chunk_scan",
    "gdn_chunk_scan_backward",
    "gdn_conv1d",
    "gdn_conv1d_backward",
    "gdn_conv1d_update",
    "gdn_recurrent_step",
    "gdn_recurrent_step_",
    "gdn_rms_norm",
    "gdn_rms_norm_backward",
    "unit_rows",
]
