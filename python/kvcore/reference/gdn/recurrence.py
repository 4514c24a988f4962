"""The gated delta rule, one token at a time (equation 10 of arXiv 2412.06464)."""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPSILON = 1e-6


def working_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unit_rows(x: Tensor) -> Tensor:
    """``x / sqrt(sum x^2 + 1e-6)`` over the last dimension."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPSILON)


def gates(
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Log decay and write strength of every token, ``[batch, num_tokens, v_heads]``."""
    g, beta = g.to(dtype), beta.to(dtype)
    if A_log is not None:
        shifted = g if dt_bias is None else g + dt_bias.to(dtype)
        g = -A_log.to(dtype).exp() * torch.nn.functional.softplus(shifted)
    if beta_sigmoid:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    return g, beta


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float | None,
    qk_l2norm: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """q, k (one head per value head), v, log decay, write strength, and the scale."""
    dtype = working_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g, beta = gates(g, beta, A_log, dt_bias, beta_sigmoid, allow_neg_eigval, dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if qk_l2norm:
        q, k = unit_rows(q), unit_rows(k)
    group = v.shape[2] // q.shape[2]
    return q.repeat_interleave(group, 2), k.repeat_interleave(group, 2), v, g, beta, scale


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence as it stands.

    Args:
        q: ``[batch, num_tokens, heads, k_dim]``.
        k: likewise.
        v: ``[batch, num_tokens, heads, v_dim]``.
        g: log decay ``[batch, num_tokens, heads]``.
        beta: write strength, likewise.
        state: ``[batch, heads, k_dim, v_dim]``.
        scale: factor of the output.

    Returns:
        ``out`` with the shape of v and every token's state ``[batch, num_tokens, heads, k_dim,
        v_dim]``.
    """
    outs, states = [], []
    for t in range(v.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        u = beta[:, t, :, None] * (v[:, t] - read)
        state = state + k[:, t, :, :, None] * u[:, :, None, :]
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        states.append(state)
    if not outs:
        return torch.zeros_like(v), state[:, None].expand(-1, 0, -1, -1, -1)
    return torch.stack(outs, 1), torch.stack(states, 1)


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
    """Reference of :func:`kvcore.gdn_recurrent_step`."""
    q_, k_, v_, g_, beta_, scale = prepare(
        q, k, v, g, beta, A_log, dt_bias, scale, qk_l2norm, beta_sigmoid, allow_neg_eigval
    )
    batch, num_tokens = v.shape[:2]
    pool = state.mT if state_v_first else state
    slots = torch.arange(batch) if state_indices is None else state_indices.long()
    slots = slots if slots.dim() == 2 else slots[:, None]
    new_state, out = pool.clone(), torch.zeros_like(v_)
    for b in range(batch):
        start = 0 if num_accepted is None else int(num_accepted[b]) - 1
        first = int(slots[b, start])
        if first < 0:
            continue
        inputs = (x[b : b + 1] for x in (q_, k_, v_, g_, beta_))
        out[b], states = (x[0] for x in delta_rule(*inputs, pool[first][None].to(v_), scale))
        for t in range(num_tokens):
            slot = first if slots.shape[1] == 1 else int(slots[b, t])
            if slot >= 0:
                new_state[slot] = states[t]
    new_state = new_state.mT.contiguous() if state_v_first else new_state
    return out.to(q.dtype), new_state


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
    """Reference of :func:`kvcore.gdn_recurrent_step_`."""
    out, new_state = gdn_recurrent_step(
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
    state.copy_(new_state)
    return out
