"""Gradients of the gated delta rule: against autograd through fp64, and numerically."""

import pytest
import torch

import kvcore
from cases import BACKENDS, BF16, CPU, F16, F32, SIMT, normal
from compare import assert_bitwise_equal
from gdn_cases import ISA_SCANS, MAX_GRADIENT_ERROR, SCANS, Scan, assert_near, doubles, make_scan
from kvcore.reference import gdn as reference

NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
# One of everything: every head of the forward's list would take long in fp64 on two cores.
BACKWARD_SCANS = [
    *SCANS[:10],
    *(Scan(70, k, v) for k, v in ((16, 80), (96, 192), (128, 64), (256, 256))),
    *(Scan(100, 32, 32, k, v, 2, in_op_gate=True) for k, v in ((1, 1), (2, 8))),
    *(Scan(130, 64, 128, 1, 2, dtype=t, in_op_gate=True) for t in (F16, BF16)),
    Scan(150, normaliser=0.01),
    Scan(150, beta_max=2.0, correlated=True),
    Scan(150, in_op_gate=True, beta_max=2.0, v_first=True),
    Scan(lengths=(15, 85, 1, 0, 64, 65), in_op_gate=True),
    Scan(lengths=(0, 30), v_first=True),
    Scan(150, initial=False),
    Scan(0),
]


def gradients(function, inputs, seed=0, with_state=True, **options):
    """Gradients of a random weighting of out and final_state, None where an input is."""
    leaves = [
        x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for x in inputs
    ]
    out, state, *_ = function(*leaves, **options)
    loss = (out * normal(*out.shape, seed=seed).to(out)).sum()
    if with_state:
        loss = loss + (state * normal(*state.shape, seed=seed + 1).to(state)).sum()
    wanted = [x for x in leaves[:8] if x is not None]
    grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    return [None if x is None else next(grads) for x in leaves[:8]]


def check(case):
    inputs = make_scan(case)
    actual = gradients(kvcore.gdn_chunk_scan, inputs, **case.options)
    expected = gradients(reference.gdn_chunk_scan, doubles(inputs), **case.options)
    for name, x, a, e in zip(NAMES, inputs, actual, expected, strict=False):
        if x is None:
            continue
        assert a.dtype == x.dtype, name
        assert_near(a, e, MAX_GRADIENT_ERROR[case.dtype], f"d{name}")


@pytest.mark.parametrize("case", BACKWARD_SCANS, ids=str)
def test_matches_reference(case):
    check(case)


@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize("case", ISA_SCANS, ids=str)
def test_matches_reference_at_every_isa_level(case):
    check(case)


# What autograd does not reach: the backward of another backend than the CPU's, given what the CPU's
# forward saved.
each_device_backend = pytest.mark.parametrize(
    "backend", [p for p in BACKENDS if p.values[0] != CPU]
)
# Every instance of the kernels, tails of both dims, and all that a gate can be.
DEVICE_SCANS = [
    Scan(1, 16, 16, 1, 1),
    Scan(65, 96, 48, 1, 2, in_op_gate=True, beta_max=2.0),
    Scan(70, 128, 80, 1, 1, dtype=BF16, v_first=True),
    Scan(30, 48, 16, 2, 2, 2, dtype=F16, initial=False),
    Scan(lengths=(0, 3, 70), k_dim=144, v_dim=16, k_heads=1, v_heads=2),
    Scan(20, 256, 32, 1, 1, dtype=BF16, in_op_gate=True),
]
MORE_DEVICE_SCANS = [
    *(Scan(n, 64, 64, 1, 1) for n in (63, 64, 128)),
    Scan(70, 256, 256, 1, 1),
    Scan(100, 32, 32, 2, 8, 2, in_op_gate=True),
    Scan(130, 64, 128, 1, 2, dtype=BF16, in_op_gate=True),
    Scan(130, 64, 128, 1, 1, dtype=F16),
    Scan(150, 64, 64, 1, 1, normaliser=0.01),
    Scan(150, 64, 64, 1, 1, beta_max=2.0, correlated=True),
    Scan(150, 64, 64, 1, 1, beta_max=2.0, correlated=True, dtype=BF16),
    Scan(150, 32, 64, in_op_gate=True, beta_max=2.0, v_first=True),
    Scan(lengths=(15, 85, 1, 0, 64, 65), k_dim=32, v_dim=32, in_op_gate=True),
    Scan(lengths=(0, 30), v_first=True),
    Scan(lengths=(0, 0)),
    Scan(0),
]


def device_gradients(backend, case, inputs, with_state=True):
    """What the op returns, None where there is no such input."""
    out, state, *residuals = kvcore.gdn_chunk_scan(*inputs, **case.options)
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens = inputs
    d_out = normal(*out.shape, seed=0).to(out)
    d_state = normal(*state.shape, seed=1) if with_state else None
    tensors = (d_out, q, k, v, g, beta, *residuals, A_log, dt_bias, initial_state, d_state)
    tensors = [x if x is None else x.to(backend.device) for x in (*tensors, cu_seqlens)]
    results = backend.ops.gdn_chunk_scan_backward(*tensors, **case.options)
    return [None if x is None else y.cpu() for x, y in zip(inputs, results, strict=False)]


def check_device(backend, case):
    inputs = make_scan(case)
    actual = device_gradients(backend, case, inputs)
    expected = gradients(reference.gdn_chunk_scan, doubles(inputs), **case.options)
    bound = MAX_GRADIENT_ERROR[case.dtype]
    for name, x, a, e in zip(NAMES[:5], inputs, actual, expected, strict=False):
        assert a.dtype == x.dtype, name
        assert_near(a, e, bound, f"d{name}")
    if case.initial:
        assert_near(actual[7], expected[7], bound, "dinitial_state")
    if not case.in_op_gate:
        return
    # Sums over all tokens, in which most cancels: errors are compared with the size of the parts.
    gate, dt_bias = inputs[3].double(), inputs[6].double()
    dg, shifted = expected[3], gate + dt_bias
    parts = [dg * torch.nn.functional.softplus(shifted) / shifted.sigmoid(), dg]
    for i, part in zip((5, 6), parts, strict=True):
        assert_near(part.sum((0, 1)), expected[i], 1e-6, f"d{NAMES[i]} of the reference")
        error = (actual[i].double() - expected[i]).norm() / part.abs().sum((0, 1)).norm()
        assert error <= bound, f"d{NAMES[i]}: error must be <= {bound:g}, got {error:.2e}"


@pytest.mark.asan
@each_device_backend
@pytest.mark.parametrize("case", DEVICE_SCANS, ids=str)
def test_kernels_match_reference(case, backend):
    check_device(backend, case)


@each_device_backend
@pytest.mark.parametrize("case", MORE_DEVICE_SCANS, ids=str)
def test_kernels_match_reference_in_more_cases(case, backend):
    check_device(backend, case)


@each_device_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_kernels_are_deterministic_and_keep_sequences_apart(dtype, backend):
    case = Scan(70, 48, 32, 1, 2, 2, dtype=dtype, in_op_gate=True)
    inputs = make_scan(case)
    whole = device_gradients(backend, case, inputs)
    for a, b in zip(device_gradients(backend, case, inputs), whole, strict=True):
        assert_bitwise_equal(a, b, "again")
    # NaN in a head of one sequence leaves the others' bits alone.
    inputs[2] = inputs[2].clone()
    inputs[2][1, 3, 1, 5] = torch.nan
    spoilt = device_gradients(backend, case, inputs)
    for name, a, b in zip(NAMES, spoilt, whole, strict=True):
        if a.dim() >= 3:
            assert_bitwise_equal(a[0], b[0], f"d{name} of the other sequence")
    for i in (2, 3, 4):
        assert_bitwise_equal(spoilt[i][:, :, 0], whole[i][:, :, 0], f"d{NAMES[i]}, other head")
    assert spoilt[4][1].isnan().any()


@pytest.mark.asan
@pytest.mark.simt
@pytest.mark.parametrize(
    "case",
    [
        Scan(64 * 9 + 3, 16, 16, 1, 1),
        Scan(lengths=(100, 64 * 8, 0, 64 * 2 + 1), k_dim=16, v_dim=16, v_heads=1, dtype=BF16),
    ],
    ids=str,
)
def test_windows_change_no_bit(case, monkeypatch):
    if not any(p.values[0] == SIMT for p in BACKENDS):
        pytest.skip("kvcore_simt is not built")
    inputs = make_scan(case)
    whole = device_gradients(SIMT, case, inputs)
    # On a small device a window is eight chunks.
    monkeypatch.setenv("KVCORE_SIMT_DEVICE", "one_sm")
    for name, a, b in zip(NAMES, device_gradients(SIMT, case, inputs), whole, strict=False):
        if a is not None:
            assert_bitwise_equal(a, b, f"d{name}")


@pytest.mark.asan
@each_device_backend
def test_bounds_that_do_not_rise(backend):
    case = Scan(lengths=(15, 5), k_dim=16, v_dim=16, in_op_gate=True)
    inputs = make_scan(case)
    d_out, d_state = torch.ones_like(inputs[2]), torch.ones_like(inputs[7])
    residuals = kvcore.gdn_chunk_scan(*inputs, **case.options)[2:]
    bad = torch.tensor([0, 30, 20], dtype=torch.int32)
    tensors = (d_out, *inputs[:5], *residuals, *inputs[5:8], d_state, bad)
    tensors = [x.to(backend.device) for x in tensors]
    for grad in backend.ops.gdn_chunk_scan_backward(*tensors, **case.options):
        assert grad.isnan().all()
    with pytest.raises(RuntimeError, match="cu_seqlens: not rising"):
        backend.ops.raise_errors(torch.empty(0, device=backend.device))


def test_more_chunks_than_a_segment():
    # 64 chunks are kept, so 70 take the way through segments.
    check(Scan(70 * 64 - 5, 16, 16, 1, 1, normaliser=20.0))


@pytest.mark.parametrize("case", [Scan(5, 16, 16), Scan(67, 16, 16, 1, 1)], ids=str)
def test_gradcheck_of_the_reference(case):
    """The oracle itself, numerically."""
    inputs = [x if x is None else x.double().requires_grad_() for x in make_scan(case)[:8]]
    torch.autograd.gradcheck(
        lambda *x: reference.gdn_chunk_scan(*x, qk_l2norm=True)[:2],
        inputs,
        fast_mode=True,
        rtol=1e-4,
    )


def test_gradcheck():
    """The op in fp32, by central differences along random directions."""
    case = Scan(70, 16, 32, 1, 2, in_op_gate=True)
    inputs = make_scan(case)
    grads = gradients(kvcore.gdn_chunk_scan, inputs, **case.options)

    def loss(tensors):
        out, state, *_ = reference.gdn_chunk_scan(*doubles(tensors), None, **case.options)
        weights = normal(*out.shape, seed=0).double(), normal(*state.shape, seed=1).double()
        return (out * weights[0]).sum() + (state * weights[1]).sum()

    for i, name in enumerate(NAMES):
        direction = normal(*inputs[i].shape, seed=100 + i).double()
        moved = [
            [*inputs[:i], inputs[i].double() + s * 1e-5 * direction, *inputs[i + 1 : 8]]
            for s in (1, -1)
        ]
        numeric = (loss(moved[0]) - loss(moved[1])) / 2e-5
        analytic = (grads[i].double() * direction).sum()
        assert abs(numeric - analytic) <= 1e-4 * max(1, abs(numeric)), name


def test_parts_of_the_result():
    inputs = make_scan(Scan(70))
    both = gradients(kvcore.gdn_chunk_scan, inputs, qk_l2norm=True)
    out_only = gradients(kvcore.gdn_chunk_scan, inputs, with_state=False, qk_l2norm=True)
    want = gradients(reference.gdn_chunk_scan, doubles(inputs), with_state=False, qk_l2norm=True)
    for name, a, b, e in zip(NAMES, out_only, both, want, strict=True):
        if a is not None:
            assert_near(a, e, 2e-5, f"d{name}")
            assert name == "q" or (a != b).any()
    leaves = [x.requires_grad_() if x is not None else None for x in make_scan(Scan(70))]
    _, state, *_ = kvcore.gdn_chunk_scan(*leaves, qk_l2norm=True)
    state.sum().backward()
    assert not leaves[0].grad.any()  # the state does not depend on queries
    assert leaves[1].grad.isfinite().all()


@pytest.mark.parametrize(
    "case",
    [
        *(Scan(150, 64, 96, 2, 8, 2, dtype=t, in_op_gate=True) for t in (F32, BF16)),
        Scan(lengths=(70, 0, 130), k_dim=32, v_dim=64, in_op_gate=True),
        Scan(66 * 64 + 3, 16, 32, 1, 1, in_op_gate=True),  # more chunks than a segment
    ],
    ids=str,
)
def test_deterministic(case):
    inputs = make_scan(case)
    first = gradients(kvcore.gdn_chunk_scan, inputs, **case.options)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 7):  # the last ones share heads
            torch.set_num_threads(num_threads)
            again = gradients(kvcore.gdn_chunk_scan, inputs, **case.options)
            for name, a, b in zip(NAMES, again, first, strict=True):
                assert_bitwise_equal(a, b, f"d{name} of {num_threads} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_batch_invariant(dtype):
    case = Scan(100, 32, 48, 1, 2, 3, dtype=dtype, in_op_gate=True)
    inputs = make_scan(case)
    together = gradients(kvcore.gdn_chunk_scan, inputs, with_state=False, **case.options)
    d_out = normal(3, 100, 2, 48, seed=0).to(dtype)
    for b in range(3):
        leaves = [x[b : b + 1].detach().requires_grad_() for x in (*inputs[:5], inputs[7])]
        out = kvcore.gdn_chunk_scan(*leaves[:5], *inputs[5:7], leaves[5], **case.options)[0]
        alone = torch.autograd.grad(out, leaves, d_out[b : b + 1])
        for i, grad in zip((0, 1, 2, 3, 4, 7), alone, strict=True):
            assert_bitwise_equal(grad, together[i][b : b + 1], f"d{NAMES[i]} of entry {b}")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("split", [64, 128])
def test_two_calls_equal_one(dtype, split):
    inputs = make_scan(Scan(180, 32, 48, 1, 2, dtype=dtype))

    def in_two(q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, **options):
        tokens = (q, k, v, g, beta)
        first = kvcore.gdn_chunk_scan(
            *(x[:, :split] for x in tokens), A_log, dt_bias, state, cu_seqlens, **options
        )
        rest = kvcore.gdn_chunk_scan(
            *(x[:, split:] for x in tokens), A_log, dt_bias, first[1], cu_seqlens, **options
        )
        return torch.cat([first[0], rest[0]], 1), rest[1]

    one = gradients(kvcore.gdn_chunk_scan, inputs, qk_l2norm=True)
    two = gradients(in_two, inputs, qk_l2norm=True)
    for name, a, b in zip(NAMES, two, one, strict=True):
        if a is not None:
            assert_bitwise_equal(a, b, f"d{name}")


def test_poisoned_output(poisoned_memory):
    for case in (Scan(70, dtype=BF16), Scan(lengths=(5, 0, 80), in_op_gate=True), Scan(1)):
        for grad in gradients(kvcore.gdn_chunk_scan, make_scan(case), **case.options):
            assert grad is None or grad.isfinite().all()


def test_opcheck():
    case = Scan(70, in_op_gate=True)
    *inputs, _ = make_scan(case)
    residuals = kvcore.gdn_chunk_scan(*inputs, **case.options)[2:]
    d_out, d_state = torch.ones_like(inputs[2]), torch.ones_like(inputs[7])
    arguments = (d_out, *inputs[:5], *residuals, *inputs[5:], d_state)
    op = torch.ops.kvcore.gdn_chunk_scan_backward.default
    torch.library.opcheck(op, arguments, case.options)
    torch.library.opcheck(
        op, (d_out, *inputs[:5], *residuals), {"qk_l2norm": True, "state_v_first": True}
    )


def test_compiled_training_step():
    inputs = make_scan(Scan(70, dtype=BF16))

    def run(*inputs):
        return kvcore.gdn_chunk_scan(*inputs, qk_l2norm=True)[:2]

    eager = gradients(run, inputs)
    compiled = gradients(torch.compile(run, fullgraph=True), inputs)
    for a, b in zip(compiled, eager, strict=True):
        if a is not None:
            assert_bitwise_equal(a, b)


def test_refusals_name_the_argument():
    leaves = [x.requires_grad_() if x is not None else None for x in make_scan(Scan(5))]
    out, *_ = kvcore.gdn_chunk_scan(*leaves, save_residuals=False)
    with pytest.raises(RuntimeError, match="save_residuals must be True for a backward"):
        out.sum().backward()
    assert not any(x.requires_grad for x in kvcore.gdn_chunk_scan(*leaves)[2:])
    out, _ = kvcore.gdn_recurrent_step(*leaves[:5], leaves[7])
    with pytest.raises(RuntimeError, match=r"gdn_recurrent_step: has no backward.*gdn_chunk_scan"):
        out.sum().backward()
    out, *_ = kvcore.gdn_chunk_scan(*leaves)
    (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gdn_chunk_scan_backward: has no backward"):
        dq.sum().backward()
