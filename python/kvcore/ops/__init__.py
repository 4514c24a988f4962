"""Typed wrappers of ``torch.ops.kvcore``: defaults and documentation, no logic.

:func:`merge_attention` is written in torch ops; :func:`check_errors` asks the devices;
functions with flash-linear-attention's signatures choose between the ops of the gated delta rule.
"""

from kvcore.ops.dense import dense_attention, dense_attention_backward
from kvcore.ops.errors import check_errors
from kvcore.ops.gdn import (
    gdn_chunk_scan,
    gdn_chunk_scan_backward,
    gdn_conv1d,
    gdn_conv1d_backward,
    gdn_conv1d_update,
    gdn_recurrent_step,
    gdn_recurrent_step_,
    gdn_rms_norm,
    gdn_rms_norm_backward,
)
from kvcore.ops.gdn_fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from kvcore.ops.lexico import (
    lexico_append,
    lexico_attention,
    lexico_encode,
    lexico_reconstruct,
    lexico_seal,
    lexico_unpack,
    lexico_unseal,
)
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
    "chunk_gated_delta_rule",
    "dense_attention",
    "dense_attention_backward",
    "fused_recurrent_gated_delta_rule",
    "gdn_chunk_scan",
    "gdn_chunk_scan_backward",
    "gdn_conv1d",
    "gdn_conv1d_backward",
    "gdn_conv1d_update",
    "gdn_recurrent_step",
    "gdn_recurrent_step_",
    "gdn_rms_norm",
    "gdn_rms_norm_backward",
    "lexico_append",
    "lexico_attention",
    "lexico_encode",
    "lexico_reconstruct",
    "lexico_seal",
    "lexico_unpack",
    "lexico_unseal",
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
