"""The turbo ops over the grid of what they accept: types, widths, lengths and masks crossed.

The tests of each op vary one thing at a time. Kernels are chosen by several at once, and a tail or
an edge is often wrong for one combination only.
"""

import itertools

import pytest
import torch

import cases
from cases import APPENDS, DTYPES, HEAD_DIMS, LAYOUTS, REFERENCE, Shape, make_qkv
from compare import assert_bitwise_equal, assert_close, assert_same_attention
from kvcore.reference import turbo
from stores import append, assert_same_store, make_kv, on, quantize, rewind, run, run_dequantize

# K and V: every width on either side.
WIDTHS = ((8, 8), (4, 4), (2, 2), (4, 2), (2, 8), (8, 4))

# The SIMT shim takes seconds for a case: what is run there is in the tests of each op.
each_backend = pytest.mark.parametrize(
    "backend", [param for param in cases.BACKENDS if param.values[0].name != "simt"]
)
each_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
each_width = pytest.mark.parametrize("bits", WIDTHS, ids=[f"K{k}V{v}" for k, v in WIDTHS])


def left_padding(*values):
    return torch.tensor(values, dtype=torch.int32)


def check_decode(backend, shape, bits, padding=None, **scalars):
    q, k, v = make_qkv(shape)
    calibration = turbo.turbo_calibrate(k, padding)
    options = {"k_bits": bits[:1], "v_bits": bits[1:]}
    store = quantize(cases.CPU, k, v, *calibration, padding, **options)
    args = (q, *store.readable, *calibration)
    there = store.to(backend.device).readable
    actual = backend.ops.turbo_decode(
        *on(backend.device, q), *there, *on(backend.device, *calibration), **scalars
    )
    assert_same_attention(actual, turbo.turbo_decode(*args, **scalars))


@each_backend
@each_head_dim
@each_dtype
@each_width
@pytest.mark.parametrize("q_len", [1, 9])
def test_decode_types_and_widths(backend, q_len, bits, dtype, head_dim):
    """A full page at the width, one at 8 bits, and an open one; few rows and many."""
    shape = Shape(head_dim, 150, q_len, 2, 2, 2, dtype)
    check_decode(backend, shape, bits, left_padding(0, 11))


@each_backend
@each_head_dim
@pytest.mark.parametrize("window", [1, 63, 64, 65, 190])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("q_len", [1, 4, 33])
def test_decode_windows_and_groups(backend, q_len, group, window, head_dim):
    bits = WIDTHS[(q_len + group + window) % len(WIDTHS)]
    check_decode(backend, Shape(head_dim, 200, q_len, 1, group), bits, window=window)


@each_backend
@pytest.mark.parametrize("kv_len", [1, 2, 31, 63, 64, 65, 127, 128, 129, 191, 192, 193])
@pytest.mark.parametrize("q_len", [1, 2, 16, 17])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_decode_lengths(backend, causal, q_len, kv_len):
    """Pages that are just full, just open, and queries that precede every key."""
    shape = Shape(96, kv_len, q_len, 2, 1)
    check_decode(backend, shape, (4, 2), causal=causal)


@each_backend
@each_head_dim
@each_dtype
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_attention_types_and_groups(backend, group, mask, dtype, head_dim):
    shape = Shape(head_dim, 130, 37, 2, group, 1, dtype)
    q, k, v = make_qkv(shape)
    scalars = {"causal": mask != "full", "window": 70 if mask == "window" else None}
    args = (q, k, v, *turbo.turbo_calibrate(k))
    actual = backend.ops.turbo_attention(*on(backend.device, *args), **scalars)
    assert_same_attention(actual, turbo.turbo_attention(*args, **scalars))


@each_backend
@pytest.mark.parametrize("q_len", [1, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 130])
def test_attention_lengths(backend, kv_len, q_len):
    q, k, v = make_qkv(Shape(64, kv_len, q_len, 1, 2))
    for scalars in ({}, {"causal": True}, {"causal": True, "window": 64}):
        actual = backend.ops.turbo_attention(*on(backend.device, q, k, v), **scalars)
        assert_same_attention(actual, turbo.turbo_attention(q, k, v, **scalars))


@each_backend
@each_head_dim
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_calibrate_types_and_layouts(backend, layout, dtype, head_dim):
    k, v = make_qkv(Shape(head_dim, 90, 1, 2, 1, 2, dtype, layout))[1:]
    padding = left_padding(0, 33)
    actual = run(backend, "turbo_calibrate", k, padding)
    for a, e in zip(actual, turbo.turbo_calibrate(k, padding), strict=True):
        assert_bitwise_equal(a, e)
    actual = run(backend, "turbo_head_priority", v, padding)
    # Sums in fp64 round to the same fp32 whatever their order, but for a rare last bit.
    assert_close(actual, turbo.turbo_head_priority(v, padding), rtol=2e-7, atol=0)


@each_backend
@each_head_dim
@each_dtype
@each_width
def test_quantize_types_and_widths(backend, bits, dtype, head_dim):
    k, v = make_kv(head_dim, 200, kv_heads=2, batch=2, dtype=dtype)
    padding = left_padding(0, 70)
    args = (k, v, *turbo.turbo_calibrate(k, padding), padding)
    options = {"k_bits": bits[:1], "v_bits": bits[1:]}
    expected = quantize(REFERENCE, *args, **options)
    assert_same_store(quantize(backend, *args, **options), expected)
    calibration = args[2:4]
    read = run_dequantize(backend, expected.to(backend.device), *calibration, kv_len=200)
    want = run_dequantize(REFERENCE, expected, *calibration, kv_len=200)
    for name, a, e in zip("kv", read, want, strict=True):
        assert_bitwise_equal(a, e, name)


@each_backend
@each_head_dim
@each_dtype
@pytest.mark.parametrize("lens", APPENDS, ids=lambda lens: "+".join(map(str, lens)))
def test_append_types_and_lengths(backend, lens, dtype, head_dim):
    choice = HEAD_DIMS.index(head_dim) + DTYPES.index(dtype) + APPENDS.index(lens)
    k_bits, v_bits = WIDTHS[choice % len(WIDTHS)]
    layout = LAYOUTS[choice % len(LAYOUTS)]
    expected = cases.empty_store(2, 1, head_dim, 8, k_bits=k_bits, v_bits=v_bits)
    actual = expected.to(backend.device)
    calibration = turbo.turbo_calibrate(make_kv(head_dim, 90, batch=2)[0])
    for i, num_new in enumerate(lens):
        k, v = make_kv(head_dim, num_new, batch=2, dtype=dtype, seed=i)
        if num_new:
            k, v = (cases.with_layout(x, layout) for x in (k, v))
        args = (k, v, *calibration, None if i else left_padding(0, min(num_new, 5)))
        append(REFERENCE, expected, *args)
        append(backend, actual, *args)
    assert_same_store(actual, expected)


@each_backend
@each_head_dim
@each_width
@pytest.mark.parametrize("dropped", [1, 30, 64, 65, 130, 200])
def test_rewind_depths_and_widths(backend, dropped, bits, head_dim):
    """Rewound, read and appended to: past one page the codes come from the pool."""
    k, v = make_kv(head_dim, 210, kv_heads=1, batch=2)
    expected = cases.empty_store(2, 1, head_dim, 5, k_bits=bits[0], v_bits=bits[1])
    append(REFERENCE, expected, k, v, None, None, left_padding(0, 20))
    actual = expected.to(backend.device)
    lens = torch.tensor([210 - dropped, max(0, 190 - dropped // 2)], dtype=torch.int32)
    for ops, store in ((REFERENCE, expected), (backend, actual)):
        rewind(ops, store, lens)
    assert_same_store(actual, expected, " after the rewind")
    there = run_dequantize(backend, actual, kv_len=210)
    for name, a, e in zip(
        "kv", there, run_dequantize(REFERENCE, expected, kv_len=210), strict=True
    ):
        assert_bitwise_equal(a, e, name)
    for ops, store in ((REFERENCE, expected), (backend, actual)):
        append(ops, store, k[:, :, :70], v[:, :, :70])
    assert_same_store(actual, expected, " after the append")


@each_backend
@each_dtype
@pytest.mark.parametrize(("k_layout", "v_layout"), list(itertools.permutations(LAYOUTS, 2)))
def test_inputs_of_different_strides(backend, k_layout, v_layout, dtype):
    q, k, v = make_qkv(Shape(64, 70, 5, 2, 2, 2, dtype))
    mixed = (q, cases.with_layout(k, k_layout), cases.with_layout(v, v_layout))
    plain = [x.contiguous() for x in mixed]
    there = [cases.with_layout(k.to(backend.device), k_layout)]
    there += [cases.with_layout(v.to(backend.device), v_layout)]
    actual = backend.ops.turbo_attention(*on(backend.device, q), *there)
    expected = backend.ops.turbo_attention(*on(backend.device, *plain))
    for name, a, e in zip(("out", "lse"), actual, expected, strict=True):
        assert_bitwise_equal(a, e, name)
    store = cases.store_of(backend.ops.turbo_quantize(*there))
    want = cases.store_of(backend.ops.turbo_quantize(*on(backend.device, *plain[1:])))
    assert_same_store(store, want)
