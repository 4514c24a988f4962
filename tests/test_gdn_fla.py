"""The functions with flash-linear-attention's signatures, and transformers' functions as oracle."""

import inspect
import re

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

import kvcore
from cases import BF16, F32, normal
from compare import assert_bitwise_equal, relative_l2
from gdn_cases import SCANS, Scan, make_scan
from hf_models import needs_hybrids

pytestmark = needs_hybrids

# Names in the positional order of fla-core 0.6.
_CHUNK_NAMES = """
    q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel
    use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu
    chunk_indices cp_context kwargs
"""
_RECURRENT_NAMES = """
    q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel
    use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first
    cu_seqlens kwargs
"""
# Tolerances that other suites use between implementations.
OUT_ERROR, GRADIENT_ERROR, GATE_GRADIENT_ERROR = 5e-3, 8e-3, 2e-2


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (kvcore.chunk_gated_delta_rule, _CHUNK_NAMES),
        (kvcore.fused_recurrent_gated_delta_rule, _RECURRENT_NAMES),
    ],
)
def test_positional_order(function, names):
    assert list(inspect.signature(function).parameters) == names.split()


def transformers_rule(q, k, v, g, beta, state, cu_seqlens=None, *, chunk=True):
    """The pure torch function; it knows nothing of packed sequences, so one at a time."""
    function = (
        modeling.torch_chunk_gated_delta_rule
        if chunk
        else modeling.torch_recurrent_gated_delta_rule
    )
    function = inspect.unwrap(function)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    if cu_seqlens is None:
        return function(q, k, v, g=g, beta=beta, initial_state=state, **options)
    bounds = cu_seqlens.tolist()
    outs, states = [], []
    for i in range(len(bounds) - 1):
        at = slice(bounds[i], bounds[i + 1])
        own = None if state is None else state[i : i + 1]
        if bounds[i] == bounds[i + 1]:
            states.append(own)
            continue
        tokens = (x[:, at] for x in (q, k, v))
        out, new = function(*tokens, g=g[:, at], beta=beta[:, at], initial_state=own, **options)
        outs.append(out)
        states.append(new)
    return torch.cat(outs, 1), torch.cat(states)


ORACLE_SCANS = [
    c
    for c in SCANS
    if not (c.in_op_gate or c.v_first or c.tokens == 0 or c.batch == 0 or c.normaliser < 0.1)
]


@pytest.mark.parametrize("case", ORACLE_SCANS, ids=str)
def test_agrees_with_transformers(case):
    q, k, v, g, beta, _, _, state, cu_seqlens = make_scan(case)
    leaves = [x if x is None else x.requires_grad_() for x in (q, k, v, g, beta, state)]
    ours = kvcore.chunk_gated_delta_rule(
        *leaves[:5], None, leaves[5], True, True, cu_seqlens=cu_seqlens
    )
    theirs = transformers_rule(*leaves, cu_seqlens)
    names = ("q", "k", "v", "g", "beta", "initial_state")
    bounds = dict.fromkeys(names, GRADIENT_ERROR) | dict.fromkeys(
        ("g", "beta"), GATE_GRADIENT_ERROR
    )
    if case.dtype == F32:
        bounds = dict.fromkeys(names, 2e-4)
    for a, e, name in zip(ours, theirs, ("out", "final_state"), strict=True):
        assert relative_l2(a, e) <= (1e-4 if case.dtype == F32 else OUT_ERROR), name
    wanted = [x for x in leaves if x is not None]
    grads = []
    for out, final in (ours, theirs):
        loss = (out.float() * normal(*out.shape, seed=7)).sum()
        loss = loss + (final * normal(*final.shape, seed=8)).sum()
        grads.append(iter(torch.autograd.grad(loss, wanted)))
    for name, x in zip(names, leaves, strict=True):
        if x is not None:
            a, e = (next(found) for found in grads)
            if e.norm() > 0:
                assert relative_l2(a, e) <= bounds[name], name


@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_recurrent_agrees_with_transformers(num_tokens, dtype):
    q, k, v, g, beta, *_, state, _ = make_scan(Scan(num_tokens, batch=2, dtype=dtype))
    for initial in (state, None):
        ours = kvcore.fused_recurrent_gated_delta_rule(
            q, k, v, g, None, None, beta, None, initial, True, True
        )
        theirs = transformers_rule(q, k, v, g, beta, initial, chunk=False)
        for a, e in zip(ours, theirs, strict=True):
            assert relative_l2(a, e) <= (1e-5 if dtype == F32 else OUT_ERROR)


def test_recurrent_has_a_backward():
    inputs = [x.requires_grad_() for x in make_scan(Scan(5))[:5]]
    q, k, v, g, beta = inputs
    grads = []
    for out, state in (
        kvcore.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, output_final_state=True),
        kvcore.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True),
    ):
        grads.append(torch.autograd.grad(out.sum() + state.sum(), inputs))
    for a, b in zip(*grads, strict=True):
        assert_bitwise_equal(a, b)


def test_options_reach_the_op():
    q, k, v, a, b, A_log, dt_bias, state, _ = make_scan(
        Scan(30, in_op_gate=True, beta_max=2.0, v_first=True, v_dim=32)
    )
    options = {"qk_l2norm": True, "beta_sigmoid": True, "allow_neg_eigval": True}
    expected = kvcore.gdn_chunk_scan(
        q, k, v, a, b, A_log, dt_bias, state, scale=0.3, state_v_first=True, **options
    )
    shared = {
        "scale": 0.3,
        "initial_state": state,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True,
        "state_v_first": True,
        "use_gate_in_kernel": True,
        "A_log": A_log,
        "dt_bias": dt_bias,
    }
    chunk = kvcore.chunk_gated_delta_rule(q, k, v, a, b, chunk_size=32, **shared)
    fused = kvcore.fused_recurrent_gated_delta_rule(q, k, v, a, beta=b, **shared)
    for result in (chunk, fused):
        assert_bitwise_equal(result[0], expected[0])
        assert_bitwise_equal(result[1], expected[1])
    # Packed, with int64 bounds and a bf16 state, as callers of FLA pass them.
    bounds = torch.tensor([0, 10, 30])
    states = torch.cat([state, state]).bfloat16()
    packed = kvcore.chunk_gated_delta_rule(
        q, k, v, a, b, cu_seqlens=bounds, **(shared | {"initial_state": states})
    )
    expected = kvcore.gdn_chunk_scan(
        q,
        k,
        v,
        a,
        b,
        A_log,
        dt_bias,
        states.float(),
        bounds.int(),
        scale=0.3,
        state_v_first=True,
        **options,
    )
    assert_bitwise_equal(packed[0], expected[0])


def test_defaults():
    q, k, v, *_ = make_scan(Scan(4))
    out, state = kvcore.fused_recurrent_gated_delta_rule(q, k, v)
    zeros, ones = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    want, _ = kvcore.chunk_gated_delta_rule(q, k, v, zeros, ones)
    assert relative_l2(out, want) < 1e-5
    assert state is None


REFUSED = [
    ("chunk_gated_delta_rule", {"cp_context": object()}, "cp_context must be None, got object"),
    ("chunk_gated_delta_rule", {"head_first": True}, "head_first must be None, got bool"),
    ("chunk_gated_delta_rule", {"chunk_size": 48}, "chunk_size must be one of (16, 32, 64)"),
    (
        "chunk_gated_delta_rule",
        {"use_gate_in_kernel": True},
        "A_log must be given with use_gate_in_kernel, got None",
    ),
    ("fused_recurrent_gated_delta_rule", {"gk": torch.ones(1)}, "gk must be None, got Tensor"),
    ("fused_recurrent_gated_delta_rule", {"gv": torch.ones(1)}, "gv must be None, got Tensor"),
    ("fused_recurrent_gated_delta_rule", {"offsets": 3}, "offsets must be None, got int"),
    (
        "fused_recurrent_gated_delta_rule",
        {"use_gate_in_kernel": True, "A_log": torch.zeros(2), "g": None},
        "g must be given with use_gate_in_kernel, got None",
    ),
    (
        "fused_recurrent_gated_delta_rule",
        {"use_beta_sigmoid_in_kernel": True, "beta": None},
        "beta must be given with use_beta_sigmoid_in_kernel, got None",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_refuses_by_name(name, changes, message):
    q, k, v, g, beta, *_ = make_scan(Scan(4))
    arguments = {"q": q, "k": k, "v": v, "g": g, "beta": beta} | changes
    with pytest.raises(RuntimeError, match=re.escape(f"{name}: {message}")):
        getattr(kvcore, name)(**arguments)
