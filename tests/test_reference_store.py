"""The reference of the store against layouts, codes and scales worked out by hand."""

import math

import pytest
import torch

import cases
from compare import assert_bitwise_equal, assert_close, relative_l2
from kvcore.reference import turbo
from kvcore.reference.turbo import blocks

# ---- bytes


def k_position(bits, token, channel):
    """``k_code_position`` of layout.h, one code at a time."""
    group, lane = divmod(channel, 4)
    if bits == 8:
        return (group * 64 + token) * 4 + lane, 0
    row = channel // 32 * 4 + group % 4
    second = int(group % 8 >= 4)
    if bits == 4:
        return (row * 64 + token) * 4 + lane, 4 * second
    return (row * 32 + token % 32) * 4 + lane, 2 * second + (4 if token >= 32 else 0)


def v_position(bits, token, channel, head_dim):
    """``v_code_position`` of layout.h, one code at a time."""
    group, lane = divmod(token, 4)
    if bits == 8:
        return (group * head_dim + channel) * 4 + lane, 0
    half, chunk = int(group % 8 >= 4), token // 32
    if bits == 4:
        return ((chunk * 4 + group % 4) * head_dim + channel) * 4 + lane, 4 * half
    return (group % 4 * head_dim + channel) * 4 + lane, 2 * half + 4 * chunk


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kv", [0, 1])
def test_packing_puts_every_code_where_the_layout_says(head_dim, bits, kv):
    low = -119 if bits == 8 else 0
    high = 120 if bits == 8 else 2**bits
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(low, high, (2, 64, head_dim), generator=generator, dtype=torch.int32)
    packed = blocks.pack_codes(codes, bits, kv)
    assert packed.shape == (2, 64 * head_dim * bits // 8)
    rows = codes.tolist()
    want = [[0] * packed.shape[1] for _ in rows]
    used = set()
    for token in range(64):
        for channel in range(head_dim):
            if kv == 0:
                place = k_position(bits, token, channel)
            else:
                place = v_position(bits, token, channel, head_dim)
            assert place not in used
            used.add(place)
            byte, shift = place
            for block in range(2):
                want[block][byte] |= (rows[block][token][channel] & (2**bits - 1)) << shift
    assert len(used) * bits == 8 * packed.shape[1]
    assert packed.tolist() == want
    assert_bitwise_equal(blocks.unpack_codes(packed, bits, head_dim, kv), codes)


def test_block_bytes_of_every_width():
    assert [blocks.block_bytes(bits, 128) for bits in (8, 4, 2)] == [8256, 4416, 2368]
    assert [blocks.code_offset(bits, 96) for bits in (8, 4, 2)] == [64, 256, 256]
    with pytest.raises(ValueError, match=r"bytes of a row must be one of .*, got 100"):
        blocks.slab_bits(100, 64)


def test_a_block_holds_scale_page_steps_and_zeros_in_this_order():
    codes = cases.normal(1, 64, 64, seed=0).mul(40).round().clamp(-119, 119).int()
    block = blocks.pack_blocks(codes, torch.tensor([0.375]), 4, 0)[0]
    assert block[:4].tolist() == [0, 0, 0xC0, 0x3E]
    assert not block[4:64].any()
    narrow, step, zero = blocks.stage2(codes, 4)
    assert block[64:128].tolist() == step[0].tolist()
    assert [b - 256 * (b > 127) for b in block[128:192].tolist()] == zero[0].tolist()
    tail = blocks.pack_blocks(codes, torch.tensor([math.nan]), 8, 1, page_idx=258)[0]
    assert tail[:8].tolist() == [0, 0, 0xC0, 0x7F, 2, 1, 0, 0]
    assert int(blocks.block_page(tail)) == 258
    assert narrow.min() == 0
    assert narrow.max() == 15


# ---- stages 1 and 2


def test_stage1_by_hand():
    x = torch.zeros(64, 64)
    x[0, :5] = torch.tensor([238.0, 3.0, -3.0, 1.0, -237.0])
    codes, scale = blocks.stage1(x)
    # The scale is 2; ties go to even: 1.5 to 2, 0.5 to 0, -118.5 to -118.
    assert scale.item() == 2.0
    assert codes[0, :6].tolist() == [119, 2, -2, 0, -118, 0]


def test_stage1_edges():
    codes, scale = blocks.stage1(torch.zeros(2, 64, 64))
    assert not codes.any()
    assert scale.tolist() == [2.0**-126] * 2
    x = cases.normal(3, 64, 64, seed=0)
    x[0, 5, 6], x[1, 5, 6] = math.nan, math.inf
    codes, scale = blocks.stage1(x)
    assert scale.isnan().tolist() == [True, True, False]
    assert not codes[:2].any()
    tiny, _ = blocks.stage1(torch.full((64, 64), 2.0**-140))
    assert not tiny.any()


def column(values):
    """A block whose channel 0 holds ``values`` and then repeats the first."""
    codes = torch.full((1, 64, 64), values[0], dtype=torch.int32)
    codes[0, : len(values), 0] = torch.tensor(values, dtype=torch.int32)
    return codes


@pytest.mark.parametrize(
    ("values", "bits", "step", "zero", "narrow"),
    [
        # A constant channel: step 1, all codes 0.
        ([7, 7, 7], 4, 1, 7, [0, 0, 0]),
        # range 30 over 15 levels is exactly 2; 15 / 2 = 7.5 goes to the even 8.
        ([-10, 20, 5], 4, 2, -10, [0, 15, 8]),
        # range 7 over 3: rint gives 2 (levels reach 6), ceil 3. Errors with 2: 7 -> 6: 1, 3 -> 4
        # (1.5 to even): 1, sum 2. With 3: 7 -> 6: 1, 3 -> 3: 0, sum 1. Ceil wins.
        ([0, 7, 3], 2, 3, 0, [0, 2, 1]),
        # range 7 again. With 2: 7 -> 6: 1, 2, 4 exact, sum 1. With 3: 7 -> 6: 1, 2 -> 3, 4 -> 3.
        ([0, 7, 2, 4], 2, 2, 0, [0, 3, 1, 2]),
        # range 4 over 3: steps 1 and 2. With 1: 4 -> 3: 1. With 2: 1 -> 0 (0.5 to even): 1. A tie.
        ([0, 4, 1], 2, 1, 0, [0, 3, 1]),
        # range 37 over 15: rint gives 2, which leaves 7 codes out, 4 below (3.5 to even) and 3
        # above: 0 -> 4, 37 -> 34, sum 25. With 3: 20 -> 21, 61 times. Rint wins.
        ([20, 0, 37, 10], 4, 2, 4, [8, 0, 15, 3]),
        # range 35: 5 are left out, 2 below (2.5 to even) and 3 above.
        ([22, 0, 35, 12], 4, 2, 2, [10, 0, 15, 5]),
        # The full range: 238 / 15 = 15.87, both steps 16: 119 -> 121 - 238 / 16 = 14.875 -> 15.
        ([-119, 119], 4, 16, -119, [0, 15]),
        # 238 / 3 = 79.33: steps 79 (119 -> 118) and 80 (119 -> 121).
        ([-119, 119], 2, 79, -119, [0, 3]),
        # range 60: 20 errs by 5 62 times, 1550. Of 18 (20 * 7 / 8 = 17.5) 6 are left out, zero 3:
        # by 4 62 times, and 9 + 9 for the ends, 1010.
        ([25, 35] * 31 + [0, 60], 2, 18, 3, [1, 2] * 31 + [0, 3]),
    ],
)
def test_stage2_by_hand(values, bits, step, zero, narrow):
    got_narrow, got_step, got_zero = blocks.stage2(column(values), bits)
    assert got_step[0, 0] == step
    assert got_zero[0, 0] == zero
    assert got_narrow[0, : len(narrow), 0].tolist() == narrow


@pytest.mark.parametrize("bits", [4, 2])
def test_stage2_of_all_ranges_fits_and_errs_by_half_a_step(bits):
    levels = 2**bits - 1
    spans = torch.arange(239, dtype=torch.int32)
    # Channel c of block n runs from -119 to -119 + n in even strides.
    codes = (torch.linspace(0, 1, 64).view(1, 64, 1) * spans.view(-1, 1, 1)).round().int() - 119
    codes = codes.expand(-1, -1, 64)
    narrow, step, zero = blocks.stage2(codes, bits)
    assert narrow.min() >= 0
    assert narrow.max() <= levels
    assert step.min() >= 1
    assert step.max() <= 255
    rebuilt = blocks.widen(narrow, step, zero)
    assert rebuilt.min() >= -128
    assert rebuilt.max() <= 127
    # Half a step, or half of what the steps fall short of the range when rint rounded down.
    short = (spans.view(-1, 1) - levels * step).clamp_min(0)
    bound = torch.maximum(step / 2, (short / 2).ceil())
    assert ((rebuilt - codes).abs().amax(1) <= bound).all()


@pytest.mark.parametrize(("bits", "drift", "squared"), [(4, 0.01, 0.0083), (2, 0.02, 0.156)])
def test_stage2_has_no_drift(bits, drift, squared):
    """Attention over many tokens averages errors away, but not their mean."""
    codes, _ = blocks.stage1(cases.normal(1000, 64, 64, seed=0))
    errors = (blocks.widen(*blocks.stage2(codes, bits)) - codes).float()
    assert errors.mean().abs() < drift  # 4 bit: 0.033 when all is clipped at the top
    # 2 bit: 0.20 by steps that reach across the range.
    assert errors.square().mean() / codes.float().square().mean() < squared


# ---- calibration


def test_calibration_by_hand():
    k = torch.zeros(1, 1, 4, 64)
    k[0, 0, :, 0] = torch.tensor([1.0, 3.0, 5.0, 7.0])  # mean 4, amax 3
    k[0, 0, :, 32] = torch.tensor([-48.0, 48.0, 0.0, 0.0])  # mean 0, amax 48, pair of channel 0
    k[0, 0, :, 1] = torch.tensor([2.0, 4.0, 3.0, 3.0])  # mean 3, amax 1
    k[0, 0, :, 5] = torch.tensor([3.0, -3.0, 0.0, 0.0])  # amax 3 = 48 / 16
    k_balance, k_mean = turbo.turbo_calibrate(k)
    assert k_mean[0, 0, [0, 1, 2, 32]].tolist() == [4.0, 3.0, 0.0, 0.0]
    assert k_balance[0, 0, [0, 32]].tolist() == [1.0, 1.0]
    assert k_balance[0, 0, [5, 37]].tolist() == [0.125, 0.125]  # 16 ** -0.75
    assert k_balance[0, 0, 2].item() == 2.0**-8
    unpaired, _ = turbo.turbo_calibrate(k, rotary_dim=0)
    assert unpaired[0, 0, [0, 5, 32, 37]].tolist() == [0.125, 0.125, 1.0, 2.0**-8]
    partly, _ = turbo.turbo_calibrate(k, rotary_dim=32)
    assert partly[0, 0, [0, 16, 32]].tolist() == [0.125, 0.125, 1.0]
    ones, zeros = turbo.turbo_calibrate(k, balance=False, subtract_mean=False)
    assert ones.eq(1).all()
    assert zeros.eq(0).all()


def test_calibration_leaves_padding_and_non_finite_values_out():
    k = cases.normal(2, 2, 150, 64, seed=0)
    padded = k.clone()
    padded[1, :, :70] = 1e6
    got = turbo.turbo_calibrate(padded, torch.tensor([0, 70], dtype=torch.int32))
    want = turbo.turbo_calibrate(k[1:, :, 70:])
    for a, b in zip(got, want, strict=True):
        assert_bitwise_equal(a[1:], b)
    exact = k[1:, :, 70:].double().mean(2)
    assert_close(got[1][1:].double(), exact, rtol=1e-6, atol=1e-9)
    k[0, 0, 3, 9] = math.nan
    k_balance, k_mean = turbo.turbo_calibrate(k)
    assert k_balance.isfinite().all()
    assert k_mean[0, 0, 9] == 0
    empty = turbo.turbo_calibrate(k, torch.tensor([150, 0]))
    assert empty[0][0].eq(1).all()
    assert empty[1][0].eq(0).all()


def test_head_priority_by_hand():
    x = torch.zeros(1, 2, 2, 64)
    x[0, 0, :, 0] = torch.tensor([-1.0, 3.0])
    x[0, 1, :, :32] = torch.tensor([[-2.0], [2.0]])
    # Head 0: gaps are 4 once and 0 63 times; head 1: 4 and 0 in halves, so std is 2.
    want = torch.tensor([[4 * 4 * math.sqrt(63) / 64, 4 * 2.0]])
    assert_close(turbo.turbo_head_priority(x), want, rtol=1e-6, atol=0)
    x[0, 1, 0, 3] = math.inf
    assert turbo.turbo_head_priority(x).isnan().tolist() == [[False, True]]
    assert turbo.turbo_head_priority(x, torch.tensor([2])).tolist() == [[0.0, 0.0]]


# ---- the store


def make_store(k, v, calibration=(None, None), padding=None, **widths):
    return cases.store_of(turbo.turbo_quantize(k, v, *calibration, padding, **widths))


def test_quantize_lays_out_table_and_slabs():
    _, k, v = cases.make_qkv(cases.Shape(64, 200, kv_heads=2, batch=2))
    padding = torch.tensor([0, 100], dtype=torch.int32)
    store = make_store(k, v, padding=padding, k_bits=[4, 2], v_bits=[2], sink_pages=1)
    assert store.seq_lens.tolist() == [200, 100]
    # Sequence 0 has pages 8 | w | w, sequence 1 one page of 8 bit; slabs are 8, 4, 2 bit.
    slab = store.block_table >> 21
    row = store.block_table & (2**21 - 1)
    none = -1
    assert slab[0].tolist() == [[[0, 1, 1], [0, 2, 2]], [[0, 2, 2], [0, 2, 2]]]
    assert store.block_table[1].tolist() == [
        [[4, none, none], [5, none, none]],
        [[6, none, none], [7, none, none]],
    ]
    assert row[0].tolist() == [[[0, 0, 1], [1, 0, 1]], [[2, 2, 3], [3, 4, 5]]]
    assert [len(s) for s in store.pool] == [8, 2, 6]
    # Slot 0 of sequence 0 holds page 2, its last but one, and slot 1 the open page 3.
    assert blocks.block_page(store.tail)[0, 0, 0].tolist() == [2, 3]
    assert blocks.block_page(store.tail)[1, 0, 0].tolist() == [0, 1]


@cases.each_append
def test_appended_tokens_are_kept_to_half_a_step(lens):
    """However tokens arrive, none is lost, moved or quantized with a scale above the tail's."""
    total = sum(lens)
    _, k, v = cases.make_qkv(cases.Shape(64, total, kv_heads=2))
    store = cases.empty_store(1, 2, 64, total // 64, k_bits=8, v_bits=8)
    begin = 0
    for n in lens:
        new = slice(begin, begin + n)
        turbo.turbo_append(k[:, :, new], v[:, :, new], *store.writable, tail_margin=4.0)
        begin += n
    assert store.seq_lens.tolist() == [total]
    assert not store.clamp_count.any()
    assert not any(slab[0].any() for slab in store.pool)
    got = turbo.turbo_dequantize(*store.readable, kv_len=total)
    for i, (x, y) in enumerate(zip(got, (k, v), strict=True)):
        bound = store.tail_scale[:, i, :, None, None] * 0.501
        assert ((x - y).abs() <= bound).all()


def test_append_by_hand():
    """One head, all channels equal: scales and clamping can be followed on paper."""
    store = cases.empty_store(1, 1, 64, 1, k_bits=8, v_bits=8)

    def append(*values):
        x = torch.tensor(values).view(1, 1, -1, 1).expand(1, 1, len(values), 64)
        turbo.turbo_append(x, 2 * x, *store.writable, tail_margin=2.0)

    append(119.0, -60.0)
    assert store.tail_scale.flatten().tolist() == [2.0, 4.0]
    append(300.0, -238.0, 240.0)  # the open block keeps its scale 2: codes 150, -119, 120
    assert store.clamp_count.flatten().tolist() == [2 * 64, 2 * 64]
    assert store.tail_scale[0, 0, 0].item() == torch.tensor(300.0).div(119).mul(2).item()
    k, v = turbo.turbo_dequantize(*store.readable, kv_len=5)
    assert k[0, 0, :, 0].tolist() == [120.0, -60.0, 238.0, -238.0, 238.0]
    assert v[0, 0, :, 0].tolist() == [240.0, -120.0, 476.0, -476.0, 476.0]
    append(*[0.0] * 59)
    assert store.seq_lens.item() == 64
    slab, row = int(store.block_table[0, 0, 0, 0]) >> 21, int(store.block_table[0, 0, 0, 0])
    assert_bitwise_equal(store.pool[slab][row, 64:], store.tail[0, 0, 0, 0, 64:])
    append(1.0)  # a new page opens with the grown scale
    k, _ = turbo.turbo_dequantize(*store.readable, kv_len=65)
    assert k[0, 0, 64, 0].item() == 0.0
    assert blocks.block_page(store.tail)[0, 0, 0].tolist() == [0, 1]


def test_non_finite_values_poison_their_page_alone():
    _, k, v = cases.make_qkv(cases.Shape(64, 150, kv_heads=2))
    k[0, 0, 70, 5], v[0, 1, 140, 9] = math.nan, math.inf
    store = make_store(k, v)
    got_k, got_v = turbo.turbo_dequantize(*store.readable, kv_len=150)
    bad = got_k.isnan().all(-1)
    assert bad.nonzero().tolist() == [[0, 0, t] for t in range(64, 128)]
    assert got_k.isnan().any(-1).equal(bad)
    bad = got_v.isnan().all(-1)
    assert bad.nonzero().tolist() == [[0, 1, t] for t in range(128, 150)]
    # Tokens before the bad one keep their codes, later ones get none.
    codes, scale = blocks.unpack_blocks(store.tail[0, 1, 1, :1], 64, 1)
    assert scale.isnan().all()
    assert codes[0, 11].any()
    assert codes[0, 12].any()
    assert codes[0, 12, 9] == 0
    assert not codes[0, 13:].any()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rewind_is_exact_inside_the_tail(bits):
    """Dropping up to 64 tokens and appending them again gives the same bytes."""
    _, k, v = cases.make_qkv(cases.Shape(64, 300, kv_heads=2))
    for seq_len, dropped in ((300, 30), (300, 64), (256, 1), (256, 64), (257, 2), (130, 64)):
        store = cases.empty_store(1, 2, 64, 4, k_bits=bits, v_bits=bits)
        for begin, end in ((0, 50), (50, seq_len - dropped), (seq_len - dropped, seq_len)):
            turbo.turbo_append(k[:, :, begin:end], v[:, :, begin:end], *store.writable)
        before = store.to("cpu")
        new_lens = torch.tensor([seq_len - dropped], dtype=torch.int32)
        turbo.turbo_rewind(*store.readable, new_lens)
        assert store.seq_lens.tolist() == new_lens.tolist()
        begin = seq_len - dropped
        turbo.turbo_append(k[:, :, begin:seq_len], v[:, :, begin:seq_len], *store.writable)
        want = turbo.turbo_dequantize(*before.readable, kv_len=seq_len)
        got = turbo.turbo_dequantize(*store.readable, kv_len=seq_len)
        for a, b in zip(got, want, strict=True):
            assert_bitwise_equal(a, b)


def test_deep_rewind_keeps_what_decode_would_have_read():
    _, k, v = cases.make_qkv(cases.Shape(64, 400, kv_heads=2, batch=2))
    store = make_store(k, v, k_bits=[4], v_bits=[2])
    want = turbo.turbo_dequantize(*store.readable, kv_len=400)
    turbo.turbo_rewind(*store.readable, torch.tensor([150, 128], dtype=torch.int32))
    got = turbo.turbo_dequantize(*store.readable, kv_len=150)
    for a, b in zip(got, want, strict=True):
        assert_bitwise_equal(a[0], b[0, :, :150])
        assert_bitwise_equal(a[1, :, :128], b[1, :, :128])
        assert not a[1, :, 128:].any()


def test_dequantize_aligns_right():
    _, k, v = cases.make_qkv(cases.Shape(64, 100, kv_heads=1, batch=2, dtype=torch.bfloat16))
    padding = torch.tensor([0, 70], dtype=torch.int32)
    store = make_store(k, v, padding=padding, k_bits=[8], v_bits=[8])
    got = turbo.turbo_dequantize(*store.readable, kv_len=110, right_align=True, dtype=torch.half)
    for x, y in zip(got, (k, v), strict=True):
        assert x.dtype == torch.half
        assert not x[0, :, :10].any()
        assert not x[1, :, :80].any()
        assert relative_l2(x[0, :, 10:], y[0]) < 0.02
        assert relative_l2(x[1, :, 80:], y[1, :, 70:]) < 0.02
