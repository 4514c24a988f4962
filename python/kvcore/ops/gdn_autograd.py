"""Shapes and dtypes of the gated delta rule's ops for tracing, and their backwards."""

import torch
from torch import Tensor

from kvcore.ops.fake import refuse_backward, register_fake

CHUNK = 64
_ops = torch.ops.kvcore


def _state_shape(q: Tensor, v: Tensor, num_seqs: int, state_v_first: bool) -> tuple[int, ...]:
    dims = (q.shape[3], v.shape[3])
    return (num_seqs, v.shape[2], *(reversed(dims) if state_v_first else dims))


@register_fake("gdn_chunk_scan")
def _(
    q,
    k,
    v,
    g,
    beta,
    A_log=None,
    dt_bias=None,
    initial_state=None,
    cu_seqlens=None,
    *,
    qk_l2norm=False,
    state_v_first=False,
    save_residuals=True,
    **kwargs,
):
    num_seqs = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def fp32(shape, wanted=True):
        return q.new_empty(shape if wanted else (0,), dtype=torch.float32)

    return (
        q.new_empty(v.shape),
        fp32(_state_shape(q, v, num_seqs, state_v_first)),
        fp32(g.shape, save_residuals),
        fp32((*g.shape, CHUNK), save_residuals),
        fp32((2, *q.shape[:3]), save_residuals and qk_l2norm),
    )


@register_fake("gdn_chunk_scan_backward")
def _(
    d_out,
    q,
    k,
    v,
    g,
    beta,
    g_cumsum,
    x_inverse,
    rstd,
    A_log=None,
    dt_bias=None,
    initial_state=None,
    *args,
    **kwargs,
):
    present = [q, k, v, g, beta]
    optional = [A_log, dt_bias, initial_state]
    return (
        *(x.new_empty(x.shape) for x in present),
        *(q.new_empty((0,), dtype=torch.float32) if x is None else x.new_empty(x.shape)
          for x in optional),
    )  # fmt: skip


@register_fake("gdn_recurrent_step")
def _(q, k, v, g, beta, state, *args, **kwargs):
    return q.new_empty(v.shape), torch.empty_like(state)


@register_fake("gdn_recurrent_step_")
def _(q, k, v, *args, **kwargs):
    return q.new_empty(v.shape)


def _channels_last(x: Tensor) -> Tensor:
    batch, channels, num_tokens = x.shape
    return x.new_empty((batch, num_tokens, channels)).transpose(1, 2)


@register_fake("gdn_conv1d", dims=3)
def _(x, *args, **kwargs):
    return _channels_last(x)


@register_fake("gdn_conv1d_backward", dims=3)
def _(d_out, x, weight, *args, **kwargs):
    fp32 = {"dtype": torch.float32}
    return (
        _channels_last(x),
        x.new_empty(weight.shape, **fp32),
        x.new_empty(weight.shape[:1], **fp32),
    )


@register_fake("gdn_conv1d_update", dims=3)
def _(x, *args, **kwargs):
    return _channels_last(x)


@register_fake("gdn_rms_norm", dims=None)
def _(x, *args, **kwargs):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@register_fake("gdn_rms_norm_backward", dims=None)
def _(d_out, x, weight, rstd, gate=None, **kwargs):
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[-1:], dtype=torch.float32),
        x.new_empty((0,) if gate is None else x.shape),
    )


def _save_scan(ctx, inputs, keyword_only_inputs, output):
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(
        q, k, v, g, beta, *output[2:], A_log, dt_bias, initial_state, cu_seqlens, output[0]
    )
    ctx.scalars = {
        name: value
        for name, value in keyword_only_inputs.items()
        if name not in ("save_residuals", "check_values")
    }
    ctx.has_residuals = keyword_only_inputs["save_residuals"]


def _scan_backward(ctx, d_out, d_final_state, *d_residuals):
    if not ctx.has_residuals:
        raise RuntimeError("gdn_chunk_scan: save_residuals must be True for a backward, got False")
    *tensors, A_log, dt_bias, initial_state, cu_seqlens, out = ctx.saved_tensors
    # Differentiable once: the saved tensors carry no graph into the backward's own op.
    grads = _ops.gdn_chunk_scan_backward(
        torch.zeros_like(out) if d_out is None else d_out,
        *tensors,
        A_log,
        dt_bias,
        initial_state,
        None if d_final_state is None else d_final_state.contiguous(),
        cu_seqlens,
        **ctx.scalars,
    )
    *wanted, dA_log, ddt_bias, d_initial_state = grads
    optional = ((A_log, dA_log), (dt_bias, ddt_bias), (initial_state, d_initial_state))
    return *wanted, *(None if x is None else dx for x, dx in optional), None


def _save_conv(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.silu = keyword_only_inputs["silu"]


def _conv_backward(ctx, d_out):
    x, weight, bias, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias = _ops.gdn_conv1d_backward(d_out, x, weight, bias, cu_seqlens, silu=ctx.silu)
    return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None


def _save_norm(ctx, inputs, keyword_only_inputs, output):
    x, weight, gate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1], gate)
    ctx.weight_offset = keyword_only_inputs["weight_offset"]


def _norm_backward(ctx, d_out, d_rstd):
    x, weight, rstd, gate = ctx.saved_tensors
    dx, dweight, dgate = _ops.gdn_rms_norm_backward(
        d_out, x, weight, rstd, gate, weight_offset=ctx.weight_offset
    )
    return dx, dweight.to(weight.dtype), None if gate is None else dgate


torch.library.register_autograd("kvcore::gdn_chunk_scan", _scan_backward, setup_context=_save_scan)
torch.library.register_autograd("kvcore::gdn_conv1d", _conv_backward, setup_context=_save_conv)
torch.library.register_autograd("kvcore::gdn_rms_norm", _norm_backward, setup_context=_save_norm)
refuse_backward("gdn_chunk_scan_backward", "functions that need no second derivative")
refuse_backward("gdn_conv1d_backward", "functions that need no second derivative")
refuse_backward("gdn_rms_norm_backward", "functions that need no second derivative")
refuse_backward("gdn_recurrent_step", "kvcore.gdn_chunk_scan")
