"""The causal depthwise convolution: forward, backward and update."""

import itertools

import pytest
import torch

import kvcore
from cases import BF16, DTYPES, F16, F32, normal
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


@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(size, channels_last):
    x, weight, bias = make_conv(*size, channels_last=channels_last)
    d_out = normal(*x.shape, seed=3)
    for silu, b in itertools.product((False, True), (bias, None)):
        actual = kvcore.gdn_conv1d(x, weight, b, silu=silu)
        wide = doubles((x, weight, b))
        assert_near(actual, reference.gdn_conv1d(*wide, silu=silu), 1e-6, "out")
        grads = kvcore.gdn_conv1d_backward(d_out, x, weight, b, silu=silu)
        expected = reference.gdn_conv1d_backward(d_out.double(), *wide, silu=silu)
        for a, e, name in zip(grads, expected, ("dx", "dweight", "dbias"), strict=True):
            assert_near(a, e, 2e-6, name)


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


def test_packed_sequences_equal_separate_calls():
    x, weight, bias = make_conv(1, 30, 80, 4)
    bounds = [0, 0, 1, 3, 40, 40, 80]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    d_out = normal(*x.shape, seed=3)
    out = kvcore.gdn_conv1d(x, weight, bias, cu_seqlens, silu=True)
    dx, dweight, dbias = kvcore.gdn_conv1d_backward(d_out, x, weight, bias, cu_seqlens, silu=True)
    sums = [torch.zeros_like(dweight), torch.zeros_like(dbias)]
    for a, b in itertools.pairwise(bounds):
        at = (slice(None), slice(None), slice(a, b))
        assert_bitwise_equal(out[at], kvcore.gdn_conv1d(x[at], weight, bias, silu=True))
        alone = kvcore.gdn_conv1d_backward(d_out[at], x[at], weight, bias, silu=True)
        assert_bitwise_equal(dx[at], alone[0])
        sums = [s + y for s, y in zip(sums, alone[1:], strict=True)]
    assert_near(dweight, sums[0], 1e-6, "dweight")
    assert_near(dbias, sums[1], 1e-6, "dbias")


@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("state_len", "num_tokens"), [(3, 1), (3, 2), (4, 1), (6, 3), (3, 70), (5, 0)]
)
def test_update_matches_reference(dtype, state_len, num_tokens):
    x, weight, bias = make_conv(3, 300, num_tokens, 4, dtype)
    pool = normal(5, 300, state_len, seed=4).to(dtype)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    expected_pool = pool.double()
    before = pool.clone()
    out = kvcore.gdn_conv1d_update(x, pool, weight, bias, slots, silu=True)
    wide = doubles((x, expected_pool, weight, bias))
    expected = reference.gdn_conv1d_update(*wide, slots, silu=True)
    assert_near(out, expected, ERROR[dtype], "out")
    assert_bitwise_equal(pool, wide[1].to(dtype), "conv_state")
    assert_bitwise_equal(pool[1:4], before[1:4], "other slots")
    assert not out[1].any()


def test_updates_continue_the_sequence():
    x, weight, bias = make_conv(2, 70, 50, 4, BF16)
    whole = kvcore.gdn_conv1d(x, weight, bias, silu=True)
    state = torch.zeros(2, 70, 3, dtype=BF16)
    parts = [
        kvcore.gdn_conv1d_update(x[:, :, a:b], state, weight, bias, silu=True)
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


def test_poisoned_output(poisoned_memory):
    for channels_last in (False, True):
        x, weight, bias = make_conv(2, 70, 33, 4, channels_last=channels_last)
        results = [
            kvcore.gdn_conv1d(x, weight, bias, silu=True),
            *kvcore.gdn_conv1d_backward(x, x, weight, bias, silu=True),
        ]
        for result in results:
            assert result.isfinite().all()


def test_backward_is_differentiable_once():
    x, weight, _ = make_conv(1, 4, 5, 2)
    out = kvcore.gdn_conv1d(x.requires_grad_(), weight)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gdn_conv1d_backward: has no backward"):
        dx.sum().backward()
