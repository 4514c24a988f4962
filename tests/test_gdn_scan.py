"""gdn_chunk_scan: against the recurrence in fp64, and what it promises beyond values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import kvcore
from cases import BF16, CPU, F16, F32, each_backend, normal
from compare import assert_bitwise_equal, assert_close
from gdn_cases import (
    ISA_SCANS,
    MAX_ERROR,
    SCANS,
    SIMT_SCANS,
    Scan,
    assert_near,
    doubles,
    make_scan,
    recurrence,
)
from kvcore.reference import gdn as reference

LONG_SCANS = [
    Scan(1000, 32, 32, 1, 2, normaliser=10.0),
    Scan(2048, 64, 64, 1, 1, dtype=BF16, normaliser=10.0),
    Scan(lengths=(15, 85, 200, 900, 800), k_dim=32, v_dim=32, dtype=BF16),
]


# The CPU looks at values in device tensors and raises.
each_device_backend = pytest.mark.parametrize(
    "backend", [p for p in cases.BACKENDS if p.values[0] != CPU]
)


def on(backend, inputs):
    return [None if x is None else x.to(backend.device) for x in inputs]


def scan(backend, inputs, **options):
    """The results, on the CPU."""
    return [x.cpu() for x in backend.ops.gdn_chunk_scan(*on(backend, inputs), **options)]


def check(backend, case):
    if not backend.runs(case.macs):
        pytest.skip("too large for this backend")
    inputs = make_scan(case)
    out, state, *_ = scan(backend, inputs, **case.options)
    want, want_state = recurrence(inputs, **case.options)
    # The worst case for bf16: what correlated keys write nearly cancels.
    bound = 6e-3 if case.correlated and case.dtype == BF16 else MAX_ERROR[case.dtype]
    assert out.dtype == case.dtype
    assert state.dtype == F32
    assert_near(out, want, bound, "out")
    assert_near(state, want_state, bound, "final_state")


@each_backend
@pytest.mark.parametrize("case", SCANS, ids=str)
def test_matches_reference(backend, case):
    check(backend, case)


@pytest.mark.isa
@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("case", SIMT_SCANS + ISA_SCANS, ids=str)
def test_matches_reference_at_every_isa_level(backend, case):
    # Those for the CPU's levels are among the other cases here, and take long under sanitizers.
    if backend != CPU and case in ISA_SCANS:
        pytest.skip("for the CPU")
    check(backend, case)


@each_backend
@pytest.mark.parametrize("case", LONG_SCANS, ids=str)
def test_long_sequences(backend, case):
    check(backend, case)


@each_backend
@pytest.mark.parametrize("case", SCANS[:6] + SCANS[-12:], ids=str)
def test_residuals_match_the_chunk_form(backend, case):
    inputs = make_scan(case)
    actual = scan(backend, inputs, **case.options)[2:]
    expected = reference.gdn_chunk_scan(*doubles(inputs), **case.options)[2:]
    for a, e, name in zip(actual, expected, ("g_cumsum", "x_inverse", "rstd"), strict=True):
        assert_close(a, e.float(), rtol=1e-5, atol=1e-5, name=name)


@each_backend
def test_scale_and_plain_keys(backend):
    case = Scan(70, dtype=F32)
    inputs = make_scan(case)
    inputs[1] = inputs[1] * 0.1  # unnormalised keys of unit size make the recurrence explode
    for options in ({}, {"scale": 1.0}, {"scale": -0.5}, {"scale": 0.0}):
        out, state, *_ = scan(backend, inputs, **options)
        want, want_state = recurrence(inputs, **options)
        assert_near(out, want, 1e-5, "out")
        assert_near(state, want_state, 1e-5, "final_state")


@each_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_of_values(backend, dtype, size):
    case = Scan(70, 32, 16, dtype=dtype)
    inputs = make_scan(case)
    inputs[2], inputs[7] = inputs[2] * size, inputs[7] * size
    out, state, *_ = scan(backend, inputs, **case.options)
    want, want_state = recurrence(inputs, **case.options)
    assert_near(out, want, MAX_ERROR[dtype], "out")
    assert_near(state, want_state, MAX_ERROR[dtype], "final_state")


@each_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("value", [0.0, -100.0, -1e30])
def test_extreme_gates(backend, dtype, value):
    inputs = make_scan(Scan(130, dtype=dtype))
    inputs[3] = torch.full_like(inputs[3], value)
    out, state, *_ = scan(backend, inputs, qk_l2norm=True)
    want, want_state = recurrence(inputs, qk_l2norm=True)
    assert_near(out, want, MAX_ERROR[dtype], "out")
    assert_near(state, want_state, MAX_ERROR[dtype], "final_state")


@each_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("split", [64, 128, 192])
def test_two_calls_equal_one(backend, dtype, split):
    inputs = make_scan(Scan(250, k_dim=64, v_dim=96, dtype=dtype, in_op_gate=True))
    *tokens, A_log, dt_bias, state, _ = inputs
    whole = scan(backend, inputs, qk_l2norm=True)
    head = [*(x[:, :split] for x in tokens), A_log, dt_bias, state, None]
    first = scan(backend, head, qk_l2norm=True)
    rest = [*(x[:, split:] for x in tokens), A_log, dt_bias, first[1], None]
    second = scan(backend, rest, qk_l2norm=True)
    assert_bitwise_equal(torch.cat([first[0], second[0]], 1), whole[0], "out")
    assert_bitwise_equal(second[1], whole[1], "final_state")


@each_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_deterministic(backend, dtype):
    case = Scan(150, k_dim=64, v_dim=192, k_heads=2, v_heads=4, batch=3, dtype=dtype)
    if not backend.runs(case.macs):
        case = Scan(70, k_dim=32, v_dim=80, k_heads=1, v_heads=2, batch=2, dtype=dtype)
    inputs = make_scan(case)
    first = scan(backend, inputs, **case.options)
    threads = torch.get_num_threads()
    try:
        # Some split the value channels.
        for num_threads in (1, 2, 13, 64) if backend == CPU else (threads,):
            torch.set_num_threads(num_threads)
            again = scan(backend, inputs, **case.options)
            for a, b in zip(again, first, strict=True):
                assert_bitwise_equal(a, b, f"{num_threads} threads")
    finally:
        torch.set_num_threads(threads)
    for b in range(case.batch):
        one = [None if x is None else x[b : b + 1] for x in inputs]
        alone = scan(backend, one, **case.options)
        assert_bitwise_equal(alone[0], first[0][b : b + 1], f"out of entry {b} alone")
        assert_bitwise_equal(alone[1], first[1][b : b + 1], f"state of entry {b} alone")


@each_backend
def test_packed_sequences_equal_separate_calls(backend):
    case = Scan(lengths=(0, 70, 64, 1, 0, 130), dtype=BF16)
    inputs = make_scan(case)
    out, state, *_ = scan(backend, inputs, **case.options)
    begin = 0
    for i, length in enumerate(case.lengths):
        at = slice(begin, begin + length)
        begin += length
        tokens = [x[:, at] for x in inputs[:5]]
        alone = scan(backend, [*tokens, None, None, inputs[7][i : i + 1], None], **case.options)
        assert_bitwise_equal(out[:, at], alone[0], f"out {i}")
        assert_bitwise_equal(state[i : i + 1], alone[1], f"state {i}")


@pytest.mark.asan
@pytest.mark.parametrize(
    "bounds", [[1, 5], [0, 4, 3], [0, -1, 5], [0, 4], [0, 2**31 - 1], [0, 9, 5], [0]], ids=str
)
@each_device_backend
def test_cu_seqlens_out_of_range(backend, bounds):
    inputs = make_scan(Scan(5, 16, 16, 1, 1, initial=False))
    inputs[8] = torch.tensor(bounds, dtype=torch.int32)
    for result in scan(backend, inputs, qk_l2norm=True):
        assert result.isnan().all()
    with pytest.raises(RuntimeError, match="cu_seqlens: not rising from 0 to the number of tokens"):
        backend.ops.raise_errors(torch.empty(0, device=backend.device))
    backend.ops.raise_errors(torch.empty(0, device=backend.device))
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        scan(backend, inputs, check_values=True)


@each_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_values_stay_in_their_sequence_and_head(backend, name, value, dtype):
    case = Scan(130, 32, 32, k_heads=2, v_heads=4, batch=2, initial=False, dtype=dtype)
    inputs = make_scan(case)
    clean = scan(backend, inputs, qk_l2norm=True)[0]
    index = ["q", "k", "v", "g", "beta"].index(name)
    inputs[index] = inputs[index].clone()
    inputs[index][1, 70, 1] = value
    out = scan(backend, inputs, qk_l2norm=True)[0]
    # A key head serves two value heads.
    touched = [2, 3] if name in ("q", "k") else [1]
    others = [h for h in range(4) if h not in touched]
    assert_bitwise_equal(out[0], clean[0], "the other sequence")
    assert_bitwise_equal(out[1][:, others], clean[1][:, others], "the other heads")
    assert_bitwise_equal(out[1, :64], clean[1, :64], "the chunk before")
    if value != value:  # an infinite gate is zero or infinite decay, both of which have values
        assert out[1, 70, touched].isnan().any()


@each_backend
def test_growing_gates_are_computed(backend):
    inputs = make_scan(Scan(70))
    inputs[3] = inputs[3].abs() * 0.1
    out, state, *_ = scan(backend, inputs, qk_l2norm=True)
    want, want_state = recurrence(inputs, qk_l2norm=True)
    assert_near(out, want, 2e-5, "out")
    assert_near(state, want_state, 2e-5, "final_state")


@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_noncontiguous(backend, dtype):
    case = Scan(3, 16, 16, k_heads=1, v_heads=2, batch=2, dtype=dtype, in_op_gate=True)
    inputs = on(backend, make_scan(case))
    plain = scan(backend, inputs, **case.options)
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x + 1], -1)[..., 0],
        lambda x: torch.cat([x + 1, x, x - 1], 1)[:, 3:6],
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
        lambda x: x.flip(0).flip(0).transpose(0, 1).contiguous().transpose(0, 1),
    ):
        strided = [*map(change, inputs[:5]), *inputs[5:]]
        for a, b in zip(scan(backend, strided, **case.options), plain, strict=True):
            assert_bitwise_equal(a, b)
    expanded = [x[:1].expand(2, *x.shape[1:]) for x in inputs[:5]]
    out = scan(backend, [*expanded, *inputs[5:7], None, None], **case.options)[0]
    assert_bitwise_equal(out[0], out[1])


@each_backend
def test_poisoned_output(backend, poisoned_memory):
    for case in (Scan(70, dtype=BF16), Scan(lengths=(0, 0)), Scan(lengths=(5, 0, 80)), Scan(1)):
        results = scan(backend, make_scan(case), **case.options)
        for result in results:
            assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(dtype):
    op = torch.ops.kvcore.gdn_chunk_scan.default
    for case in (Scan(70, dtype=dtype, in_op_gate=True), Scan(lengths=(3, 0, 7), dtype=dtype)):
        inputs = [
            x.requires_grad_() if x is not None and x.is_floating_point() else x
            for x in make_scan(case)
        ]
        torch.library.opcheck(op, tuple(inputs), case.options)
    inputs = make_scan(Scan(5, v_first=True))
    torch.library.opcheck(op, tuple(inputs), {"state_v_first": True, "save_residuals": False})


def test_compiled_equals_eager():
    inputs = make_scan(Scan(70, dtype=BF16))

    def run(q, k, v, g, beta, state):
        out, final, *_ = kvcore.gdn_chunk_scan(
            q * 2, k, v, g, beta, None, None, state, qk_l2norm=True
        )
        return out + 0, final

    arguments = (*inputs[:5], inputs[7])
    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(compiled(*arguments), run(*arguments), strict=True):
        assert_bitwise_equal(a, b)


def test_fake_tensors_on_cuda():
    with FakeTensorMode():
        q = torch.empty(2, 100, 4, 96, dtype=BF16, device="cuda")
        v = torch.empty(2, 100, 8, 192, dtype=BF16, device="cuda")
        g = torch.empty(2, 100, 8, device="cuda")
        results = kvcore.gdn_chunk_scan(q, q, v, g, g, qk_l2norm=True, state_v_first=True)
    shapes = [(2, 100, 8, 192), (2, 8, 192, 96), (2, 100, 8), (2, 100, 8, 64), (2, 2, 100, 4)]
    assert [tuple(x.shape) for x in results] == shapes
    assert [x.dtype for x in results] == [BF16, F32, F32, F32, F32]
    assert {x.device.type for x in results} == {"cuda"}


@each_backend
def test_check_values(backend):
    inputs = make_scan(Scan(20, v_heads=2))
    scan(backend, inputs, check_values=True)
    for value, text in ((0.5, "0.5"), (torch.nan, "nan")):
        inputs[3] = inputs[3].clone()
        inputs[3][0, 7, 1] = value
        with pytest.raises(RuntimeError, match=rf"g\[0, 7, 1\] must be at most 0, got {text}"):
            scan(backend, inputs, check_values=True)
    scan(backend, inputs)


def test_more_than_2_to_the_31_elements():
    # Rows 2^33 bytes apart, in memory that is never touched between them.
    far = torch.empty(2**32 + 64 * 70, dtype=BF16)
    k = far.as_strided((2, 70, 1, 64), (2**32, 64, 64, 1))
    k.copy_(normal(2, 70, 1, 64, seed=0))
    inputs = make_scan(Scan(70, batch=2, dtype=BF16))
    inputs[1] = k
    plain = [inputs[0], k.contiguous(), *inputs[2:]]
    for a, b in zip(
        scan(CPU, inputs, qk_l2norm=True), scan(CPU, plain, qk_l2norm=True), strict=True
    ):
        assert_bitwise_equal(a, b)
