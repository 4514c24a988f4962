"""gdn_recurrent_step and its in-place twin."""

import pytest
import torch

import cases
import kvcore
from cases import BF16, CPU, DTYPES, F16, F32, each_backend, normal
from compare import assert_bitwise_equal
from gdn_cases import MAX_ERROR, Scan, assert_near, doubles, make_scan
from kvcore.reference import gdn as reference

STEPS = [
    *(Scan(n) for n in (1, 2, 3, 8, 0)),
    *(Scan(1, k, v) for k, v in ((16, 16), (80, 112), (96, 192), (128, 128), (256, 256), (48, 16))),
    *(Scan(2, 128, 64, 2, 8, 3, dtype=t, in_op_gate=True, beta_max=2.0) for t in DTYPES),
    *(Scan(2, 96, 192, 1, 2, 2, v_first=True, dtype=t) for t in (F32, BF16)),
    Scan(1, 240, 48, 1, 1, v_first=True),
    Scan(4, beta_max=2.0, correlated=True),
    Scan(1, batch=0),
]


BATCHED = ("q", "k", "v", "g", "beta", "state")
# The CPU looks at values in device tensors and raises.
each_device_backend = pytest.mark.parametrize(
    "backend", [p for p in cases.BACKENDS if p.values[0] != CPU]
)


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


def on(backend, arguments):
    """The arguments on the backend's device."""
    move = lambda x: x.to(backend.device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return {name: move(x) for name, x in arguments.items()}


def step(backend, arguments):
    """out and the new state, on the CPU."""
    return [x.cpu() for x in backend.ops.gdn_recurrent_step(**on(backend, arguments))]


def check(backend, arguments, dtype):
    out, new_state = step(backend, arguments)
    want, want_state = reference.gdn_recurrent_step(**in_double(arguments))
    assert out.dtype == dtype
    assert new_state.dtype == F32
    assert_near(out, want, MAX_ERROR[dtype], "out")
    assert_near(new_state, want_state, 1e-5, "new_state")
    given = on(backend, arguments)
    state = given["state"].clone()
    in_place = backend.ops.gdn_recurrent_step_(**(given | {"state": state}))
    assert_bitwise_equal(in_place, out, "out in place")
    assert_bitwise_equal(state, new_state, "state in place")
    return out, new_state


@pytest.mark.isa
@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_matches_reference(case, backend):
    check(backend, make_step(case), case.dtype)


@each_backend
@pytest.mark.parametrize("v_first", [False, True])
def test_state_pool(v_first, backend):
    case = Scan(1, 64, 32, 1, 2, 3, v_first=v_first)
    dims = (32, 64) if v_first else (64, 32)
    pool = normal(7, 2, *dims, seed=5)
    arguments = make_step(case, state=pool, state_indices=int32(5, -1, 0))
    before = pool.clone()
    out, new = check(backend, arguments, F32)
    assert not out[1].any()
    untouched = [1, 2, 3, 4, 6]
    assert_bitwise_equal(new[untouched], before[untouched], "other slots")
    assert_bitwise_equal(pool, before, "the given pool")
    alone = step(backend, make_step(case, state=pool[[5, 1, 0]]) | {"state_indices": None})
    assert_bitwise_equal(out[[0, 2]], alone[0][[0, 2]])


@each_backend
@pytest.mark.parametrize("dtype", [F32, F16])
def test_drafts_are_verified_and_rewound(dtype, backend):
    """A ring of per-token states: drafts that are not accepted leave no trace."""
    case = Scan(4, 64, 64, 1, 2, 2, dtype=dtype, in_op_gate=True)
    pool = normal(12, 2, 64, 64, seed=1)
    rings = torch.arange(10, dtype=torch.int32).view(2, 5)
    first = make_step(case, state=pool.clone(), state_indices=rings)
    out, new = check(backend, first, dtype)
    # Each sequence goes on from the state after the tokens that were accepted.
    accepted = int32(3, 1)
    second = make_step(case, state=new, state_indices=rings, num_accepted=accepted)
    out, _ = check(backend, second, dtype)
    for b, count in enumerate(accepted.tolist()):
        # States lie after the token of their column, so a start from column c has seen c + 1.
        tokens = {
            name: torch.cat([first[name][b : b + 1, :count], second[name][b : b + 1]], 1)
            for name in ("q", "k", "v", "g", "beta")
        }
        state = pool[rings[b, 0]][None]
        gates = {name: first[name] for name in ("A_log", "dt_bias")}
        whole = step(backend, tokens | gates | {"state": state} | case.options)[0]
        assert_bitwise_equal(out[b : b + 1], whole[:, count:], f"sequence {b}")


@each_backend
def test_states_that_are_not_kept(backend):
    case = Scan(3, 32, 32, 1, 1, 1)
    pool = normal(4, 1, 32, 32, seed=2)
    arguments = make_step(case, state=pool, state_indices=int32(2, -1, 1)[None])
    _, new = check(backend, arguments, F32)
    assert_bitwise_equal(new[[0, 3]], pool[[0, 3]])
    assert not torch.equal(new[1], pool[1])


@each_backend
@pytest.mark.parametrize("v_first", [False, True])
def test_single_steps_equal_one_call(v_first, backend):
    # More tokens than a kernel holds at once.
    case = Scan(11, 96, 80, 1, 2, 2, dtype=BF16, v_first=v_first)
    whole, final = step(backend, make_step(case))
    arguments = make_step(case)
    outs, state = [], arguments["state"]
    for t in range(case.tokens):
        tokens = {n: arguments[n][:, t : t + 1] for n in ("q", "k", "v", "g", "beta")}
        out, state = step(backend, arguments | tokens | {"state": state})
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


@each_backend
def test_independent_of_the_batch(backend):
    arguments = make_step(Scan(2, 64, 96, 2, 4, 5))
    whole, state = step(backend, arguments)
    for a, b in zip(step(backend, arguments), (whole, state), strict=True):
        assert_bitwise_equal(a, b, "again")
    for i in range(5):
        single = {n: x[i : i + 1] if n in BATCHED else x for n, x in arguments.items()}
        out, new = step(backend, single)
        assert_bitwise_equal(out[0], whole[i])
        assert_bitwise_equal(new[0], state[i])


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
    alone = {n: x[3:4] for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    for a, b in zip(kvcore.gdn_recurrent_step(**(arguments | alone)), first, strict=True):
        assert_bitwise_equal(a, b[3:4], "entry 3 alone")


@each_backend
def test_noncontiguous(backend):
    arguments = make_step(Scan(3, 64, 64, 2, 4, 2, dtype=BF16))
    plain = step(backend, arguments)
    strided = {
        n: torch.stack([arguments[n], arguments[n] + 1], -1)[..., 0]
        .transpose(0, 1)
        .contiguous()
        .transpose(0, 1)
        for n in ("q", "k", "v", "g", "beta")
    }
    for a, b in zip(step(backend, arguments | strided), plain, strict=True):
        assert_bitwise_equal(a, b)


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_values_stay_in_their_sequence_and_head(value, backend):
    arguments = make_step(Scan(2, batch=2))
    clean_out, clean_state = step(backend, arguments)
    arguments["v"] = arguments["v"].clone()
    arguments["v"][1, 0, 1, 3] = value
    out, state = step(backend, arguments)
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


@each_backend
def test_poisoned_output(backend, poisoned_memory):
    arguments = make_step(Scan(2, v_dim=48, batch=2), state_indices=int32(-1, 1))
    out, state = step(backend, arguments)
    assert out.isfinite().all()
    assert state.isfinite().all()


def raised(backend):
    """What kernels reported; it is forgotten then."""
    with pytest.raises(RuntimeError) as caught:
        backend.ops.raise_errors(torch.empty(0, device=backend.device))
    backend.ops.raise_errors(torch.empty(0, device=backend.device))
    return str(caught.value)


INT_MAX = 2**31 - 1


@pytest.mark.asan
@each_device_backend
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize(
    ("slots", "bad"),
    [
        ([4, 7, 2], [1]),
        ([4, INT_MAX, 2], [1]),
        ([4, -2, 2], [1]),
        ([-(2**31), 1, 2], [0]),
        ([3, 1, 3], [0, 2]),
        ([3, 3, -1], [0, 1]),
    ],
)
def test_slots_that_must_not_be_used(backend, slots, bad, v_first):
    case = Scan(1, 32, 48, 1, 2, 3, v_first=v_first)
    pool = normal(7, 2, *((48, 32) if v_first else (32, 48)), seed=5)
    arguments = make_step(case, state=pool, state_indices=int32(*slots))
    out, new = step(backend, arguments)
    assert "state_indices: no slot of the pool, or a slot that is named twice" in raised(backend)
    assert out[bad].isnan().all()
    good = [i for i in range(3) if i not in bad]
    valid = [slot if i in good else -1 for i, slot in enumerate(slots)]
    want, want_new = step(backend, arguments | {"state_indices": int32(*valid)})
    assert_bitwise_equal(out[good], want[good], "out of the others")
    assert_bitwise_equal(new, want_new, "states")


@pytest.mark.asan
@each_device_backend
@pytest.mark.parametrize("accepted", [0, -1, 4, INT_MAX, -(2**31)])
def test_num_accepted_out_of_range(backend, accepted):
    case = Scan(2, 32, 16, 1, 1, 2)
    pool = normal(6, 1, 32, 16, seed=5)
    slots = torch.arange(6, dtype=torch.int32).view(2, 3)
    arguments = make_step(case, state=pool, state_indices=slots)
    out, new = step(backend, arguments | {"num_accepted": int32(2, accepted)})
    assert "num_accepted: less than 1 or more than the columns" in raised(backend)
    assert out[1].isnan().all()
    assert_bitwise_equal(new[3:], pool[3:], "states")
    want, want_new = step(backend, arguments | {"num_accepted": int32(2, 1)})
    assert_bitwise_equal(out[0], want[0])
    assert_bitwise_equal(new[:3], want_new[:3])


@pytest.mark.asan
@each_device_backend
def test_columns_that_share_a_slot(backend):
    case = Scan(2, 32, 16, 1, 1, 2)
    pool = normal(8, 1, 32, 16, seed=5)
    slots = int32(0, 1, 2, 3, 4, 4).view(2, 3)
    out, new = step(backend, make_step(case, state=pool, state_indices=slots))
    # The third column of the second sequence is not used, but the second is, and shares its slot.
    assert out[1].isnan().all()
    assert out[0].isfinite().all()
    assert_bitwise_equal(new[3:], pool[3:], "states")
    assert "state_indices: no slot of the pool, or a slot that is named twice" in raised(backend)
