"""The causal depthwise convolution: forward, backward and update."""

import itertools

import pytest
import torch

import cases
import kvcore
from cases import BF16, CPU, DTYPES, F16, F32, each_backend, normal
from compare import assert_bitwise_equal
from gdn_cases import assert_near, doubles
from kvcore.reference import gdn as reference

ERROR = {F32: 1e-6, F16: 1e-3, BF16: 6e-3}
# batch, channels, num_tokens, width: tiles are 256 channels by 32 tokens.
SIZES = [
    (1, 1, 1, 4),
    (2, 7, 3, 2),
    (2, 64, 33, 3),
    (1, 257, 64, 4),
    (3, 300, 70, 4),
    (1, 512, 29, 4),
    (2, 5, 0, 4),
    (0, 5, 3, 2),
]


def make_conv(batch, channels, num_tokens, width, dtype=F32, channels_last=True):
    x = normal(batch, num_tokens, channels, seed=0).to(dtype).transpose(1, 2)
    x = x if channels_last else x.contiguous()
    weight = normal(channels, width, seed=1).to(dtype)
    return x, weight, normal(channels, seed=2).to(dtype)


# The CPU looks at values in device tensors and raises.
each_device_backend = pytest.mark.parametrize(
    "backend", [p for p in cases.BACKENDS if p.values[0] != CPU]
)


def run(backend, name, *tensors, **scalars):
    """The op's results on the CPU."""
    moved = [x if x is None else x.to(backend.device) for x in tensors]
    results = getattr(backend.ops, name)(*moved, **scalars)
    return results.cpu() if isinstance(results, torch.Tensor) else [x.cpu() for x in results]


def run_update(backend, x, state, *tensors, **scalars):
    """out on the CPU; the state is changed."""
    moved = [x if x is None else x.to(backend.device) for x in (x, state, *tensors)]
    out = backend.ops.gdn_conv1d_update(*moved, **scalars)
    state.copy_(moved[1])
    return out.cpu()


@pytest.mark.isa
@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(size, channels_last, backend):
    x, weight, bias = make_conv(*size, channels_last=channels_last)
    d_out = normal(*x.shape, seed=3)
    for silu, b in itertools.product((False, True), (bias, None)):
        actual = run(backend, "gdn_conv1d", x, weight, b, silu=silu)
        wide = doubles((x, weight, b))
        assert_near(actual, reference.gdn_conv1d(*wide, silu=silu), 1e-6, "out")
        grads = run(backend, "gdn_conv1d_backward", d_out, x, weight, b, silu=silu)
        expected = reference.gdn_conv1d_backward(d_out.double(), *wide, silu=silu)
        for a, e, name in zip(grads, expected, ("dx", "dweight", "dbias"), strict=True):
            assert_near(a, e, 2e-6, name)


@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_of_every_dtype(dtype, backend):
    x, weight, bias = make_conv(1, 8, 70, 4, dtype)
    d_out = normal(*x.shape, seed=3).to(dtype)
    wide = doubles((x, weight, bias))
    out = run(backend, "gdn_conv1d", x, weight, bias, silu=True)
    assert_near(out, reference.gdn_conv1d(*wide, silu=True), ERROR[dtype], "out")
    grads = run(backend, "gdn_conv1d_backward", d_out, x, weight, bias, silu=True)
    expected = reference.gdn_conv1d_backward(d_out.double(), *wide, silu=True)
    for a, e, name in zip(grads, expected, ("dx", "dweight", "dbias"), strict=True):
        assert_near(a, e, 2 * ERROR[dtype], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    x, weight, bias = make_conv(2, 40, 50, 4, dtype)
    leaves = [y.requires_grad_() for y in (x, weight, bias)]
    out = kvcore.gdn_conv1d(*leaves, silu=True)
    assert out.dtype == dtype
    wide = [y.detach().double().requires_grad_() for y in leaves]
    expected = reference.gdn_conv1d(*wide, silu=True)
    assert_near(out, expected, ERROR[dtype], "out")
    out.sum().backward()
    expected.sum().backward()
    for a, e in zip(leaves, wide, strict=True):
        assert a.grad.dtype == dtype
        assert_near(a.grad, e.grad, 2 * ERROR[dtype], "gradient")


@pytest.mark.asan
@each_backend
def test_packed_sequences_equal_separate_calls(backend):
    x, weight, bias = make_conv(1, 30, 80, 4)
    bounds = [0, 0, 1, 3, 40, 40, 80]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    d_out = normal(*x.shape, seed=3)
    out = run(backend, "gdn_conv1d", x, weight, bias, cu_seqlens, silu=True)
    dx, dweight, dbias = run(
        backend, "gdn_conv1d_backward", d_out, x, weight, bias, cu_seqlens, silu=True
    )
    sums = [torch.zeros_like(dweight), torch.zeros_like(dbias)]
    for a, b in itertools.pairwise(bounds):
        at = (slice(None), slice(None), slice(a, b))
        separate = run(backend, "gdn_conv1d", x[at], weight, bias, silu=True)
        assert_bitwise_equal(out[at], separate)
        alone = run(backend, "gdn_conv1d_backward", d_out[at], x[at], weight, bias, silu=True)
        assert_bitwise_equal(dx[at], alone[0])
        sums = [s + y for s, y in zip(sums, alone[1:], strict=True)]
    assert_near(dweight, sums[0], 1e-6, "dweight")
    assert_near(dbias, sums[1], 1e-6, "dbias")


@pytest.mark.isa
@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("state_len", "num_tokens"), [(3, 1), (3, 2), (4, 1), (6, 3), (3, 70), (5, 0)]
)
def test_update_matches_reference(dtype, state_len, num_tokens, backend):
    x, weight, bias = make_conv(3, 300, num_tokens, 4, dtype)
    pool = normal(5, 300, state_len, seed=4).to(dtype)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    expected_pool = pool.double()
    before = pool.clone()
    out = run_update(backend, x, pool, weight, bias, slots, silu=True)
    wide = doubles((x, expected_pool, weight, bias))
    expected = reference.gdn_conv1d_update(*wide, slots, silu=True)
    assert_near(out, expected, ERROR[dtype], "out")
    assert_bitwise_equal(pool, wide[1].to(dtype), "conv_state")
    assert_bitwise_equal(pool[1:4], before[1:4], "other slots")
    assert not out[1].any()


@each_backend
@pytest.mark.parametrize("width", [2, 4])
def test_updates_continue_the_sequence(width, backend):
    x, weight, bias = make_conv(2, 70, 50, width, BF16)
    whole = run(backend, "gdn_conv1d", x, weight, bias, silu=True)
    state = torch.zeros(2, 70, 3, dtype=BF16)
    parts = [
        run_update(backend, x[:, :, a:b], state, weight, bias, silu=True)
        for a, b in itertools.pairwise([0, 1, 3, 40, 50])
    ]
    assert_bitwise_equal(torch.cat(parts, 2), whole)
    assert_bitwise_equal(state, x[:, :, -3:].contiguous())


def test_deterministic_and_noncontiguous():
    x, weight, bias = make_conv(2, 600, 90, 4)
    d_out = normal(*x.shape, seed=3)
    results = [
        kvcore.gdn_conv1d(x, weight, bias, silu=True),
        *kvcore.gdn_conv1d_backward(d_out, x, weight, bias, silu=True),
    ]
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            strided = [torch.stack([y, y + 1], -1)[..., 0] for y in (x.contiguous(), weight, bias)]
            again = [
                kvcore.gdn_conv1d(*strided, silu=True),
                *kvcore.gdn_conv1d_backward(d_out.contiguous(), *strided, silu=True),
            ]
            for a, b in zip(again, results, strict=True):
                assert_bitwise_equal(a, b)
    finally:
        torch.set_num_threads(threads)


def test_opcheck():
    x, weight, bias = make_conv(1, 20, 9, 3)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    ops = torch.ops.kvcore
    leaves = [y.clone().requires_grad_() for y in (x, weight, bias)]
    torch.library.opcheck(ops.gdn_conv1d.default, (*leaves, cu_seqlens), {"silu": True})
    torch.library.opcheck(ops.gdn_conv1d_backward.default, (x + 1, x, weight), {"silu": True})
    state = normal(1, 20, 4, seed=5)
    torch.library.opcheck(ops.gdn_conv1d_update.default, (x, state, weight, bias))


@each_backend
def test_poisoned_output(backend, poisoned_memory):
    for channels_last in (False, True):
        x, weight, bias = make_conv(2, 70, 33, 4, channels_last=channels_last)
        results = [
            run(backend, "gdn_conv1d", x, weight, bias, silu=True),
            *run(backend, "gdn_conv1d_backward", x, x, weight, bias, silu=True),
        ]
        for result in results:
            assert result.isfinite().all()


def test_backward_is_differentiable_once():
    x, weight, _ = make_conv(1, 4, 5, 2)
    out = kvcore.gdn_conv1d(x.requires_grad_(), weight)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gdn_conv1d_backward: has no backward"):
        dx.sum().backward()


@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("width", [2, 3, 4])
def test_nan_reaches_only_the_tokens_whose_taps_meet_it(width, backend):
    x, weight, bias = make_conv(1, 5, 100, width)
    clean = run(backend, "gdn_conv1d", x, weight, bias, silu=True)
    x = x.clone()
    x[0, 2, 61] = torch.nan
    out = run(backend, "gdn_conv1d", x, weight, bias, silu=True)
    hit = torch.zeros_like(clean, dtype=torch.bool)
    hit[0, 2, 61 : 61 + width] = True
    assert out[hit].isnan().all()
    assert_bitwise_equal(out[~hit], clean[~hit])


def raised(backend):
    """What kernels reported; it is forgotten then."""
    with pytest.raises(RuntimeError) as caught:
        backend.ops.raise_errors(torch.empty(0, device=backend.device))
    backend.ops.raise_errors(torch.empty(0, device=backend.device))
    return str(caught.value)


@pytest.mark.asan
@each_device_backend
@pytest.mark.parametrize("bounds", [[0, 30, 20, 80], [1, 80], [0, 79], [0, -5, 80], [0, 2**31 - 1]])
def test_bounds_that_do_not_rise(backend, bounds):
    x, weight, bias = make_conv(1, 6, 80, 4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    results = [
        run(backend, "gdn_conv1d", x, weight, bias, cu_seqlens),
        *run(backend, "gdn_conv1d_backward", x, x, weight, bias, cu_seqlens),
    ]
    assert all(result.isnan().all() for result in results)
    assert "cu_seqlens: not rising from 0 to the number of tokens" in raised(backend)


@pytest.mark.asan
@each_device_backend
@pytest.mark.parametrize(
    ("slots", "bad"), [([4, 5, 2], [1]), ([4, -2, 2], [1]), ([3, 1, 3], [0, 2])]
)
def test_slots_that_must_not_be_used(backend, slots, bad):
    x, weight, bias = make_conv(3, 130, 2, 4)
    pool = normal(5, 130, 3, seed=4)
    good = [i for i in range(3) if i not in bad]
    valid = torch.tensor([s if i in good else -1 for i, s in enumerate(slots)], dtype=torch.int32)
    state, expected_state = pool.clone(), pool.clone()
    out = run_update(backend, x, state, weight, bias, torch.tensor(slots, dtype=torch.int32))
    assert "state_indices: no slot of the pool, or a slot that is named twice" in raised(backend)
    expected = run_update(backend, x, expected_state, weight, bias, valid)
    assert out[bad].isnan().all()
    assert_bitwise_equal(out[good], expected[good])
    assert_bitwise_equal(state, expected_state, "conv_state")
