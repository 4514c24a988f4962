"""The ops of the quantized store against the reference: whole stores are equal to the bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from cases import APPENDS, REFERENCE
from compare import assert_bitwise_equal, assert_close
from stores import (
    append,
    assert_same_store,
    make_kv,
    quantize,
    rewind,
    run,
    run_dequantize,
)

pytestmark = [pytest.mark.isa, pytest.mark.asan]

NAN, INF = math.nan, math.inf
# K and V widths: every one alone, and mixed per head as head priorities lead to.
BITS = [((8,), (8,)), ((4,), (4,)), ((2,), (2,)), ((4,), (2,)), ((4, 2), (8, 4))]
each_bits = pytest.mark.parametrize("bits", BITS, ids=str)


# ---- calibration


@cases.each_backend
@pytest.mark.parametrize("options", [{}, {"balance": False}, {"subtract_mean": False}], ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES[::3], ids=str)
def test_calibrate_matches_reference(backend, shape, options):
    k, _ = cases.make_qkv(shape)[1:]
    padding = torch.arange(shape.batch, dtype=torch.int32) * 13
    for rotary_dim, left_padding in ((-1, None), (0, None), (48, padding)):
        args = (k, left_padding)
        actual = run(backend, "turbo_calibrate", *args, rotary_dim=rotary_dim, **options)
        expected = run(REFERENCE, "turbo_calibrate", *args, rotary_dim=rotary_dim, **options)
        for name, a, e in zip(("k_balance", "k_mean"), actual, expected, strict=True):
            assert_bitwise_equal(a, e, f"{name} with rotary_dim {rotary_dim}")


@cases.each_backend
def test_calibrate_long_sequences_in_the_order_of_the_contract(backend):
    # Several tasks of 16 blocks, and sums that round: any other order of them shows.
    k = cases.normal(1, 2, 2200, 64, seed=5) * 1e3 + 7
    padding = torch.tensor([77], dtype=torch.int32)
    actual = run(backend, "turbo_calibrate", k, padding)
    for a, e in zip(actual, run(REFERENCE, "turbo_calibrate", k, padding), strict=True):
        assert_bitwise_equal(a, e)


@cases.each_backend
def test_calibrate_of_values_that_are_not_finite_or_overflow(backend):
    k = cases.normal(1, 7, 70, 64, seed=1)
    k[0, 0, 3, 5] = NAN
    k[0, 1, 69, 0] = INF
    k[0, 2, 0, 0] = -INF
    k[0, 3, :, 1] = 3e38  # the sum of fp32 values overflows only in fp32
    k[0, 4, ::2, 1], k[0, 4, 1::2, 1] = 3.4e38, -3.4e38
    k[0, 4, 1, 1] = 3e38  # differences from the mean overflow for some tokens alone
    k[0, 5] = 0
    k[0, 6] = 1e-41
    actual = run(backend, "turbo_calibrate", k)
    for a, e in zip(actual, run(REFERENCE, "turbo_calibrate", k), strict=True):
        assert_bitwise_equal(a, e)
    k_balance, k_mean = actual
    assert k_balance.isfinite().all()
    assert k_mean.isfinite().all()
    assert k_mean[0, 0, 5] == k_mean[0, 1, 0] == k_mean[0, 2, 0] == 0
    assert (k_balance[0, 5] == 1).all()


@cases.each_backend
@pytest.mark.parametrize("shape", cases.SHAPES[::4], ids=str)
def test_head_priority_matches_reference(backend, shape):
    _, v = cases.make_qkv(shape)[1:]
    v = v * torch.linspace(0.5, 2, v.shape[1]).view(-1, 1, 1).to(v.dtype)
    for padding in (None, torch.arange(shape.batch, dtype=torch.int32) * 9):
        actual = run(backend, "turbo_head_priority", v, padding)
        expected = run(REFERENCE, "turbo_head_priority", v, padding)
        # Sums in fp64 round to the same fp32 whatever their order, but for a rare last bit.
        assert_close(actual, expected, rtol=2e-7, atol=0)


@cases.each_backend
def test_head_priority_edges(backend):
    x = cases.normal(3, 3, 2100, 64, seed=2)
    x[0, 1, 2000, 7] = NAN
    x[1, 2, 0, 0] = -INF
    x[1, 0] = 3.5
    padding = torch.tensor([0, 0, 2100], dtype=torch.int32)
    actual = run(backend, "turbo_head_priority", x, padding)
    assert actual.isnan().tolist() == [[False, True, False], [False, False, True], [False] * 3]
    assert actual[1, 0] == 0
    assert actual[2].tolist() == [0, 0, 0]
    assert_close(actual, run(REFERENCE, "turbo_head_priority", x, padding), rtol=2e-7, atol=0)


# ---- quantize and append


@cases.each_backend
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_quantize_matches_reference(backend, shape):
    k, v = cases.make_qkv(shape)[1:]
    calibration = REFERENCE.ops.turbo_calibrate(k)
    options = {"k_bits": [2], "v_bits": [4], "sink_pages": 1}
    actual = quantize(backend, k, v, *calibration, **options)
    assert_same_store(actual, quantize(REFERENCE, k, v, *calibration, **options))


@cases.each_backend
@each_bits
@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
def test_quantize_matches_reference_at_every_width(backend, bits, head_dim):
    k, v = make_kv(head_dim, 200, kv_heads=2, batch=3)
    options = {"k_bits": bits[0], "v_bits": bits[1]}
    for sink_pages, padding in ((0, None), (2, [0, 7, 200]), (9, [72, 8, 73])):
        left_padding = None if padding is None else torch.tensor(padding, dtype=torch.int32)
        args = (k, v, None, None, left_padding)
        actual = run(backend, "turbo_quantize", *args, sink_pages=sink_pages, **options)
        expected = run(REFERENCE, "turbo_quantize", *args, sink_pages=sink_pages, **options)
        for a, e in zip(actual[:3], expected[:3], strict=True):
            assert_bitwise_equal(a, e, f"pool with {sink_pages} sink pages")
        assert_same_store(cases.store_of(actual), cases.store_of(expected))


@cases.each_backend
@pytest.mark.parametrize("lens", APPENDS, ids=lambda lens: "+".join(map(str, lens)))
@pytest.mark.parametrize("bits", [(8, 2), (4, 4), (2, 8)], ids=str)
def test_append_matches_reference(backend, lens, bits):
    shape = {"kv_heads": 2, "batch": 2}
    options = {"k_bits": bits[0], "v_bits": bits[1]}
    expected = cases.empty_store(2, 2, 64, 10, **options)
    actual = expected.to(backend.device)
    calibration = REFERENCE.ops.turbo_calibrate(make_kv(64, 90, **shape)[0])
    for i, num_new in enumerate(lens):
        k, v = make_kv(64, num_new, seed=i, **shape)
        padding = None if i else torch.tensor([0, min(num_new, 5)], dtype=torch.int32)
        # Smaller first: the scale of the tail has to grow, and codes are clamped.
        args = (k * (1 + i), v * (1 + i), *calibration, padding)
        append(REFERENCE, expected, *args, tail_margin=1.0)
        append(backend, actual, *args, tail_margin=1.0)
        assert_same_store(actual, expected, f" after append {i}")
    for slab in actual.pool:
        assert not slab[0].any(), "a block that no entry names was written"


@cases.each_backend
def test_append_clamps_and_counts(backend):
    store = cases.empty_store(1, 1, 64, 2, device=backend.device)
    k, v = torch.full((2, 1, 1, 1, 64), 2.0)
    append(backend, store, k, v, tail_margin=1.5)
    assert store.tail_scale.tolist() == [[[pytest.approx(3 / 119)]] * 2]
    k[..., :5] = -3.1
    append(backend, store, k, v, tail_margin=1.5)
    assert store.clamp_count.tolist() == [[[5], [0]]]
    k_read, _ = run_dequantize(backend, store, kv_len=2)
    assert_close(k_read[0, 0, 1, :5], torch.full((5,), -3.0), rtol=1e-6, atol=0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([0, 1, 1, 2, 7, 63, 64, 65, 130, 200])),
        st.tuples(st.just("rewind"), st.integers(0, 200)),
        st.tuples(st.just("to a page"), st.integers(0, 3)),
    ),
    min_size=2,
    max_size=8,
)


@cases.each_backend
@given(operations=operations, seed=st.integers(0, 1000), k_bits=st.sampled_from([8, 4, 2]))
@settings(max_examples=40)
def test_any_sequence_of_appends_and_rewinds_matches_reference(backend, operations, seed, k_bits):
    expected = cases.empty_store(2, 1, 64, 30, k_bits=k_bits, v_bits=4)
    actual = expected.to(backend.device)
    generator = torch.Generator().manual_seed(seed)
    for i, (what, amount) in enumerate(operations):
        lens = expected.seq_lens.clone()
        if what == "append":
            k, v = torch.randn(2, 2, 1, amount, 64, generator=generator) * (1 + i % 3)
            padding = torch.randint(0, amount + 1, (2,), generator=generator, dtype=torch.int32)
            padding *= torch.tensor([0, 1], dtype=torch.int32)
            append(REFERENCE, expected, k, v, None, None, padding)
            append(backend, actual, k, v, None, None, padding)
        else:
            dropped = lens.minimum(torch.tensor([amount, amount // 3], dtype=torch.int32))
            new_lens = lens - dropped if what == "rewind" else lens.clamp_max(64 * amount)
            rewind(REFERENCE, expected, new_lens)
            rewind(backend, actual, new_lens)
        assert_same_store(actual, expected, f" after {what} {amount} at {lens.tolist()}")
    for dtype in (torch.float32, torch.float16):
        kv_len = int(expected.seq_lens.max()) + 1
        read = run_dequantize(backend, actual, kv_len=kv_len, right_align=True, dtype=dtype)
        want = run_dequantize(REFERENCE, expected, kv_len=kv_len, right_align=True, dtype=dtype)
        for name, a, e in zip("kv", read, want, strict=True):
            assert_bitwise_equal(a, e, name)


@cases.each_backend
@pytest.mark.parametrize("dropped", [1, 37, 63, 64])
@pytest.mark.parametrize("seq_len", [64, 127, 128, 150])
def test_rewind_of_up_to_a_page_is_exact(backend, dropped, seq_len):
    k, v = make_kv(64, seq_len, kv_heads=2)
    store = cases.empty_store(1, 2, 64, 4, k_bits=2, v_bits=2, device=backend.device)
    kept = seq_len - dropped
    append(backend, store, k, v)
    before = store.to(backend.device)
    rewind(backend, store, torch.tensor([kept], dtype=torch.int32))
    assert store.seq_lens.tolist() == [kept]
    # The reopened page reads what it held in int8, not what its 2-bit codes in the pool stand for.
    page = kept // 64
    if kept % 64:
        slot = store.tail[:, :, :, page % 2].cpu()
        assert_bitwise_equal(slot, before.tail[:, :, :, page % 2].cpu(), "slot")
        error = run_dequantize(backend, store, kv_len=kept)[1][0, :, 64 * page :]
        error = (error - v[0, :, 64 * page : kept]).abs().amax()
        assert error <= 0.51 * v.abs().max() * 1.25 / 119
    for name, tensor in store.named().items():
        if name not in ("seq_lens", "tail"):
            assert_bitwise_equal(tensor.cpu(), before.named()[name].cpu(), name)


# ---- dequantize


@cases.each_backend
@each_bits
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_dequantize_matches_reference(backend, bits, dtype):
    k, v = make_kv(96, 200, kv_heads=2, batch=3)
    k_balance, k_mean = REFERENCE.ops.turbo_calibrate(k)
    padding = torch.tensor([0, 70, 200], dtype=torch.int32)
    options = {"k_bits": bits[0], "v_bits": bits[1]}
    store = quantize(REFERENCE, k, v, k_balance, k_mean, padding, **options)
    there = store.to(backend.device)
    calibrations = ((k_balance, k_mean), (k_balance, None), (None, k_mean), (None, None))
    for (balance, mean), right_align in itertools.product(calibrations, (False, True)):
        scalars = {"kv_len": 203, "right_align": right_align, "dtype": dtype}
        actual = run_dequantize(backend, there, balance, mean, **scalars)
        expected = run_dequantize(REFERENCE, store, balance, mean, **scalars)
        for name, a, e in zip("kv", actual, expected, strict=True):
            assert_bitwise_equal(a, e, name)


@cases.each_backend
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantize_then_dequantize_errs_by_half_a_step(backend, bits):
    k, v = make_kv(128, 256, kv_heads=2)
    k_balance, k_mean = run(backend, "turbo_calibrate", k)
    options = {"k_bits": [bits], "v_bits": [bits], "sink_pages": 0}
    store = quantize(backend, k, v, k_balance, k_mean, **options).to(backend.device)
    read = run_dequantize(backend, store, k_balance, k_mean, kv_len=256)
    balance, mean = k_balance.unsqueeze(2), k_mean.unsqueeze(2)
    levels = 2**bits - 1
    for x, y, factor in ((k - mean, read[0] - mean, balance), (v, read[1], torch.ones(()))):
        pages, error = (z.unflatten(2, (4, 64)) for z in (x / factor, (x - y) / factor))
        scale = pages.abs().amax((3, 4), keepdim=True) / 119
        span = (pages.amax(3, keepdim=True) - pages.amin(3, keepdim=True)) / scale + 1
        # In codes: half of stage 1's, and of stage 2 half a step, or half of what its steps miss.
        allowed = torch.tensor(0.5)
        if bits < 8:
            allowed = 0.5 + ((span / levels).ceil() / 2).clamp_min(-(-levels // 4))
        assert (error.abs() <= 1.001 * scale * allowed).all()
