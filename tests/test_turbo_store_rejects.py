"""Every rejection of the store's ops, with its exact text; a rejected call changes nothing."""

import math

import pytest
import torch

import cases
from compare import assert_bitwise_equal

pytestmark = pytest.mark.asan

NAN, INF = math.nan, math.inf
INT_MAX = 2**31 - 1
FLOATS = "float32, float16 or bfloat16"
HEAD_DIMS = "one of 64, 96, 128, 256"
ROWS = "[*, 4160], [*, 2240] or [*, 1216]"
TAILS = "[batch, 2, kv_heads, 2, bytes] with bytes one of 4160, 6208, 8256, 16448"
MARGIN = "tail_margin must be finite and at least 1, got"
ROTARY = "rotary_dim must be -1 or an even number in [0, 64], got"
BLOCKS = "of at most 2097152 pages of"
DISTINCT = "block_table must be distinct entries for the pages that become full, got"
ENTRY = "must be the entry of a block of pool, got"


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def of(*shape, dtype=torch.float32):
    """A tensor of any size that takes the memory of one element."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def kv(*shape, **others):
    """k and v of one shape, plain and without padding."""
    plain = {"k_balance": None, "k_mean": None, "left_padding": None}
    return {"k": of(*shape), "v": of(*shape), **plain, **others}


def arguments(op):
    """A valid call: of the store, with 2 sequences of 130 and 70 tokens, 2 heads, 4 pages."""
    x = cases.normal(2, 2, 70, 64, seed=1)
    padding = {"left_padding": i32(0, 70)}
    if op == "calibrate":
        return {"k": x, **padding}
    if op == "head_priority":
        return {"x": x, **padding}
    if op == "quantize":
        balance = torch.ones(2, 2, 64)
        return {"k": x, "v": x.clone(), "k_balance": balance, "k_mean": balance, **padding}
    store = cases.empty_store(2, 2, 64, 4)
    k, v = cases.normal(2, 2, 2, 130, 64, seed=0)
    torch.ops.kvcore.turbo_append(k, v, *store.writable, None, None, i32(0, 60))
    result = {name: getattr(store, name) for name in ("pool", "block_table", "tail", "seq_lens")}
    if op == "rewind":
        return {**result, "new_lens": i32(5, 70)}
    if op == "dequantize":
        return {**result, "kv_len": 130}
    result |= {"tail_scale": store.tail_scale, "clamp_count": store.clamp_count}
    return {**result, "k": x, "v": x.clone(), **padding}


# Changes to a valid call, and what the error says after the op's name. A key that is a tuple
# is a position in block_table; the call of append fills page 2 of sequence 0.
CASES = {
    "calibrate": [
        ({"k": of(2, 70, 64)}, "k must be 4-dimensional, got [2, 70, 64]"),
        ({"k": of(2, 2, 70, 80)}, f"head_dim must be {HEAD_DIMS}, got 80"),
        ({"k": of(2, 2, 70, 0)}, f"head_dim must be {HEAD_DIMS}, got 0"),
        ({"k": of(2, 2, 70, 64).double()}, f"k must be {FLOATS}, got float64"),
        ({"k": of(2, 2, 70, 64).int()}, f"k must be {FLOATS}, got int32"),
        ({"left_padding": i32(0, 71)}, "left_padding[1] must be in [0, 70], got 71"),
        ({"left_padding": i32(-1, 0)}, "left_padding[0] must be in [0, 70], got -1"),
        ({"left_padding": i32(INT_MAX, 0)}, f"left_padding[0] must be in [0, 70], got {INT_MAX}"),
        ({"left_padding": i32(0)}, "left_padding must be [2], got [1]"),
        ({"left_padding": of(2)}, "left_padding must be int32, got float32"),
        ({"left_padding": of(2).long()}, "left_padding must be int32, got int64"),
        ({"left_padding": i32(0, 0, 0)[::2]}, "left_padding must be contiguous, got strides [2]"),
        ({"rotary_dim": 66}, f"{ROTARY} 66"),
        ({"rotary_dim": 31}, f"{ROTARY} 31"),
        ({"rotary_dim": -2}, f"{ROTARY} -2"),
    ],
    "head_priority": [
        ({"x": of(64)}, "x must be 4-dimensional, got [64]"),
        ({"x": of(2, 2, 70, 65)}, f"head_dim must be {HEAD_DIMS}, got 65"),
        ({"left_padding": i32(71, 0)}, "left_padding[0] must be in [0, 70], got 71"),
    ],
    "quantize": [
        ({"k": of(2, 2, 70, 63)}, f"head_dim must be {HEAD_DIMS}, got 63"),
        ({"v": of(2, 2, 71, 64)}, "v must be [2, 2, 70, 64], got [2, 2, 71, 64]"),
        ({"v": of(2, 2, 70, 64).half()}, "v must be float32 like k, got float16"),
        ({"k_balance": of(2, 2, 65)}, "k_balance must be [2, 2, 64], got [2, 2, 65]"),
        ({"k_mean": of(2, 2, 64).double()}, "k_mean must be float32, got float64"),
        ({"k_mean": of(2, 2, 64)}, "k_mean must be contiguous, got strides [0, 0, 0]"),
        ({"k_bits": [4, 4, 4]}, "k_bits must be 1 or 2 widths, got 3"),
        ({"v_bits": []}, "v_bits must be 1 or 2 widths, got 0"),
        ({"k_bits": [4, 3]}, "k_bits[1] must be one of 8, 4, 2, got 3"),
        ({"v_bits": [2**40]}, f"v_bits[0] must be one of 8, 4, 2, got {2**40}"),
        ({"sink_pages": -1}, "sink_pages must be at least 0, got -1"),
        ({"tail_margin": 0.99}, f"{MARGIN} 0.99"),
        ({"tail_margin": NAN}, f"{MARGIN} nan"),
        ({"tail_margin": 1e39}, f"{MARGIN} 1e+39"),
        ({"left_padding": i32(0, -5)}, "left_padding[1] must be in [0, 70], got -5"),
        (kv(2, 2, 2**31, 64), f"k must be at most {INT_MAX} tokens, got {2**31}"),
        (kv(2, 2, 2**31 - 1, 64, k_bits=[2]), f"k must be {BLOCKS} 4 bit, got 134217720"),
        (kv(2**40, 2, 64, 64), f"k must be {BLOCKS} 8 bit, got {2**42}"),
        (kv(2, 2**40, 64, 64), f"k must be {BLOCKS} 8 bit, got {2**42}"),
    ],
    "append": [
        (kv(2, 2, 9, 96), "tail must be [2, 2, 2, 2, 6208], got [2, 2, 2, 2, 4160]"),
        (kv(3, 2, 9, 64), "block_table must be [3, 2, 2, *], got [2, 2, 2, 4]"),
        (kv(2, 1, 9, 64), "block_table must be [2, 2, 1, *], got [2, 2, 2, 4]"),
        (kv(2, 2, 9, 72), f"head_dim must be {HEAD_DIMS}, got 72"),
        ({"v": of(2, 2, 70, 64).bfloat16()}, "v must be float32 like k, got bfloat16"),
        ({"k_balance": of(2, 64)}, "k_balance must be [2, 2, 64], got [2, 64]"),
        ({"tail_margin": -INF}, f"{MARGIN} -inf"),
        ({"left_padding": i32(71, 0)}, "left_padding[0] must be in [0, 70], got 71"),
        ({"tail_scale": of(2, 2, 2)}, "tail_scale must be contiguous, got strides [0, 0, 0]"),
        ({"tail_scale": of(2, 2)}, "tail_scale must be [2, 2, 2], got [2, 2]"),
        ({"clamp_count": of(2, 2, 2)}, "clamp_count must be int64, got float32"),
        (
            kv(2, 2, 2**40, 64),
            f"k must be at most {INT_MAX - 130} new tokens for sequence 0, got {2**40}",
        ),
        (
            kv(2, 2, 190, 64),
            "block_table must be of at least 5 pages for the 320 tokens of sequence 0, got 4",
        ),
        ({"seq_lens": i32(320, 70)}, "seq_lens[0] must be in [0, 319], got 320"),
        ({"seq_lens": i32(0, -1)}, "seq_lens[1] must be in [0, 319], got -1"),
        ({"seq_lens": i32(0, INT_MAX)}, f"seq_lens[1] must be in [0, 319], got {INT_MAX}"),
        ({"seq_lens": i32(0)}, "seq_lens must be [2], got [1]"),
        ({"seq_lens": of(2).long()}, "seq_lens must be int32, got int64"),
        ({(0, 1, 1, 2): -7}, f"block_table[0, 1, 1, 2] {ENTRY} -7"),
        ({(0, 1, 1, 2): 9}, f"block_table[0, 1, 1, 2] {ENTRY} 9"),
        ({(0, 0, 0, 2): 2 << 21}, f"block_table[0, 0, 0, 2] {ENTRY} {2 << 21}"),
        ({(0, 0, 1, 2): INT_MAX}, f"block_table[0, 0, 1, 2] {ENTRY} {INT_MAX}"),
        ({(0, 0, 0, 2): 0, "pool": []}, f"block_table[0, 0, 0, 2] {ENTRY} 0"),
        (
            {(0, 1, 1, 2): 3, (0, 0, 0, 2): 3},
            f"{DISTINCT} 3 twice",
        ),
        ({"block_table": of(2, 2, 2, 4).long()}, "block_table must be int32, got int64"),
        (
            {"block_table": of(2, 2, 4, 2).int().contiguous().mT},
            "block_table must be contiguous, got strides [16, 8, 1, 2]",
        ),
        ({"tail": u8(2, 2, 2, 2, 4159)}, "tail must be [2, 2, 2, 2, 4160], got [2, 2, 2, 2, 4159]"),
        ({"tail": of(2, 2, 2, 2, 4160)}, "tail must be uint8, got float32"),
        ({"pool": [u8(9, 100)]}, f"pool[0] must be {ROWS}, got [9, 100]"),
        ({"pool": [u8(2240)]}, f"pool[0] must be {ROWS}, got [2240]"),
        ({"pool": [of(9, 2240)]}, "pool[0] must be uint8, got float32"),
        ({"pool": [u8(2240, 9).T]}, "pool[0] must be contiguous, got strides [1, 9]"),
        ({"pool": [u8(0, 2240)] * 1025}, "pool must be at most 1024 slabs, got 1025"),
        (
            {"pool": [u8(3, 1216), of(2**21 + 1, 1216, dtype=torch.uint8)]},
            "pool[1] must be at most 2097152 blocks, got 2097153",
        ),
    ],
    "rewind": [
        ({"new_lens": i32(0, 71)}, "new_lens[1] must be in [0, 70], got 71"),
        ({"new_lens": i32(-1, 0)}, "new_lens[0] must be in [0, 130], got -1"),
        ({"new_lens": i32(0)}, "new_lens must be [2], got [1]"),
        ({"new_lens": of(2).long()}, "new_lens must be int32, got int64"),
        ({"seq_lens": i32(0, 320)}, "seq_lens[1] must be in [0, 319], got 320"),
        ({(0, 1, 0, 0): -1}, f"block_table[0, 1, 0, 0] {ENTRY} -1"),
        ({"tail": u8(2, 2, 2, 2, 4000)}, f"tail must be {TAILS}, got [2, 2, 2, 2, 4000]"),
        ({"tail": u8(4160)}, f"tail must be {TAILS}, got [4160]"),
        ({"block_table": i32(1)}, "block_table must be 4-dimensional, got [1]"),
        (
            {"block_table": of(2, 1, 2, 4).int()},
            "block_table must be [2, 2, 2, *], got [2, 1, 2, 4]",
        ),
    ],
    "dequantize": [
        ({"kv_len": 129}, "kv_len must be at least seq_lens[0] = 130, got 129"),
        ({"kv_len": -1}, f"kv_len must be in [0, {INT_MAX}], got -1"),
        ({"kv_len": 2**40}, f"kv_len must be in [0, {INT_MAX}], got {2**40}"),
        ({"dtype": torch.float64}, f"dtype must be {FLOATS}, got float64"),
        ({"dtype": torch.int8}, f"dtype must be {FLOATS}, got int8"),
        ({"seq_lens": i32(0, 1000)}, "seq_lens[1] must be in [0, 319], got 1000"),
        ({"k_mean": of(2, 2, 96)}, "k_mean must be [2, 2, 64], got [2, 2, 96]"),
        ({"tail": u8(2, 2, 2, 3, 4160)}, "tail must be [2, 2, 2, 2, 4160], got [2, 2, 2, 3, 4160]"),
        ({(1, 0, 1, 0): 9}, f"block_table[1, 0, 1, 0] {ENTRY} 9"),
    ],
}


def snapshot(args):
    tensors = {name: [x] for name, x in args.items() if isinstance(x, torch.Tensor)}
    # Expanded inputs can be larger than memory; what an op could write is what matters.
    return {
        name: [x.clone() for x in values]
        for name, values in {**tensors, "pool": args.get("pool", [])}.items()
        if sum(x.numel() for x in values) < 1e6
    }


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        pytest.param(op, changes, message, id=f"{op}-{message.split(' must')[0]}-{i}")
        for op, rejected in CASES.items()
        for i, (changes, message) in enumerate(rejected)
    ],
)
def test_rejects(op, changes, message):
    args = arguments(op)
    for key, value in changes.items():
        if isinstance(key, tuple):
            args["block_table"][key] = value
        else:
            args[key] = value
    before = snapshot(args)
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.kvcore, f"turbo_{op}")(**args)
    assert str(error.value) == f"turbo_{op}: {message}"
    after = snapshot(args)
    for name, values in before.items():
        for a, e in zip(after[name], values, strict=True):
            assert_bitwise_equal(a, e, name)


@pytest.mark.parametrize("op", CASES)
def test_the_call_that_is_changed_is_valid(op):
    getattr(torch.ops.kvcore, f"turbo_{op}")(**arguments(op))


def test_slabs_that_overlap_are_rejected():
    args = arguments("append")
    memory = u8(20 * 2240)
    slabs = [memory[: 12 * 2240].view(12, 2240), memory[8 * 2240 :].view(12, 2240)]
    for pool, pair in ((args["pool"] + args["pool"][1:], (1, 2)), (slabs, (0, 1))):
        args["pool"] = pool
        message = f"pool[{pair[0]}] and pool[{pair[1]}] in the same memory"
        with pytest.raises(RuntimeError, match="slabs that do not overlap, got ") as error:
            torch.ops.kvcore.turbo_append(**args)
        assert str(error.value).endswith(message)
    # Neighbours in one allocation, and slabs without rows, are no overlap.
    args = arguments("append")
    bytes_of = [slab.numel() for slab in args["pool"]]
    memory = u8(sum(bytes_of))
    shapes = [slab.shape for slab in args["pool"]]
    parts = memory.split(bytes_of)
    args["pool"] = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    args["pool"] += [u8(0, 1216), u8(0, 1216)]
    torch.ops.kvcore.turbo_append(**args)


def test_only_the_entries_that_are_needed_are_looked_at():
    """Nothing is read from the table but the pages that become full or are read back."""
    args = arguments("append")
    table = args["block_table"]
    needed = table[0, :, :, 2].clone()
    table.fill_(-1)
    table[0, :, :, 2] = needed
    torch.ops.kvcore.turbo_append(**args)

    args = arguments("rewind")
    needed = args["block_table"][0, :, :, 0].clone()
    args["block_table"].fill_(-1)
    args["block_table"][0, :, :, 0] = needed
    torch.ops.kvcore.turbo_rewind(**args)
