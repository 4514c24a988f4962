"""Shapes and dtypes of exact attention for tracing, its backward, and where it does not run."""

import torch
from torch import Tensor

from kvcore.ops.fake import refuse_backward, register_fake

_ops = torch.ops.kvcore


def _tokens(x: Tensor) -> Tensor:
    """The heads of a token next to each other in memory."""
    batch, heads, num_tokens, head_dim = x.shape
    return x.new_empty((batch, num_tokens, heads, head_dim)).transpose(1, 2)


@register_fake("dense_attention")
def _(q, k, v, **kwargs):
    return _tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_fake("dense_attention_backward")
def _(d_out, q, k, v, *args, **kwargs):
    return _tokens(q), _tokens(k), _tokens(v)


def _save(ctx, inputs, keyword_only_inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)
    ctx.scalars = keyword_only_inputs


def _backward(ctx, d_out, d_lse):
    q, k, v, out, lse = ctx.saved_tensors
    # Differentiable once: the saved tensors carry no graph into the backward's own op.
    return _ops.dense_attention_backward(
        torch.zeros_like(out) if d_out is None else d_out,
        q,
        k,
        v,
        out,
        lse,
        None if d_lse is None else d_lse.contiguous(),
        **ctx.scalars,
    )


def refuse_cuda(name: str):
    """The kernel of an op for GPUs: an error that says what to call there."""

    def refuse(first: Tensor, *args: object, **kwargs: object) -> None:
        raise RuntimeError(
            f"{name}: tensors must be on cpu, got {first.device}; on GPUs use "
            "torch.nn.functional.scaled_dot_product_attention"
        )

    return refuse


torch.library.register_autograd("kvcore::dense_attention", _backward, setup_context=_save)
refuse_backward("dense_attention_backward", "functions that need no second derivative")
for _name in ("dense_attention", "dense_attention_backward"):
    torch.library.impl(f"kvcore::{_name}", "CUDA", func=refuse_cuda(_name))
