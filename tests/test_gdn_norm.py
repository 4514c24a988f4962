"""RMSNorm with and without a gate: forward and backward."""

import itertools

import pytest
import torch

import kvcore
from cases import BF16, CPU, DTYPES, F16, F32, each_backend, normal
from compare import assert_bitwise_equal
from gdn_cases import assert_near, doubles
from kvcore.reference import gdn as reference

ERROR = {F32: 5e-7, F16: 5e-4, BF16: 3e-3}  # of the output: its rounding
NAMES = ("dx", "dweight", "dgate")
# Widths of a vector and around, of a warp's and of a CTA's rows; one row, none, several blocks.
SHAPES = [
    (3, 1),
    (1, 2, 3),
    (5, 15),
    (2, 3, 16),
    (4, 17),
    (9, 64),
    (2, 7, 2, 128),
    (1, 300),
    (3, 1024),
    (2, 1030),
    (64,),
    (0, 8),
    (2, 0, 8),
]


def make_norm(shape, dtype=F32, gated=True, weight_dtype=None):
    """x, weight and gate; rows differ in size."""
    x = normal(*shape, seed=0)
    if len(shape) > 1:
        x = x * normal(*shape[:-1], 1, seed=1).exp()
    weight = normal(shape[-1], seed=2).to(weight_dtype or dtype)
    gate = 2 * normal(*shape, seed=3)
    return x.to(dtype), weight, gate.to(dtype) if gated else None


def run(backend, name, *tensors, **scalars):
    """The op's results on the CPU."""
    moved = [x if x is None else x.to(backend.device) for x in tensors]
    return [x.cpu() for x in getattr(backend.ops, name)(*moved, **scalars)]


def gradients(backend, d_out, x, weight, gate, offset=0.0):
    rstd = run(backend, "gdn_rms_norm", x, weight, gate)[1]
    return run(backend, "gdn_rms_norm_backward", d_out, x, weight, rstd, gate, weight_offset=offset)


def autograd(d_out, x, weight, gate, offset=0.0, eps=1e-6):
    """The derivative of the formula in fp64, by torch."""
    leaves = [y.requires_grad_() for y in doubles((x, weight, gate)) if y is not None]
    wide, w, *g = leaves
    out = torch.nn.functional.rms_norm(wide, wide.shape[-1:], eps=eps) * (w + offset)
    out = out * torch.nn.functional.silu(g[0]) if g else out
    return torch.autograd.grad(out, leaves, d_out.double())


@pytest.mark.isa
@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, gated, backend):
    x, weight, gate = make_norm(shape, gated=gated)
    for offset, eps in ((0.0, 1e-6), (1.0, 0.1)):
        scalars = {"weight_offset": offset, "eps": eps}
        out, rstd = run(backend, "gdn_rms_norm", x, weight, gate, **scalars)
        expected, expected_rstd = reference.gdn_rms_norm(*doubles((x, weight, gate)), **scalars)
        assert_near(out, expected, 5e-7, "out")
        assert_near(rstd, expected_rstd, 2e-7, "rstd")
    d_out = normal(*shape, seed=4)
    actual = gradients(backend, d_out, x, weight, gate, 1.0)
    assert actual[2].shape == (x.shape if gated else (0,))
    expected = autograd(d_out, x, weight, gate, 1.0)
    for a, e, name in zip(actual, expected, NAMES, strict=False):
        if shape[-1] == 1 and name == "dx":
            continue  # what is left when all has cancelled; see below
        assert_near(a, e, 1e-6, name)


def test_reference_is_the_derivative():
    for gated in (False, True):
        tensors = doubles(make_norm((3, 4, 40), gated=gated))
        d_out = normal(3, 4, 40, seed=4).double()
        rstd = reference.gdn_rms_norm(*tensors)[1]
        x, weight, gate = tensors
        actual = reference.gdn_rms_norm_backward(d_out, x, weight, rstd, gate, weight_offset=1.0)
        for a, e, name in zip(actual, autograd(d_out, *tensors, 1.0), NAMES, strict=False):
            assert_near(a, e, 1e-12, name)


@pytest.mark.isa
@each_backend
def test_one_channel(backend):
    """y is the sign of x: the gradient of x is a difference of two equal numbers."""
    x, weight, _ = make_norm((50, 1), gated=False)
    d_out = normal(50, 1, seed=4)
    dx = gradients(backend, d_out, x, weight, None)[0]
    size = (d_out * weight / x.abs()).abs()
    assert ((dx.double() - autograd(d_out, x, weight, None)[0]).abs() <= 1e-6 * size).all()


@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("channels", [72, 1026])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_of_every_dtype(dtype, channels, backend):
    for gated, weight_dtype in itertools.product((False, True), DTYPES):
        x, weight, gate = make_norm((3, channels), dtype, gated, weight_dtype)
        out, _ = run(backend, "gdn_rms_norm", x, weight, gate)
        assert out.dtype == dtype
        assert_near(
            out, reference.gdn_rms_norm(*doubles((x, weight, gate)))[0], ERROR[dtype], "out"
        )
        d_out = normal(3, channels, seed=4).to(dtype)
        actual = gradients(backend, d_out, x, weight, gate)
        assert [y.dtype for y in actual] == [dtype, F32, dtype]
        for a, e, name in zip(actual, autograd(d_out, x, weight, gate), NAMES, strict=False):
            assert_near(a, e, 1e-6 if name == "dweight" else 2 * ERROR[dtype], name)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_rounds_once(dtype):
    x, weight, gate = make_norm((200, 96), dtype, weight_dtype=F32)
    out, _ = kvcore.gdn_rms_norm(x, weight, gate)
    exact = reference.gdn_rms_norm(*doubles((x, weight, gate)))[0]
    rounded = exact.to(dtype)
    # Only what is next to the middle of two numbers may go to the other one.
    assert (out != rounded).double().mean() < 2e-3
    step = (out.double() - rounded.double()).abs()
    bits = {F16: 10, BF16: 7}[dtype]
    assert (step <= rounded.double().abs() * 2.0**-bits + 2.0**-24).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd(dtype):
    x, weight, gate = make_norm((2, 5, 40), dtype, weight_dtype=F32)
    leaves = [y.requires_grad_() for y in (x, weight, gate)]
    out, rstd = kvcore.gdn_rms_norm(*leaves, weight_offset=1.0)
    assert not rstd.requires_grad
    d_out = normal(2, 5, 40, seed=4).to(dtype)
    grads = torch.autograd.grad(out, leaves, d_out)
    expected = autograd(d_out, *(y.detach() for y in leaves), 1.0)
    for y, a, e, name in zip(leaves, grads, expected, ("dx", "dweight", "dgate"), strict=True):
        assert a.dtype == y.dtype
        assert_near(a, e, 1e-6 if name == "dweight" else 2 * ERROR[dtype], name)


def layouts_of(x):
    """The same values behind other strides."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan)
    wide[..., 3 : 3 + x.shape[-1]] = x
    apart = x.new_full((*x.shape, 2), torch.nan)
    apart[..., 0] = x
    reversed_dims = x.permute(*reversed(range(x.dim() - 1)), x.dim() - 1).contiguous()
    order = [*reversed(range(x.dim() - 1)), x.dim() - 1]
    return {
        "sliced": wide[..., 3 : 3 + x.shape[-1]],
        "apart": apart[..., 0],
        "reversed": reversed_dims.permute(*order),
        "channels first": x.mT.contiguous().mT,
        "misaligned": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }


@pytest.mark.isa
@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 4, 20), (2, 3, 2, 2, 2, 8)], ids=str)
def test_noncontiguous(shape, backend):
    """Five dimensions that do not follow each other are copied; fewer are walked."""
    x, weight, gate = make_norm(shape)
    d_out = normal(*shape, seed=4)
    expected = run(backend, "gdn_rms_norm", x, weight, gate)
    expected_grads = gradients(backend, d_out, x, weight, gate)
    for name, other in layouts_of(x).items():
        assert torch.equal(other, x), name
        for g in (gate, layouts_of(gate)["sliced"]):
            actual = run(backend, "gdn_rms_norm", other, weight, g)
            for a, e in zip(actual, expected, strict=True):
                assert a.is_contiguous()
                assert_bitwise_equal(a, e, name)
            for d in (d_out, layouts_of(d_out)["reversed"]):
                grads = gradients(backend, d, other, torch.stack([weight] * 2, 1)[:, 0], g)
                for a, e in zip(grads, expected_grads, strict=True):
                    assert_bitwise_equal(a, e, name)


@pytest.mark.isa
def test_blocks_of_rows_begin_in_any_batch_and_head():
    shape = (3, 5, 300, 8)
    x, weight, gate = make_norm(shape)
    d_out = normal(*shape, seed=4)
    expected = gradients(CPU, d_out, x, weight, gate)
    other = gradients(CPU, d_out, layouts_of(x)["reversed"], weight, gate)
    for a, e, name in zip(other, expected, NAMES, strict=True):
        assert_bitwise_equal(a, e, name)


@each_backend
def test_expanded(backend):
    x, weight, _ = make_norm((1, 1, 24), gated=False)
    rows = x.expand(4, 3, 24)
    out, rstd = run(backend, "gdn_rms_norm", rows, weight, rows)
    again = run(backend, "gdn_rms_norm", rows.contiguous(), weight, rows.contiguous())
    assert_bitwise_equal(out, again[0])
    ones = torch.ones(()).expand(4, 3, 24)
    grads = run(backend, "gdn_rms_norm_backward", ones, rows, weight, rstd)
    copied = run(
        backend, "gdn_rms_norm_backward", ones.contiguous(), rows.contiguous(), weight, rstd
    )
    for a, e in zip(grads, copied, strict=True):
        assert_bitwise_equal(a, e)


def test_deterministic():
    x, weight, gate = make_norm((3000, 72), BF16)
    d_out = normal(3000, 72, seed=4).to(BF16)
    rstd = kvcore.gdn_rms_norm(x, weight, gate)[1]
    results, threads = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            out = kvcore.gdn_rms_norm(x, weight, gate)
            results.append((*out, *kvcore.gdn_rms_norm_backward(d_out, x, weight, rstd, gate)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("channels", [40, 1028])
def test_rows_are_alone(channels, backend):
    """NaN and infinities stay in their row, and rows are the same in every batch."""
    x, weight, gate = make_norm((6, channels))
    d_out = normal(6, channels, seed=4)
    clean = run(backend, "gdn_rms_norm", x, weight, gate)
    clean_grads = gradients(backend, d_out, x, weight, gate)
    x, gate, d_out = x.clone(), gate.clone(), d_out.clone()
    x[1, 5], gate[3, 7], x[4, 0], d_out[4] = torch.nan, torch.nan, torch.inf, torch.nan
    out = run(backend, "gdn_rms_norm", x, weight, gate)
    grads = gradients(backend, d_out, x, weight, gate)
    good = [0, 2, 5]
    assert out[0][1].isnan().all()
    assert out[0][3].isnan().sum() == 1
    assert out[0][4, 0].isnan()
    for a, e in ((out[0], clean[0]), (out[1], clean[1]), (grads[0], clean_grads[0])):
        assert_bitwise_equal(a[good], e[good])
    assert_bitwise_equal(grads[2][good], clean_grads[2][good])
    alone = run(backend, "gdn_rms_norm", x[2:3], weight, gate[2:3])
    assert_bitwise_equal(alone[0], clean[0][2:3])


@pytest.mark.isa
@each_backend
def test_extreme_gates(backend):
    gate = torch.tensor([[-200.0, -88.5, -87.0, -20.0, 0.0, 20.0, 88.5, 200.0]])
    x, weight = torch.ones(1, 8), torch.ones(8)
    out, rstd = run(backend, "gdn_rms_norm", x, weight, gate)
    expected = torch.nn.functional.silu(gate.double())
    assert ((out - expected).abs() <= 1e-6 * expected.abs() + 1e-30).all()
    dgate = run(backend, "gdn_rms_norm_backward", x, x, weight, rstd, gate)[2]
    s = gate.double().sigmoid()
    expected = s * (1 + gate.double() * (1 - s))
    assert ((dgate - expected).abs() <= 1e-6 * expected.abs() + 1e-30).all()


@each_backend
def test_no_rows(backend):
    x, weight, gate = make_norm((0, 8))
    grads = gradients(backend, x, x, weight, gate)
    assert grads[0].shape == grads[2].shape == (0, 8)
    assert_bitwise_equal(grads[1], torch.zeros(8))


@each_backend
@pytest.mark.parametrize("shape", [(70, 33), (3, 1030)], ids=str)
def test_poisoned_output(shape, backend, poisoned_memory):
    x, weight, gate = make_norm(shape)
    for result in run(backend, "gdn_rms_norm", x, weight, gate):
        assert result.isfinite().all()
    for result in gradients(backend, x, x, weight, gate):
        assert result.isfinite().all()


def test_long_rows():
    for dtype, channels in ((BF16, 8192), (F32, 16384)):
        x, weight, gate = make_norm((3, channels), dtype)
        out, _ = kvcore.gdn_rms_norm(x, weight, gate)
        assert_near(
            out, reference.gdn_rms_norm(*doubles((x, weight, gate)))[0], ERROR[dtype], "out"
        )


@pytest.mark.asan
@each_backend
@pytest.mark.parametrize(("shape", "bound"), [((1, 16384), 1e-6), ((2100, 8), 2e-6)], ids=str)
def test_the_longest_rows_and_many(backend, shape, bound):
    """Many are more than a block, or than a CTA has warps: sums are merged."""
    x, weight, gate = make_norm(shape)
    d_out = normal(*shape, seed=4)
    actual = gradients(backend, d_out, x, weight, gate)
    for a, e, name in zip(actual, autograd(d_out, x, weight, gate), NAMES, strict=True):
        assert_near(a, e, bound, name)


def test_opcheck():
    ops = torch.ops.kvcore
    for gated in (False, True):
        x, weight, gate = make_norm((2, 3, 10), gated=gated)
        leaves = [y if y is None else y.clone().requires_grad_() for y in (x, weight, gate)]
        torch.library.opcheck(ops.gdn_rms_norm.default, leaves, {"weight_offset": 1.0})
        rstd = kvcore.gdn_rms_norm(x, weight)[1]
        torch.library.opcheck(ops.gdn_rms_norm_backward.default, (x + 1, x, weight, rstd, gate))


def test_backward_is_differentiable_once():
    x, weight, _ = make_norm((3, 5), gated=False)
    out, _ = kvcore.gdn_rms_norm(x.requires_grad_(), weight)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gdn_rms_norm_backward: has no backward"):
        dx.sum().backward()


def test_compiles():
    x, weight, gate = make_norm((4, 6, 32))

    def function(x, weight, gate):
        return kvcore.gdn_rms_norm(2 * x, weight, gate)[0].sin()

    expected = function(x, weight, gate)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [y.clone().requires_grad_() for y in (x, weight, gate)]
    out = compiled(*leaves)
    assert_bitwise_equal(out.detach(), expected)
    out.sum().backward()
    eager = [y.clone().requires_grad_() for y in (x, weight, gate)]
    function(*eager).sum().backward()
    for a, e in zip(leaves, eager, strict=True):
        assert_bitwise_equal(a.grad, e.grad)


def test_autocast_leaves_dtypes_alone():
    x, weight, gate = make_norm((4, 32), BF16, weight_dtype=F32)
    expected = kvcore.gdn_rms_norm(x, weight, gate)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = kvcore.gdn_rms_norm(x, weight, gate)[0]
        assert kvcore.gdn_rms_norm(x.float(), weight)[0].dtype == F32
    assert_bitwise_equal(out, expected)
