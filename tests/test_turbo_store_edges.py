"""The store at its edges: non-finite values, strides, empty shapes, poisoned memory, threads."""

import itertools
import math

import pytest
import torch

import cases
from cases import CPU, LAYOUTS, REFERENCE
from compare import assert_bitwise_equal
from kvcore.reference.turbo import blocks
from stores import (
    append,
    assert_same_store,
    make_kv,
    on,
    quantize,
    run,
    run_dequantize,
)

pytestmark = [pytest.mark.isa, pytest.mark.asan]

NAN, INF = math.nan, math.inf


# ---- non-finite values


@cases.each_backend
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("position", [0, 63, 64, 150, 191, 192, 199])
@pytest.mark.parametrize("calls", [(200,), (70, 130), (20, 1, 179), (199, 1)], ids=str)
def test_a_non_finite_value_poisons_its_block_alone(backend, value, position, calls):
    k, v = make_kv(64, 200, kv_heads=2)
    k[0, 1, position, 9] = value
    v[0, 0, position, 63] = value
    stores = []
    for where in (backend, REFERENCE):
        store = cases.empty_store(1, 2, 64, 4, device=where.device)
        first = 0
        for num_new in calls:
            new = slice(first, first + num_new)
            append(where, store, k[:, :, new], v[:, :, new])
            first += num_new
        stores.append(store)
    assert_same_store(*stores)
    assert stores[0].tail_scale.isfinite().all()

    page = position // 64
    for x, head in zip(run_dequantize(backend, stores[0], kv_len=200), (1, 0), strict=True):
        poisoned = torch.zeros(2, 200, dtype=torch.bool)
        poisoned[head, 64 * page : 64 * (page + 1)] = True
        assert torch.equal(x[0].isnan().all(-1), poisoned)
        assert torch.equal(x[0].isnan().any(-1), poisoned)
    held = [s for s in range(2) if blocks.block_page(stores[0].tail.cpu())[0, 0, 1, s] == page]
    for slot in held:  # the bits are fixed, so that stores can be compared
        assert stores[0].tail[0, 0, 1, slot, :4].tolist() == [0, 0, 0xC0, 0x7F]


@cases.each_backend
def test_tokens_before_and_after_a_poisoned_one_in_the_tail(backend):
    k, v = make_kv(64, 6)
    k[0, 0, 2, 5] = NAN
    store = cases.empty_store(1, 1, 64, 1, device=backend.device)
    append(backend, store, k, v)
    codes, scale = blocks.unpack_blocks(store.tail[:, 0, 0, 0].cpu(), 64, 0)
    nonzero = (codes[0] != 0).any(-1)
    assert scale.isnan().all()
    assert nonzero[:6].tolist() == [True, True, True, False, False, False]
    assert codes[0, 2, 5] == 0


@cases.each_backend
def test_large_and_small_values(backend):
    k, v = make_kv(64, 130, kv_heads=5)
    for x in (k, v):
        x[:, 0] = 0
        x[:, 1] *= 1e-42  # subnormal: the scale stops at the smallest normal
        x[:, 2] *= 1e-37
        x[:, 3] = 3.4e38 * x[:, 3].sign()
        x[:, 4, 7] = 0
    actual, expected = quantize(backend, k, v), quantize(REFERENCE, k, v)
    assert_same_store(actual, expected)
    assert expected.tail_scale[0, 0, 0] == 2.0**-126 * 1.25


@cases.each_backend
@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
def test_quotients_next_to_ties_round_like_a_division(backend, head_dim):
    """Values whose quotient by the scale is a half-integer, or one rounding away from it."""
    amax = torch.tensor([119.0, 1.7, 3e-3, 4.1e7]).view(1, 4, 1, 1)
    scale = blocks.stage1_scale(amax)
    ties = torch.arange(64 * head_dim).remainder(238).sub(119).add(0.5).view(1, 1, 64, head_dim)
    x = (ties * scale).clamp(-amax, amax)
    up, down = torch.tensor(INF), torch.tensor(-INF)
    x = torch.cat([x, x.nextafter(up), x.nextafter(down), x.nextafter(up).nextafter(up)], 2)
    x = x.clamp(-amax, amax)
    x[:, :, ::64, 0] = amax.squeeze(-1)
    actual = quantize(backend, x, x, k_bits=[8], v_bits=[2])
    assert_same_store(actual, quantize(REFERENCE, x, x, k_bits=[8], v_bits=[2]))


@cases.each_backend
@pytest.mark.parametrize("bits", [4, 2])
def test_stage_2_of_every_range(backend, bits):
    """A page of codes for every difference of two codes, with values that lie on ties."""
    # With 119 in every page the scale is 1 and the values are the codes.
    ranges = torch.arange(239)
    low = -(ranges // 2)
    token = torch.arange(64).view(-1, 1)
    x = (low + token * ranges.view(1, -1) // 63).float()
    x = torch.cat([x, torch.full((64, 256 - 239), 119.0)], 1)
    x = torch.stack([x, x.flip(0), (x / 2).round(), -x]).unsqueeze(0)
    options = {"k_bits": [bits], "v_bits": [bits], "sink_pages": 0}
    assert_same_store(quantize(backend, x, -x, **options), quantize(REFERENCE, x, -x, **options))


# ---- shapes and strides


@cases.each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_noncontiguous(backend, layout, dtype):
    k, v = make_kv(96, 150, kv_heads=2, batch=2, dtype=dtype, layout=layout)
    k, v = (cases.with_layout(x, layout) for x in (k, v))
    plain_k, plain_v = k.contiguous(), v.contiguous()
    calibration = run(backend, "turbo_calibrate", k)
    for a, e in zip(calibration, run(backend, "turbo_calibrate", plain_k), strict=True):
        assert_bitwise_equal(a, e, "calibration")
    assert_bitwise_equal(*(run(backend, "turbo_head_priority", x) for x in (v, plain_v)))
    strided, plain = (cases.empty_store(2, 2, 96, 6, device=backend.device) for _ in range(2))
    for new in (slice(0, 140), slice(140, 141), slice(141, 150)):
        append(backend, strided, k[:, :, new], v[:, :, new], *calibration)
        append(backend, plain, plain_k[:, :, new], plain_v[:, :, new], *calibration)
    assert_same_store(strided, plain)
    actual = quantize(backend, k, v, *calibration)
    assert_same_store(actual, quantize(backend, plain_k, plain_v, *calibration))


@cases.each_backend
@pytest.mark.parametrize("sizes", [(0, 2, 70), (2, 0, 70), (2, 2, 0), (1, 1, 1)], ids=str)
def test_empty_and_odd_shapes(backend, sizes):
    batch, kv_heads, kv_len = sizes
    k, v = torch.zeros(2, batch, kv_heads, kv_len, 64)
    for a, e in zip(
        run(backend, "turbo_calibrate", k), run(REFERENCE, "turbo_calibrate", k), strict=True
    ):
        assert_bitwise_equal(a, e)
    priority = run(backend, "turbo_head_priority", k)
    assert_bitwise_equal(priority, torch.zeros(batch, kv_heads))
    actual = run(backend, "turbo_quantize", k, v)
    for a, e in zip(actual, run(REFERENCE, "turbo_quantize", k, v), strict=True):
        assert_bitwise_equal(a, e)
    store = cases.store_of(actual).to(backend.device)
    empty = torch.zeros(batch, kv_heads, 0, 64)
    append(backend, store, empty, empty)
    backend.ops.turbo_rewind(*store.readable, torch.zeros_like(store.seq_lens))
    assert store.seq_lens.tolist() == [0] * batch
    for x in run_dequantize(backend, store, kv_len=3):
        assert_bitwise_equal(x, torch.zeros(batch, kv_heads, 3, 64))


@cases.each_backend
def test_left_padding_is_as_if_it_were_not_there(backend):
    k, v = make_kv(64, 300, kv_heads=2, batch=3)
    padding = torch.tensor([0, 129, 300], dtype=torch.int32)
    for b, left in enumerate(padding.tolist()):
        k[b, :, :left], v[b, :, :left] = NAN, INF
    calibration = run(backend, "turbo_calibrate", k, padding)
    store = cases.empty_store(3, 2, 64, 5, device=backend.device)
    append(backend, store, k, v, *calibration, padding)
    read = run_dequantize(backend, store, *calibration, kv_len=300, right_align=True)
    for b, left in enumerate(padding.tolist()):
        one = slice(b, b + 1)
        alone = run(backend, "turbo_calibrate", k[one, :, left:])
        alone_store = cases.empty_store(1, 2, 64, 5, device=backend.device)
        append(backend, alone_store, k[one, :, left:], v[one, :, left:], *alone)
        lengths = {"kv_len": 300, "right_align": True}
        alone_read = run_dequantize(backend, alone_store, *alone, **lengths)
        for a, e in zip(calibration, alone, strict=True):
            assert_bitwise_equal(a[one], e)
        assert_bitwise_equal(store.tail[one].cpu(), alone_store.tail.cpu(), "tail")
        for a, e in zip(read, alone_read, strict=True):
            assert_bitwise_equal(a[one], e)
            assert not a[b, :, :left].any()


@cases.each_backend
def test_the_open_tail_needs_no_entry_in_the_table(backend):
    k, v = make_kv(64, 127, kv_heads=1)
    store = cases.empty_store(1, 1, 64, 1, device=backend.device)
    append(backend, store, k, v)
    assert store.seq_lens.tolist() == [127]
    k_read, _ = run_dequantize(backend, store, kv_len=127)
    assert (k_read - k).abs().max() < 0.1


@cases.each_backend
def test_slabs_of_one_width_and_empty_slabs(backend):
    """Any number of slabs, entries in any of them."""
    k, v = make_kv(64, 256, kv_heads=1)
    want = quantize(backend, k, v, k_bits=[4], v_bits=[4], sink_pages=0)
    slabs = [torch.zeros(rows, blocks.block_bytes(4, 64)).byte() for rows in (3, 0, 1, 6)]
    slabs = on(backend.device, *slabs)
    places = [(0, 2), (3, 5), (2, 0), (0, 0), (3, 0), (3, 1), (3, 2), (0, 1)]
    entries = torch.tensor([slab << 21 | row for slab, row in places], dtype=torch.int32)
    store = cases.empty_store(1, 1, 64, 4, device=backend.device)
    store.pool, store.block_table = slabs, entries.view(1, 2, 1, 4).to(backend.device)
    append(backend, store, k, v)
    for i, (slab, row) in enumerate(places):
        assert_bitwise_equal(slabs[slab][row].cpu(), want.pool[0][i], f"page {i}")


# ---- memory and threads


@cases.each_backend
def test_poisoned_output(backend, poisoned_memory):
    k, v = make_kv(64, 200, kv_heads=2, batch=2)
    padding = torch.tensor([0, 90], dtype=torch.int32)
    calibration = run(backend, "turbo_calibrate", k, padding)
    for a, e in zip(calibration, run(REFERENCE, "turbo_calibrate", k, padding), strict=True):
        assert_bitwise_equal(a, e)
    assert run(backend, "turbo_head_priority", v, padding).isfinite().all()
    options = {"k_bits": [4, 2], "v_bits": [2, 4]}
    store = quantize(backend, k, v, *calibration, padding, **options)
    assert_same_store(store, quantize(REFERENCE, k, v, *calibration, padding, **options))
    lengths = {"kv_len": 205, "right_align": True}
    read = run_dequantize(backend, store.to(backend.device), *calibration, **lengths)
    for a, e in zip(read, run_dequantize(REFERENCE, store, *calibration, **lengths), strict=True):
        assert_bitwise_equal(a, e)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_deterministic(threads):
    """Bitwise the same whatever the number of threads; the shape has work for all of them."""
    k, v = make_kv(64, 1500, kv_heads=3, batch=2)
    padding = torch.tensor([0, 333], dtype=torch.int32)
    reference = run(REFERENCE, "turbo_calibrate", k, padding)
    expected = quantize(REFERENCE, k, v, *reference, padding)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            calibration = run(CPU, "turbo_calibrate", k, padding)
            for a, e in zip(calibration, reference, strict=True):
                assert_bitwise_equal(a, e)
            store = quantize(CPU, k, v, *calibration, padding)
            assert_same_store(store, expected)
            read = run_dequantize(CPU, store, *calibration, kv_len=1500)
    finally:
        torch.set_num_threads(before)
    for a, e in zip(
        read, run_dequantize(REFERENCE, expected, *reference, kv_len=1500), strict=True
    ):
        assert_bitwise_equal(a, e)


@pytest.mark.parametrize("backend", cases.BACKENDS[1:])
@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
def test_backends_agree(backend, head_dim):
    k, v = make_kv(head_dim, 330, kv_heads=2, batch=2, dtype=torch.bfloat16)
    calibration = run(CPU, "turbo_calibrate", k)
    for a, e in zip(run(backend, "turbo_calibrate", k), calibration, strict=True):
        assert_bitwise_equal(a, e)
    widths = itertools.product((8, 4, 2), repeat=2)
    for k_bits, v_bits in widths:
        options = {"k_bits": [k_bits], "v_bits": [v_bits]}
        actual = quantize(backend, k, v, *calibration, **options)
        assert_same_store(actual, quantize(CPU, k, v, *calibration, **options))
