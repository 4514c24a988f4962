"""The gated delta rule under the names and signatures of flash-linear-attention."""

import torch
from torch import Tensor

from kvcore.ops.gdn import gdn_chunk_scan, gdn_recurrent_step

# Up to so many tokens of each sequence the recurrence is run as it stands.
MAX_RECURRENT_TOKENS = 8
_CHUNK_SIZES = (16, 32, 64)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """:func:`kvcore.gdn_chunk_scan` with the signature of ``fla.ops.gated_delta_rule``.

    Args:
        q: ``[batch, num_tokens, k_heads, k_dim]``, fp32, fp16 or bf16.
        k: shape and dtype of q.
        v: ``[batch, num_tokens, v_heads, v_dim]``, dtype of q.
        g: log decay ``[batch, num_tokens, v_heads]``; with ``use_gate_in_kernel`` what enters the
            gate ``-exp(A_log) * softplus(g + dt_bias)``.
        beta: write strength, likewise.
        scale: factor of the output; None is ``k_dim ** -0.5``.
        initial_state: ``[num_seqs, v_heads, k_dim, v_dim]``, any float dtype; None is zeros.
        output_final_state: return the final state, fp32.
        use_qk_l2norm_in_kernel: q and k are divided by ``sqrt(sum x^2 + 1e-6)``.
        use_beta_sigmoid_in_kernel: the write strength is ``sigmoid(beta)``.
        allow_neg_eigval: it is ``2 * sigmoid(beta)``; only with the former.
        state_v_first: states are ``[num_seqs, v_heads, v_dim, k_dim]``.
        cu_seqlens: int32 or int64 ``[num_seqs + 1]``; batch is 1, sequences are packed.
        cu_seqlens_cpu: ignored, a copy of cu_seqlens.
        chunk_indices: ignored, computed from cu_seqlens.
        cp_context: must be None.
        **kwargs: ``use_gate_in_kernel``, ``A_log`` and ``dt_bias`` ``[v_heads]``; ``chunk_size``,
            one of 16, 32 and 64, would change nothing but rounding and is ignored. Nothing else.

    Returns:
        ``out`` with the shape of v in the dtype of q, and the final state or None.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    op = "chunk_gated_delta_rule"
    A_log, dt_bias = _gate(op, kwargs)
    if kwargs.pop("chunk_size", _CHUNK_SIZES[-1]) not in _CHUNK_SIZES:
        raise RuntimeError(f"{op}: chunk_size must be one of {_CHUNK_SIZES}")
    _refuse(op, cp_context=cp_context, **kwargs)
    out, final_state = _scan(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        cu_seqlens,
        scale,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
    )
    return out, final_state if output_final_state else None


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule with the signature of ``fla.ops.gated_delta_rule``; differentiable.

    Up to 8 tokens run as :func:`kvcore.gdn_recurrent_step`; longer or packed sequences, and calls
    that need gradients, as :func:`kvcore.gdn_chunk_scan`.

    Args:
        q, k, v, scale, initial_state, output_final_state, cu_seqlens: as in
            :func:`chunk_gated_delta_rule`.
        g: as there; None is no decay.
        gk: must be None: decay is per head, not per channel.
        gv: must be None.
        beta: as there; None is 1.
        use_gate_in_kernel: g is what enters the gate.
        A_log: ``[v_heads]``, with use_gate_in_kernel.
        dt_bias: ``[v_heads]``, likewise.
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first: as
            there.
        **kwargs: nothing.

    Returns:
        As :func:`chunk_gated_delta_rule`.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    op = "fused_recurrent_gated_delta_rule"
    gate = {"use_gate_in_kernel": use_gate_in_kernel, "A_log": A_log, "dt_bias": dt_bias}
    A_log, dt_bias = _gate(op, gate)
    _refuse(op, gk=gk, gv=gv, **kwargs)
    if use_gate_in_kernel and g is None:
        raise RuntimeError(f"{op}: g must be given with use_gate_in_kernel, got None")
    if beta is None and use_beta_sigmoid_in_kernel:
        raise RuntimeError(f"{op}: beta must be given with use_beta_sigmoid_in_kernel, got None")
    if g is None:
        g = v.new_zeros(v.shape[:3], dtype=torch.float32)
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    tensors = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    if cu_seqlens is not None or q.shape[1] > MAX_RECURRENT_TOKENS or _needs_grad(tensors):
        out, final_state = _scan(
            *tensors,
            cu_seqlens,
            scale,
            use_qk_l2norm_in_kernel,
            use_beta_sigmoid_in_kernel,
            allow_neg_eigval,
            state_v_first,
        )
    else:
        dims = (q.shape[-1], v.shape[-1])
        shape = (q.shape[0], v.shape[2], *(reversed(dims) if state_v_first else dims))
        state = _fp32(initial_state)
        out, final_state = gdn_recurrent_step(
            q,
            k,
            v,
            g,
            beta,
            q.new_zeros(shape, dtype=torch.float32) if state is None else state,
            A_log,
            dt_bias,
            scale=scale,
            qk_l2norm=use_qk_l2norm_in_kernel,
            beta_sigmoid=use_beta_sigmoid_in_kernel,
            allow_neg_eigval=allow_neg_eigval,
            state_v_first=state_v_first,
        )
    return out, final_state if output_final_state else None


def _scan(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    initial_state,
    cu_seqlens,
    scale,
    qk_l2norm,
    beta_sigmoid,
    allow_neg_eigval,
    state_v_first,
) -> tuple[Tensor, Tensor]:
    tensors = (q, k, v, g, beta, A_log, dt_bias, _fp32(initial_state))
    out, final_state, *_ = gdn_chunk_scan(
        *tensors,
        None if cu_seqlens is None else cu_seqlens.to(torch.int32),
        scale=scale,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        save_residuals=_needs_grad(tensors),
    )
    return out, final_state


def _needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _gate(op: str, arguments: dict[str, object]) -> tuple[Tensor | None, Tensor | None]:
    """Takes the gate's arguments out of `arguments`: A_log and dt_bias, None without a gate."""
    used = arguments.pop("use_gate_in_kernel", False)
    A_log, dt_bias = arguments.pop("A_log", None), arguments.pop("dt_bias", None)
    if not used:
        return None, None
    if A_log is None:
        raise RuntimeError(f"{op}: A_log must be given with use_gate_in_kernel, got None")
    return _fp32(A_log), _fp32(dt_bias)


def _refuse(op: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise RuntimeError(f"{op}: {name} must be None, got {type(value).__name__}")
