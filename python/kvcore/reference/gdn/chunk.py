"""The gated delta rule in chunks, by the equations of ``csrc/gdn/README.md``."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kvcore.reference.gdn.recurrence import prepare, working_dtype

CHUNK = 64


def chunk_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One chunk: ``out``, the state after it, G and X.

    q, k, v: ``[heads, n, dim]``; g, beta: ``[heads, n]``; state: ``[heads, k_dim, v_dim]``.
    """
    G = g.cumsum(-1)
    n = G.shape[-1]
    future = torch.ones(n, n, dtype=torch.bool, device=G.device).triu(1)
    # Masked before the exponential: above the diagonal the difference can be large.
    D = (G[:, :, None] - G[:, None, :]).masked_fill(future, -torch.inf).exp()
    L = (beta[:, :, None] * (k @ k.mT)).tril(-1)
    eye = torch.eye(n, dtype=G.dtype, device=G.device)
    X = torch.linalg.solve_triangular(L + eye, eye.expand_as(L), upper=False, unitriangular=True)
    A = X * D * beta[:, None, :]
    P = scale * (q @ k.mT) * D
    decay = G.exp()[..., None]
    U = A @ (v - decay * (k @ state))
    out = scale * decay * (q @ state) + P @ U
    rest = (G[:, -1:] - G).exp()[..., None]
    state = decay[:, -1:] * state + k.mT @ (rest * U)
    return out, state, G, X


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
    """Reference of :func:`kvcore.gdn_chunk_scan`."""
    dtype, given = working_dtype(q), q.dtype
    rstd = torch.stack([(x.to(dtype).square().sum(-1) + 1e-6).rsqrt() for x in (q, k)])
    q, k, v, g, beta, scale = prepare(
        q, k, v, g, beta, A_log, dt_bias, scale, qk_l2norm, beta_sigmoid, allow_neg_eigval
    )
    batch, num_tokens, heads, v_dim = v.shape
    if cu_seqlens is None:
        sequences = [(b, 0, num_tokens) for b in range(batch)]
    else:
        sequences = [(0, a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    shape = (len(sequences), heads, k.shape[-1], v_dim)
    if initial_state is None:
        states = v.new_zeros(shape)
    else:
        states = (initial_state.mT if state_v_first else initial_state).to(dtype)
    out, G = torch.zeros_like(v), torch.zeros_like(g)
    X = g.new_zeros(*g.shape, CHUNK)
    final = []
    for (b, begin, end), state in zip(sequences, states, strict=True):
        for first in range(begin, end, CHUNK):
            at = slice(first, min(first + CHUNK, end))
            inputs = [x[b, at].transpose(0, 1) for x in (q, k, v, g, beta)]
            o, state, chunk_G, chunk_X = chunk_step(*inputs, state, scale)
            out[b, at] = o.transpose(0, 1)
            G[b, at] = chunk_G.T
            X[b, at, :, : at.stop - at.start] = chunk_X.transpose(0, 1)
        final.append(state.mT if state_v_first else state)
    final_state = torch.stack(final) if final else v.new_zeros(shape)
    nothing = g.new_zeros(0)
    if not save_residuals:
        return out.to(given), final_state, nothing, nothing, nothing
    return out.to(given), final_state, G, X, rstd if qk_l2norm else nothing


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
    """Reference of :func:`kvcore.gdn_chunk_scan_backward`: torch's derivative of the forward."""
    inputs = [
        None if x is None else x.detach().requires_grad_()
        for x in (q, k, v, g, beta, A_log, dt_bias, initial_state)
    ]
    with torch.enable_grad():
        out, final_state, *_ = gdn_chunk_scan(
            *inputs,
            cu_seqlens,
            scale=scale,
            qk_l2norm=qk_l2norm,
            beta_sigmoid=beta_sigmoid,
            allow_neg_eigval=allow_neg_eigval,
            state_v_first=state_v_first,
            save_residuals=False,
        )
        d_final = torch.zeros_like(final_state) if d_final_state is None else d_final_state
        wanted = [x for x in inputs if x is not None]
        grads = torch.autograd.grad(
            (out, final_state),
            wanted,
            (d_out.to(out.dtype), d_final.to(final_state.dtype)),
            allow_unused=True,
            materialize_grads=True,
        )
    found = iter(grads)
    nothing = final_state.new_zeros(0)
    return tuple(nothing if x is None else next(found) for x in inputs)
