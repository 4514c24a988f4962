"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464): scan, recurrent step, convolution, norm.

Per value head and token, with state S ``[k_dim, v_dim]`` (equation 10 of the paper)::

    S <- e^g S;  u = beta (v - k^T S);  S <- S + k u^T;  out = scale q^T S

Glossary: ``batch``; ``num_tokens``; ``v_heads`` is a multiple of ``k_heads``, and value head h
reads key head ``h // (v_heads // k_heads)``; ``k_dim`` and ``v_dim`` are multiples of 16 up to 256.
Inputs are fp32, fp16 or bf16 with any strides, states are contiguous fp32. Computed in fp32; bf16
inputs are multiplied as bf16 where the CPU can (``csrc/gdn/README.md`` says what is rounded).
Results do not depend on the number of threads, on the batch, or on other sequences. Errors are
``RuntimeError``; their text is ``<op>: <argument> must be <expected>, got <actual>``, and a
rejected call changes nothing. On CPU tensors, values inside index tensors are always checked; on
devices ``check_values=True`` synchronises and checks. NaN and decays above 0 are computed with as
they are, and stay in their own sequence and head.
"""

import torch
from torch import Tensor

_ops = torch.ops.kvcore


def gdn_chunk_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    save_residuals: bool = True,
    check_values: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gated delta rule over whole sequences, in chunks of 64 tokens; differentiable.

    A sequence split into several calls at multiples of 64 tokens gives the same bits as one call.

    Args:
        q: ``[batch, num_tokens, k_heads, k_dim]``, fp32, fp16 or bf16.
        k: shape and dtype of q.
        v: ``[batch, num_tokens, v_heads, v_dim]``, dtype of q.
        g: ``[batch, num_tokens, v_heads]``, natural logarithm of the decay, at most 0; fp32, fp16
            or bf16. With A_log it is ``-exp(A_log) * softplus(g + dt_bias)``.
        beta: write strength, likewise; with beta_sigmoid its logit.
        A_log: fp32 ``[v_heads]``, or None.
        dt_bias: fp32 ``[v_heads]``, or None; only with A_log.
        initial_state: fp32 ``[num_seqs, v_heads, k_dim, v_dim]``; None is zeros.
        cu_seqlens: int32 ``[num_seqs + 1]``; batch is 1, sequences are packed along tokens and may
            be empty. Without it every batch entry is a sequence.
        scale: factor of the output; None is ``k_dim ** -0.5``.
        qk_l2norm: q and k are divided by ``sqrt(sum x^2 + 1e-6)``.
        beta_sigmoid: the write strength is ``sigmoid(beta)``.
        allow_neg_eigval: it is ``2 * sigmoid(beta)``; only with beta_sigmoid.
        state_v_first: states are ``[num_seqs, v_heads, v_dim, k_dim]``.
        save_residuals: return what the backward needs; without it there is no backward.
        check_values: check that no g is NaN or above 0; on devices also cu_seqlens.

    Returns:
        ``out`` ``[batch, num_tokens, v_heads, v_dim]`` in the dtype of q; ``final_state`` fp32, in
        the layout of initial_state; and, fp32, empty where they are not saved: ``g_cumsum``
        ``[batch, num_tokens, v_heads]``, log decays summed from each chunk's start; ``x_inverse``
        ``[batch, num_tokens, v_heads, 64]``, rows of the inverse of each chunk's triangular system;
        ``rstd`` ``[2, batch, num_tokens, k_heads]`` of q and k, with qk_l2norm.
    """
    return _ops.gdn_chunk_scan(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        cu_seqlens,
        scale=scale,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        save_residuals=save_residuals,
        check_values=check_values,
    )


def gdn_chunk_scan_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    g_cumsum: Tensor,
    x_inverse: Tensor,
    rstd: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    d_final_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivative of :func:`gdn_chunk_scan`, which calls it through autograd.

    Args:
        d_out: shape and dtype of out.
        q, k, v, g, beta: as given to the forward.
        g_cumsum, x_inverse, rstd: as it returned them.
        A_log, dt_bias, initial_state: as given to it.
        d_final_state: shape and dtype of final_state; None is zeros.
        cu_seqlens, scale, qk_l2norm, beta_sigmoid, allow_neg_eigval, state_v_first: as given to it.

    Returns:
        Gradients of q, k, v, g, beta, A_log, dt_bias and initial_state, in their shapes and dtypes;
        empty for arguments that are None.
    """
    return _ops.gdn_chunk_scan_backward(
        d_out,
        q,
        k,
        v,
        g,
        beta,
        g_cumsum,
        x_inverse,
        rstd,
        A_log,
        dt_bias,
        initial_state,
        d_final_state,
        cu_seqlens,
        scale=scale,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
    )


def gdn_recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    num_accepted: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule token by token, for few tokens: decoding and verifying drafts.

    Copies the states; :func:`gdn_recurrent_step_` changes them in place. For training use
    :func:`gdn_chunk_scan`.

    Args:
        q: ``[batch, num_tokens, k_heads, k_dim]``, fp32, fp16 or bf16.
        k: shape and dtype of q.
        v: ``[batch, num_tokens, v_heads, v_dim]``, dtype of q.
        g: ``[batch, num_tokens, v_heads]``, as in :func:`gdn_chunk_scan`.
        beta: likewise.
        state: fp32 ``[num_slots, v_heads, k_dim, v_dim]``.
        A_log: fp32 ``[v_heads]``, or None.
        dt_bias: fp32 ``[v_heads]``, or None; only with A_log.
        state_indices: int32 ``[batch]``, the slot of each sequence, or ``[batch, columns]``: the
            state after token t goes to the slot in column t, and columns are at least num_tokens.
            No slot may be named twice. -1 in the column that a sequence starts from skips the
            sequence, whose output is then 0; elsewhere that state is not kept. Without it sequence
            b has slot b.
        num_accepted: int32 ``[batch]``, at least 1: sequences start from the state in column
            ``num_accepted - 1``, which undoes the tokens after it. None is 1.
        scale: factor of the output; None is ``k_dim ** -0.5``.
        qk_l2norm: q and k are divided by ``sqrt(sum x^2 + 1e-6)``.
        beta_sigmoid: the write strength is ``sigmoid(beta)``.
        allow_neg_eigval: it is ``2 * sigmoid(beta)``; only with beta_sigmoid.
        state_v_first: states are ``[num_slots, v_heads, v_dim, k_dim]``.
        check_values: check that no g is NaN or above 0; on devices synchronise and check indices.

    Returns:
        ``out`` ``[batch, num_tokens, v_heads, v_dim]`` in the dtype of q, and ``new_state``.
    """
    return _ops.gdn_recurrent_step(
        q,
        k,
        v,
        g,
        beta,
        state,
        A_log,
        dt_bias,
        state_indices,
        num_accepted,
        scale=scale,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        check_values=check_values,
    )


def gdn_recurrent_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    num_accepted: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    check_values: bool = False,
) -> Tensor:
    """:func:`gdn_recurrent_step` in place: only slots that are written change.

    Args:
        q, k, v, g, beta: as there.
        state: as there; shares memory with no other argument.
        A_log, dt_bias, state_indices, num_accepted: as there.
        scale, qk_l2norm, beta_sigmoid, allow_neg_eigval, state_v_first, check_values: as there.

    Returns:
        ``out``, as there.
    """
    return _ops.gdn_recurrent_step_(
        q,
        k,
        v,
        g,
        beta,
        state,
        A_log,
        dt_bias,
        state_indices,
        num_accepted,
        scale=scale,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        check_values=check_values,
    )


def gdn_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    silu: bool = False,
    check_values: bool = False,
) -> Tensor:
    """Causal convolution of every channel with its own few taps; differentiable.

    Args:
        x: ``[batch, channels, num_tokens]``, fp32, fp16 or bf16; fastest with channels next to each
            other in memory.
        weight: ``[channels, width]``, any of these dtypes, width 2 to 4; the last tap meets the
            token itself.
        bias: ``[channels]``, or None.
        cu_seqlens: int32 ``[num_seqs + 1]``; batch is 1, sequences are packed along tokens.
        silu: the result goes through SiLU.
        check_values: on devices, synchronise and check cu_seqlens.

    Returns:
        ``[batch, channels, num_tokens]`` in the dtype of x, channels next to each other in memory.
    """
    return _ops.gdn_conv1d(x, weight, bias, cu_seqlens, silu=silu, check_values=check_values)


def gdn_conv1d_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative of :func:`gdn_conv1d`, which calls it through autograd.

    Args:
        d_out: shape and dtype of x.
        x, weight, bias, cu_seqlens, silu: as given to the forward.

    Returns:
        Gradients of x (its dtype) and, fp32, of weight and bias.
    """
    return _ops.gdn_conv1d_backward(d_out, x, weight, bias, cu_seqlens, silu=silu)


def gdn_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    *,
    silu: bool = False,
    check_values: bool = False,
) -> Tensor:
    """:func:`gdn_conv1d` of tokens that follow those in a state, which takes them in.

    Args:
        x: ``[batch, channels, num_tokens]``, fp32, fp16 or bf16.
        conv_state: contiguous ``[num_slots, channels, state_len]``, any of these dtypes, the newest
            token last; state_len is at least ``width - 1``. Changed in place; shares memory with
            no other argument.
        weight: ``[channels, width]``, width 2 to 4.
        bias: ``[channels]``, or None.
        state_indices: int32 ``[batch]``, the slot of each sequence; -1 skips it, and its output is
            0. No slot may be named twice. Without it sequence b has slot b.
        silu: the result goes through SiLU.
        check_values: on devices, synchronise and check state_indices.

    Returns:
        ``[batch, channels, num_tokens]`` in the dtype of x, channels next to each other in memory.
    """
    return _ops.gdn_conv1d_update(
        x, conv_state, weight, bias, state_indices, silu=silu, check_values=check_values
    )


def gdn_rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467) of the last dimension, with or without a gate; differentiable.

    ``out = x * rstd * (weight + weight_offset)``, with ``rstd = (mean(x^2) + eps) ** -0.5``; with a
    gate, which comes after the norm, times ``gate * sigmoid(gate)``. Computed in fp32 and rounded
    once. NaN and infinities stay in their row.

    Args:
        x: ``[..., channels]``, fp32, fp16 or bf16; 1 to 16,384 channels. Copied unless channels are
            next to each other in memory and the other dimensions can be walked with three strides.
        weight: ``[channels]``, any of these dtypes.
        gate: shape and dtype of x, or None.
        eps: added to the mean of the squares; at least 0.
        weight_offset: added to the weight: 1 where a model keeps it as its distance from 1.

    Returns:
        ``out`` contiguous, in the shape and dtype of x; ``rstd`` fp32, ``x.shape[:-1]``.
    """
    return _ops.gdn_rms_norm(x, weight, gate, eps=eps, weight_offset=weight_offset)


def gdn_rms_norm_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    gate: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative of :func:`gdn_rms_norm`, which calls it through autograd.

    Args:
        d_out: shape and dtype of x.
        x, weight: as given to the forward.
        rstd: as it returned it.
        gate, weight_offset: as given to it.

    Returns:
        Gradients of x (its dtype), of weight (fp32, summed in an order that the shape of x alone
        decides) and of gate (dtype of x; empty without one).
    """
    return _ops.gdn_rms_norm_backward(d_out, x, weight, rstd, gate, weight_offset=weight_offset)
