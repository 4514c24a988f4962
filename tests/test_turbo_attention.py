"""turbo_attention: quantized attention on float inputs."""

import itertools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import kvcore
from cases import BF16, F16, F32, LAYOUTS, Shape, each_backend, each_shape, make_qkv, normal
from compare import (
    assert_bitwise_equal,
    assert_close,
    assert_same_attention,
    assert_same_nonfinite,
    relative_l2,
)
from kvcore.reference import exact_attention, turbo

# One of everything that differs between ISA levels: head_dim, dtype, rows left over.
ISA_SHAPES = [
    Shape(64, 200, 33, 1, 2, dtype=F16),
    Shape(96, 70, 5, 2, 3, dtype=BF16),
    Shape(128, 130, 64, 1, 5),
    Shape(256, 100, 7, 1, 1, dtype=BF16),
    *(Shape(64, 65, num_rows) for num_rows in range(1, 14)),
]


def calibration(k):
    return turbo.turbo_calibrate(k)


def agree(backend, q, k, v, *tensors, **scalars):
    """Runs both, compares, returns the backend's results."""
    moved = [x.to(backend.device) if x is not None else None for x in (q, k, v, *tensors)]
    actual = backend.ops.turbo_attention(*moved, **scalars)
    assert_same_attention(actual, turbo.turbo_attention(q, k, v, *tensors, **scalars))
    return actual


@each_backend
@each_shape
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_matches_reference(backend, shape, causal):
    if not backend.runs(shape.macs):
        pytest.skip(f"{shape.macs} multiply-adds take too long here")
    q, k, v = make_qkv(shape)
    agree(backend, q, k, v, *calibration(k), causal=causal)


@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize("shape", ISA_SHAPES, ids=str)
def test_matches_reference_at_every_isa_level(shape):
    q, k, v = make_qkv(shape)
    agree(cases.CPU, q, k, v, *calibration(k), causal=True)
    agree(cases.CPU, q, k, v, sas_threshold=None)


@each_backend
@pytest.mark.parametrize(
    "scalars",
    [
        {"sas_threshold": None},
        {"sas_threshold": -6.0},
        {"sas_threshold": -87.0},
        {"sas_threshold": -1e-3},
        {"scale": 0.0},
        {"scale": 1.0},
        {"scale": -0.125},
        {"causal": True, "window": 1},
        {"causal": True, "window": 63},
        {"causal": True, "window": 64},
        {"causal": True, "window": 65, "sas_threshold": None},
        {"causal": True, "window": 1000},
        {"causal": True, "window": 2**62},
    ],
    ids=str,
)
def test_options_match_reference(backend, scalars):
    q, k, v = make_qkv(Shape(64, 200, 150, 1, 2, dtype=BF16))
    agree(backend, q, k, v, *calibration(k), **scalars)


@each_backend
def test_scores_far_below_the_maximum_drop_their_pages(backend):
    # One key of page 0 beats every other by more than the threshold: later pages have P = 0.
    q, k, v = make_qkv(Shape(64, 300, 20))
    k[:, :, 7] = 4 * q[:, :, 0]
    q[:] = q[:, :, :1] + 0.01 * q
    agree(backend, q, k, v)


@each_backend
@pytest.mark.parametrize("below", [80.0, 83.5, 84.5, 86.9, 87.1, 200.0])
def test_pages_of_vanishing_probability(backend, below):
    """Exact exponentials so small that 119 / p_max overflows add nothing, and no NaN."""
    q, v = torch.ones(1, 1, 3, 64), cases.normal(1, 1, 128, 64, seed=1)
    k = torch.full((1, 1, 128, 64), 40.0)
    k[:, :, 64:] = 40.0 - below - torch.arange(64.0).view(64, 1) / 4
    options = {"scale": 1 / 64, "sas_threshold": None}
    out, lse = agree(backend, q, k, v, **options)
    first, first_lse = agree(backend, q, k[:, :, :64], v[:, :, :64], **options)
    assert_close(out, first, rtol=1e-6, atol=1e-6)
    assert_close(lse, first_lse, rtol=1e-6, atol=0)


@each_backend
def test_calibration_can_be_partial(backend):
    q, k, v = make_qkv(Shape(128, 100, 9, 2, 2, 2))
    balance, mean = calibration(k)
    for tensors in ((None, None), (balance, None), (None, mean)):
        agree(backend, q, k, v, *tensors)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_is_close_to_exact_attention(causal):
    q, k, v = (normal(2, 4, 300, 128, seed=i) for i in range(3))
    out, lse = kvcore.turbo_attention(q, k, v, causal=causal)
    want, want_lse = exact_attention(q, k, v, causal=causal)
    # Int8 on Gaussian inputs: 0.019 in the simulation that the goals come from.
    assert relative_l2(out, want) < 0.025
    assert (lse - want_lse).abs().max() < 0.05


@each_backend
@pytest.mark.parametrize("scalars", [{}, {"causal": True}, {"causal": True, "window": 30}], ids=str)
def test_packed_sequences_equal_separate_calls(backend, scalars):
    q_lens, kv_lens = (0, 5, 64, 0, 31, 1), (3, 70, 64, 64, 200, 0)
    q, k, v = make_qkv(Shape(64, sum(kv_lens), sum(q_lens), 2, 2))
    tensors = [x.to(backend.device) for x in calibration(k)]
    q, k, v = (x.to(backend.device) for x in (q, k, v))
    bounds = [[0, *itertools.accumulate(lens)] for lens in (q_lens, kv_lens)]
    cu_seqlens = [torch.tensor(b, dtype=torch.int32, device=backend.device) for b in bounds]
    out, lse = backend.ops.turbo_attention(q, k, v, *tensors, *cu_seqlens, **scalars)
    for (q0, q1), (k0, k1) in zip(*map(itertools.pairwise, bounds), strict=True):
        alone = backend.ops.turbo_attention(
            q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], *tensors, **scalars
        )
        assert_bitwise_equal(out[:, :, q0:q1], alone[0], "out")
        assert_bitwise_equal(lse[:, :, q0:q1], alone[1], "lse")


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("scalars", [{}, {"causal": True}, {"causal": True, "window": 40}], ids=str)
def test_nonfinite_values_stay_where_they_are_seen(backend, value, scalars):
    shape = Shape(64, 200, 140, 2, 2)
    clean = make_qkv(shape)
    for name, index in (("q", (0, 1, 77, 5)), ("k", (0, 1, 130, 0)), ("v", (0, 0, 3, 63))):
        q, k, v = (x.clone() for x in clean)
        {"q": q, "k": k, "v": v}[name][index] = value
        out, _ = agree(backend, q, k, v, **scalars)
        assert out.isnan().any()
        assert not out.isnan().all()
    q, k, v = clean
    q[0, 2, 100] = value
    k[0, 0, 0, 0] = value
    v[0, 1, 199, 1] = value
    agree(backend, q, k, v, **scalars)


@each_backend
def test_zeros_and_extremes(backend):
    q, k, v = make_qkv(Shape(64, 100, 10, 1, 2))
    q[0, 0, 3] = 0
    k[:, :, 64:] = 0
    v[:, :, :64] = 0
    agree(backend, q, k, v)
    agree(backend, 1e-30 * q, 1e-20 * k, 1e-42 * v)
    agree(backend, q, k, 1e30 * v)
    agree(backend, 0 * q, 0 * k, 0 * v)


@each_backend
def test_poisoned_output(backend, poisoned_memory):
    for shape in (Shape(64, 40, 100, 1, 2), Shape(96, 70, 3, 2, 1, 2, F16), Shape(64, 0, 4)):
        q, k, v = make_qkv(shape)
        # With a causal mask, q_len > kv_len leaves rows without keys.
        agree(backend, q, k, v, causal=True)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noncontiguous(backend, layout):
    inputs = [x.to(backend.device) for x in make_qkv(Shape(64, 130, 70, 2, 2, 2))]
    strided = [cases.with_layout(x, layout) for x in inputs]
    actual = backend.ops.turbo_attention(*strided, causal=True)
    expected = backend.ops.turbo_attention(*(x.contiguous() for x in strided), causal=True)
    for a, b, name in zip(actual, expected, ("out", "lse"), strict=True):
        assert a.is_contiguous()
        assert_bitwise_equal(a, b, name)


@each_backend
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 10, 5, 2, 2, batch=0),
        Shape(64, 10, 0, 2, 2),
        Shape(64, 0, 5, 2, 2),
        Shape(64, 0, 0, 2, 2),
        Shape(64, 10, 5, 2, 0),
        Shape(96, 1, 1),
        Shape(64, 63, 97, 1, 1),
        Shape(64, 1000, 1, 1, 17),
    ],
    ids=str,
)
def test_empty_and_odd_shapes(backend, shape):
    for causal in (False, True):
        out, lse = agree(backend, *make_qkv(shape), causal=causal)
        if shape.kv_len == 0:
            assert not out.any()
            assert (lse == -torch.inf).all()


def test_more_than_2_to_the_31_elements():
    # Only the window's pages are read, so the other 2^26 keys cost nothing.
    q, k, v = make_qkv(Shape(64, 1, 3, 1, 1))
    kv_len, window = 2**26 + 5, {"causal": True, "window": 100}
    long = kvcore.turbo_attention(q, *(x.expand(1, 1, kv_len, 64) for x in (k, v)), **window)
    short = [x.expand(1, 1, kv_len % 64 + 128, 64) for x in (k, v)]
    assert_same_attention(long, turbo.turbo_attention(q, *short, **window))
    # Rows 2^33 bytes apart, in memory that is never touched between them.
    far = torch.empty(2**32 + 64, dtype=F16)
    q = far.as_strided((2, 1, 1, 64), (2**32, 64, 64, 1))
    q.copy_(normal(2, 1, 1, 64, seed=0))
    k, v = (normal(2, 1, 70, 64, seed=i, dtype=F16) for i in (1, 2))
    agree(cases.CPU, q, k, v)


@each_backend
def test_deterministic(backend):
    inputs = [x.to(backend.device) for x in make_qkv(Shape(128, 300, 130, 2, 4, 3, BF16))]
    tensors = [x.to(backend.device) for x in calibration(inputs[1].cpu())]
    first = backend.ops.turbo_attention(*inputs, *tensors, causal=True)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            again = backend.ops.turbo_attention(*inputs, *tensors, causal=True)
            assert_bitwise_equal(again[0], first[0], f"out of {num_threads} threads")
            assert_bitwise_equal(again[1], first[1], f"lse of {num_threads} threads")
    finally:
        torch.set_num_threads(threads)
    for b in range(3):
        alone = backend.ops.turbo_attention(
            *(x[b : b + 1] for x in (*inputs, *tensors)), causal=True
        )
        assert_bitwise_equal(alone[0], first[0][b : b + 1], f"out of entry {b} alone")
        assert_bitwise_equal(alone[1], first[1][b : b + 1], f"lse of entry {b} alone")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_opcheck(dtype):
    q, k, v = make_qkv(Shape(64, 70, 5, 1, 2, dtype=dtype))
    cu_seqlens = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 30, 70])]
    op = torch.ops.kvcore.turbo_attention.default
    torch.library.opcheck(op, (q, k, v), {"causal": True, "window": 9})
    torch.library.opcheck(op, (q, k, v, *calibration(k), *cu_seqlens))


def test_backward_refuses_by_name():
    q, k, v = make_qkv(Shape(64, 70, 5))
    out, _ = kvcore.turbo_attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match=r"^turbo_attention: has no backward"):
        out.sum().backward()


def test_compiled_equals_eager():
    q, k, v = make_qkv(Shape(64, 130, 70, 2, 2, dtype=BF16))
    tensors = calibration(k)

    def run(q, k, v):
        out, lse = kvcore.turbo_attention(q * 0.5, k, v, *tensors, causal=True, window=80)
        return out + 0, lse

    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(compiled(q, k, v), run(q, k, v), strict=True):
        assert_bitwise_equal(a, b)


def test_fake_tensors_on_cuda():
    with FakeTensorMode():
        q = torch.empty(2, 8, 5, 128, dtype=BF16, device="cuda").transpose(1, 2).transpose(1, 2)
        k = torch.empty(2, 2, 70, 128, dtype=BF16, device="cuda")
        out, lse = kvcore.turbo_attention(q, k, k)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, BF16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == (q.shape[:3], F32, "cuda")


def arguments():
    q, k, v = make_qkv(Shape(64, 70, 5, 2, 2))
    balance, mean = calibration(k)
    cu_seqlens = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 30, 70])]
    names = ("q", "k", "v", "k_balance", "k_mean", "cu_seqlens_q", "cu_seqlens_k")
    return dict(zip(names, (q, k, v, balance, mean, *cu_seqlens), strict=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# What is changed in arguments(), and the text after "turbo_attention: ".
REJECTED = [
    ({"q": torch.zeros(4, 5, 64)}, "q must be 4-dimensional, got [4, 5, 64]"),
    (
        {"q": torch.zeros(1, 4, 5, 64).double()},
        "q must be float32, float16 or bfloat16, got float64",
    ),
    (
        {"q": torch.zeros(1, 4, 5, 80)},
        "head_dim must be one of 64, 96, 128, 256, got 80",
    ),
    ({"q": torch.zeros(1, 3, 5, 64)}, "q must be of a multiple of 2 heads, got 3"),
    (
        {"k": torch.zeros(1, 0, 70, 64), "v": torch.zeros(1, 0, 70, 64)},
        "k must be of at least 1 head, got 0",
    ),
    ({"k": torch.zeros(2, 70, 64)}, "k must be 4-dimensional, got [2, 70, 64]"),
    ({"v": torch.zeros(1, 2, 71, 64)}, "v must be [1, 2, 70, 64], got [1, 2, 71, 64]"),
    ({"v": torch.zeros(1, 2, 70, 64).half()}, "v must be float32 like k, got float16"),
    (
        {"k": torch.zeros(2, 2, 70, 64), "v": torch.zeros(2, 2, 70, 64)},
        "k must be [1, *, *, 64], got [2, 2, 70, 64]",
    ),
    (
        {"k": torch.zeros(1, 2, 70, 128), "v": torch.zeros(1, 2, 70, 128)},
        "k must be [1, *, *, 64], got [1, 2, 70, 128]",
    ),
    (
        {"k": torch.zeros(1, 2, 70, 64).half(), "v": torch.zeros(1, 2, 70, 64).half()},
        "k must be float32 like q, got float16",
    ),
    ({"k_balance": torch.ones(2, 64)}, "k_balance must be [1, 2, 64], got [2, 64]"),
    ({"k_balance": torch.ones(1, 2, 64).half()}, "k_balance must be float32, got float16"),
    ({"k_mean": torch.ones(1, 2, 65)}, "k_mean must be [1, 2, 64], got [1, 2, 65]"),
    (
        {"k_mean": torch.ones(1, 2, 128)[..., ::2]},
        "k_mean must be contiguous, got strides [256, 128, 2]",
    ),
    ({"cu_seqlens_k": None}, "cu_seqlens_k must be given with cu_seqlens_q, got None"),
    ({"cu_seqlens_q": None}, "cu_seqlens_q must be given with cu_seqlens_k, got None"),
    ({"cu_seqlens_q": int32()}, "cu_seqlens_q must be [num_seqs + 1], got [0]"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, "cu_seqlens_q must be int32, got int64"),
    ({"cu_seqlens_q": int32(1, 2, 5)}, "cu_seqlens_q[0] must be 0, got 1"),
    ({"cu_seqlens_q": int32(0, 6, 5)}, "cu_seqlens_q[2] must be at least 6, got 5"),
    ({"cu_seqlens_q": int32(0, 2, 4)}, "cu_seqlens_q[2] must be 5, got 4"),
    ({"cu_seqlens_k": int32(0, -1, 70)}, "cu_seqlens_k[1] must be at least 0, got -1"),
    ({"cu_seqlens_k": int32(0, 30, 71)}, "cu_seqlens_k[2] must be 70, got 71"),
    ({"cu_seqlens_k": int32(0, 70)}, "cu_seqlens_k must be [3], got [2]"),
    (
        {"cu_seqlens_k": int32(0, 9, 30, 9, 70)[::2]},
        "cu_seqlens_k must be contiguous, got strides [2]",
    ),
    ({"scale": torch.nan}, "scale must be finite in float32, got nan"),
    ({"scale": 1e300}, "scale must be finite in float32, got 1e+300"),
    ({"window": 0, "causal": True}, "window must be at least 1 or None, got 0"),
    ({"window": 5}, "window must be None without causal, got 5"),
    ({"sas_threshold": 0.0}, "sas_threshold must be in [-87, 0) or None, got 0"),
    ({"sas_threshold": -88.0}, "sas_threshold must be in [-87, 0) or None, got -88"),
    ({"sas_threshold": torch.nan}, "sas_threshold must be in [-87, 0) or None, got nan"),
]


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_rejects(changes, message):
    with pytest.raises(RuntimeError, match=re.escape(f"turbo_attention: {message}") + "$"):
        kvcore.turbo_attention(**(arguments() | changes))


def test_rejects_packed_batches():
    q, k, v = make_qkv(Shape(64, 70, 5, batch=2))
    message = "turbo_attention: q must be of batch 1 with cu_seqlens_q, got 2"
    with pytest.raises(RuntimeError, match=re.escape(message) + "$"):
        kvcore.turbo_attention(q, k, v, None, None, int32(0, 5), int32(0, 70))


def test_arguments_are_accepted_as_they_are():
    out, lse = kvcore.turbo_attention(**arguments())
    assert_same_nonfinite(out, torch.zeros_like(out))
    assert lse.isfinite().all()


@pytest.mark.asan
@each_backend
@pytest.mark.parametrize("window", [2**62, 2**63 - 1])
@pytest.mark.parametrize("tokens", [2, 130])
def test_a_window_wider_than_any_context_hides_nothing(backend, window, tokens):
    """With more queries than keys the first key of a row is counted from below zero."""
    q, k, v = (x.to(backend.device) for x in make_qkv(Shape(64, tokens, tokens + 6)))
    out, lse = backend.ops.turbo_attention(q, k, v, causal=True)
    windowed, windowed_lse = backend.ops.turbo_attention(q, k, v, causal=True, window=window)
    assert_bitwise_equal(windowed, out, "out")
    assert_bitwise_equal(windowed_lse, lse, "lse")
    *pools, table, tail, _, _, seq_lens = backend.ops.turbo_quantize(k, v)
    store = ([pool for pool in pools if len(pool)], table, tail, seq_lens)
    out, _ = backend.ops.turbo_decode(q, *store)
    windowed, _ = backend.ops.turbo_decode(q, *store, window=window)
    assert_bitwise_equal(windowed, out, "decode")
