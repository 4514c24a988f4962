"""gdn_recurrent_step and its in-place twin."""

import pytest
import torch

import kvcore
from cases import BF16, DTYPES, F16, F32, normal
from compare import assert_bitwise_equal
from gdn_cases import MAX_ERROR, Scan, assert_near, doubles, make_scan
from kvcore.reference import gdn as reference

STEPS = [
    *(Scan(n) for n in (1, 2, 3, 8, 0)),
    *(Scan(1, k, v) for k, v in ((16, 16), (80, 112), (96, 192), (128, 128), (256, 256), (48, 16))),
    *(Scan(2, 128, 64, 2, 8, 3, dtype=t, in_op_gate=True, beta_max=2.0) for t in DTYPES),
    *(Scan(2, 96, 192, 1, 2, 2, v_first=True, dtype=t) for t in (F32, BF16)),
    Scan(4, beta_max=2.0, correlated=True),
    Scan(1, batch=0),
]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make_step(case, **changes):
    """Arguments of the step; the pool has a slot for each sequence."""
    q, k, v, g, beta, A_log, dt_bias, state, _ = make_scan(case)
    names = ("q", "k", "v", "g", "beta", "state", "A_log", "dt_bias")
    arguments = dict(zip(names, (q, k, v, g, beta, state, A_log, dt_bias), strict=True))
    return arguments | case.options | changes


def in_double(arguments):
    return dict(
        zip(
            arguments,
            doubles(x if isinstance(x, torch.Tensor) else None for x in arguments.values()),
            strict=True,
        )
    ) | {name: x for name, x in arguments.items() if not isinstance(x, torch.Tensor)}


def check(arguments, dtype):
    out, new_state = kvcore.gdn_recurrent_step(**arguments)
    want, want_state = reference.gdn_recurrent_step(**in_double(arguments))
    assert out.dtype == dtype
    assert new_state.dtype == F32
    assert_near(out, want, MAX_ERROR[dtype], "out")
    assert_near(new_state, want_state, 1e-5, "new_state")
    state = arguments["state"].clone()
    in_place = kvcore.gdn_recurrent_step_(**(arguments | {"state": state}))
    assert_bitwise_equal(in_place, out, "out in place")
    assert_bitwise_equal(state, new_state, "state in place")
    return out, new_state


@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_matches_reference(case):
    check(make_step(case), case.dtype)


@pytest.mark.parametrize("v_first", [False, True])
def test_state_pool(v_first):
    case = Scan(1, 64, 32, 1, 2, 3, v_first=v_first)
    dims = (32, 64) if v_first else (64, 32)
    pool = normal(7, 2, *dims, seed=5)
    arguments = make_step(case, state=pool, state_indices=int32(5, -1, 0))
    before = pool.clone()
    out, new = check(arguments, F32)
    assert not out[1].any()
    untouched = [1, 2, 3, 4, 6]
    assert_bitwise_equal(new[untouched], before[untouched], "other slots")
    assert_bitwise_equal(pool, before, "the given pool")
    alone = kvcore.gdn_recurrent_step(
        **make_step(case, state=pool[[5, 1, 0]]) | {"state_indices": None}
    )
    assert_bitwise_equal(out[[0, 2]], alone[0][[0, 2]])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_drafts_are_verified_and_rewound(dtype):
    """A ring of per-token states: drafts that are not accepted leave no trace."""
    case = Scan(4, 64, 64, 1, 2, 2, dtype=dtype, in_op_gate=True)
    pool = normal(12, 2, 64, 64, seed=1)
    rings = torch.arange(10, dtype=torch.int32).view(2, 5)
    first = make_step(case, state=pool.clone(), state_indices=rings)
    out, new = check(first, dtype)
    # Each sequence goes on from the state after the tokens that were accepted.
    accepted = int32(3, 1)
    second = make_step(case, state=new, state_indices=rings, num_accepted=accepted)
    check(second, dtype)
    out = kvcore.gdn_recurrent_step(**second)[0]
    for b, count in enumerate(accepted.tolist()):
        # States lie after the token of their column, so a start from column c has seen c + 1.
        tokens = {
            name: torch.cat([first[name][b : b + 1, :count], second[name][b : b + 1]], 1)
            for name in ("q", "k", "v", "g", "beta")
        }
        whole = kvcore.gdn_recurrent_step(
            **tokens,
            state=pool[rings[b, 0]][None],
            A_log=first["A_log"],
            dt_bias=first["dt_bias"],
            **case.options,
        )[0]
        assert_bitwise_equal(out[b : b + 1], whole[:, count:], f"sequence {b}")


def test_states_that_are_not_kept():
    case = Scan(3, 32, 32, 1, 1, 1)
    pool = normal(4, 1, 32, 32, seed=2)
    arguments = make_step(case, state=pool, state_indices=int32(2, -1, 1)[None])
    _, new = check(arguments, F32)
    assert_bitwise_equal(new[[0, 3]], pool[[0, 3]])
    assert not torch.equal(new[1], pool[1])


def test_single_steps_equal_one_call():
    case = Scan(6, 96, 80, 1, 2, 2, dtype=BF16)
    whole, final = kvcore.gdn_recurrent_step(**make_step(case))
    arguments = make_step(case)
    outs, state = [], arguments["state"]
    for t in range(6):
        tokens = {n: arguments[n][:, t : t + 1] for n in ("q", "k", "v", "g", "beta")}
        out, state = kvcore.gdn_recurrent_step(**(arguments | tokens | {"state": state}))
        outs.append(out)
    assert_bitwise_equal(torch.cat(outs, 1), whole)
    assert_bitwise_equal(state, final)


def test_agrees_with_the_scan():
    case = Scan(8, 128, 128, 2, 4, 2)
    arguments = make_step(case)
    out, state = kvcore.gdn_recurrent_step(**arguments)
    scanned = kvcore.gdn_chunk_scan(*make_scan(case), **case.options)
    assert_near(out, scanned[0], 1e-5, "out")
    assert_near(state, scanned[1], 1e-5, "state")


def test_deterministic():
    arguments = make_step(Scan(2, 64, 96, 2, 4, 5))
    first = kvcore.gdn_recurrent_step(**arguments)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 7):
            torch.set_num_threads(num_threads)
            for a, b in zip(kvcore.gdn_recurrent_step(**arguments), first, strict=True):
                assert_bitwise_equal(a, b)
    finally:
        torch.set_num_threads(threads)


def test_noncontiguous():
    arguments = make_step(Scan(3, 64, 64, 2, 4, 2, dtype=BF16))
    plain = kvcore.gdn_recurrent_step(**arguments)
    strided = {
        n: torch.stack([arguments[n], arguments[n] + 1], -1)[..., 0]
        .transpose(0, 1)
        .contiguous()
        .transpose(0, 1)
        for n in ("q", "k", "v", "g", "beta")
    }
    for a, b in zip(kvcore.gdn_recurrent_step(**(arguments | strided)), plain, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_values_stay_in_their_sequence_and_head(value):
    arguments = make_step(Scan(2, batch=2))
    clean_out, clean_state = kvcore.gdn_recurrent_step(**arguments)
    arguments["v"] = arguments["v"].clone()
    arguments["v"][1, 0, 1, 3] = value
    out, state = kvcore.gdn_recurrent_step(**arguments)
    assert not out[1, 0, 1].isfinite().all()
    assert_bitwise_equal(out[0], clean_out[0])
    assert_bitwise_equal(out[1, :, 0], clean_out[1, :, 0])
    assert_bitwise_equal(state[1, 0], clean_state[1, 0])


def test_opcheck():
    case = Scan(2, 32, 48, 1, 2, 2, in_op_gate=True)
    arguments = make_step(case, state_indices=int32(1, 0))
    tensors = [arguments[n] for n in ("q", "k", "v", "g", "beta", "state", "A_log", "dt_bias")]
    tensors.append(arguments["state_indices"])
    for name in ("gdn_recurrent_step", "gdn_recurrent_step_"):
        op = getattr(torch.ops.kvcore, name).default
        torch.library.opcheck(op, tuple(tensors), case.options)


def test_compiled_equals_eager():
    arguments = make_step(Scan(1, 64, 64))
    names = ("q", "k", "v", "g", "beta")
    tokens = [arguments[n] for n in names]

    def run(state, *tokens):
        return kvcore.gdn_recurrent_step_(*tokens, state * 1, qk_l2norm=True) + 0, state

    def run_in_place(state, *tokens):
        return kvcore.gdn_recurrent_step_(*tokens, state, qk_l2norm=True)

    for function in (run, run_in_place):
        states = [arguments["state"].clone() for _ in range(2)]
        compiled = torch.compile(function, fullgraph=True)(states[0], *tokens)
        eager = function(states[1], *tokens)
        for a, b in zip(
            *((x if isinstance(x, tuple) else (x,)) for x in (compiled, eager)), strict=True
        ):
            assert_bitwise_equal(a, b)
        assert_bitwise_equal(*states)


def test_poisoned_output(poisoned_memory):
    arguments = make_step(Scan(2, batch=2), state_indices=int32(-1, 1))
    out, state = kvcore.gdn_recurrent_step(**arguments)
    assert out.isfinite().all()
    assert state.isfinite().all()
