"""Out-of-range values in device tensors of the store, which kernels find and the host does not.

A sequence that they concern stays as it was, or gives NaN; all others are served; the error is
raised when it is asked for.
"""

import math

import pytest
import torch

import cases
from cases import REFERENCE, Store
from compare import assert_bitwise_equal, assert_same_attention
from kvcore.reference.turbo import blocks
from stores import append, assert_same_store, make_kv, on, rewind, run, run_dequantize

pytestmark = pytest.mark.asan

# The CPU looks at such values first and raises: test_turbo_store_rejects.py.
each_device_backend = pytest.mark.parametrize("backend", cases.BACKENDS[1:])

LENS = [100, 63, 130]
BAD = 1  # the sequence that the values concern
INT_MAX = 2**31 - 1
MAX_PAGES = 6
ENTRIES = [-1, -(2**31), 9 << 21, 1000, INT_MAX]
TEXTS = {
    "seq_lens": "seq_lens: a length is negative or more than the store holds",
    "block_table": "block_table: an entry that is needed names no block of the pool",
    "left_padding": "left_padding: negative or more than the number of tokens",
    "new_lens": "new_lens: negative or more than seq_lens",
}


def filled_store():
    """A store of the reference with sequences of LENS tokens."""
    store = cases.empty_store(3, 2, 64, MAX_PAGES, k_bits=4, v_bits=2)
    k, v = make_kv(64, max(LENS), kv_heads=2, batch=3)
    padding = torch.tensor([max(LENS) - n for n in LENS], dtype=torch.int32)
    append(REFERENCE, store, k, v, left_padding=padding)
    return store


def sequences(store, chosen):
    """Those sequences of a store, over the same pool."""
    return Store(store.pool, *(x[chosen].clone() for x in store.writable[1:]))


def raised_errors(backend):
    """What was reported since the last call, without what was expected of it."""
    like = torch.empty(0, device=backend.device)
    try:
        backend.ops.raise_errors(like)
    except RuntimeError as error:
        return str(error)
    return ""


def assert_reported(backend, argument):
    assert TEXTS[argument] in raised_errors(backend)
    assert raised_errors(backend) == ""


APPEND_CASES = [
    *(("seq_lens", value) for value in (-1, -(2**31), 64 * (MAX_PAGES + 1), INT_MAX)),
    *(("block_table", value) for value in ENTRIES),
    ("left_padding", -1),
    ("left_padding", INT_MAX),
]


@each_device_backend
@pytest.mark.parametrize("num_new", [1, 5, 128, 200])
@pytest.mark.parametrize(("argument", "value"), APPEND_CASES)
def test_append_leaves_the_sequence_as_it_was(backend, argument, value, num_new):
    store = filled_store()
    k, v = make_kv(64, num_new, seed=1, kv_heads=2, batch=3)
    left_padding = None
    if argument == "left_padding":
        left_padding = torch.zeros(3, dtype=torch.int32)
        left_padding[BAD] = value
    elif argument == "seq_lens":
        store.seq_lens[BAD] = value
    else:
        store.block_table[BAD, 1, 0, LENS[BAD] // 64] = value
    actual = store.to(backend.device)
    append(backend, actual, k, v, left_padding=left_padding)
    assert_reported(backend, argument)

    actual = actual.to("cpu")
    for name in ("tail", "tail_scale", "clamp_count", "seq_lens"):
        assert_bitwise_equal(getattr(actual, name)[BAD], getattr(store, name)[BAD], name)
    good = [0, 2]
    expected = sequences(store, good)
    append(REFERENCE, expected, k[good], v[good])
    assert_same_store(sequences(actual, good), expected)


@each_device_backend
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("seq_lens", value) for value in (-1, 64 * (MAX_PAGES + 1))),
        *(("new_lens", value) for value in (-1, LENS[BAD] + 200, INT_MAX)),
        *(("block_table", value) for value in ENTRIES),
    ],
)
def test_rewind_leaves_the_sequence_as_it_was(backend, argument, value):
    store = filled_store()
    # Page 0 of the others is read back, and that of sequence BAD too.
    k, v = make_kv(64, 150, seed=2, kv_heads=2, batch=3)
    append(REFERENCE, store, k, v)
    new_lens = torch.tensor([200, 7, 5], dtype=torch.int32)
    if argument == "new_lens":
        new_lens[BAD] = value
    elif argument == "seq_lens":
        store.seq_lens[BAD] = value
    else:
        store.block_table[BAD, 0, 1, 0] = value
    actual = store.to(backend.device)
    rewind(backend, actual, new_lens)
    assert_reported(backend, argument)

    actual = actual.to("cpu")
    for name in ("tail", "seq_lens"):
        assert_bitwise_equal(getattr(actual, name)[BAD], getattr(store, name)[BAD], name)
    good = [0, 2]
    expected = sequences(store, good)
    rewind(REFERENCE, expected, new_lens[good])
    assert_same_store(sequences(actual, good), expected)


@each_device_backend
@pytest.mark.parametrize("right_align", [False, True])
def test_dequantize_gives_nan(backend, right_align):
    store = filled_store()
    options = {"kv_len": 140, "right_align": right_align}
    expected = run_dequantize(REFERENCE, store, **options)
    for value in (-1, 141, 64 * (MAX_PAGES + 1), INT_MAX):
        broken = store.to(backend.device)
        broken.seq_lens[BAD] = value
        for a, e in zip(run_dequantize(backend, broken, **options), expected, strict=True):
            assert a[BAD].isnan().all()
            assert_bitwise_equal(a[[0, 2]], e[[0, 2]])
        assert_reported(backend, "seq_lens")
    for value in ENTRIES:
        broken = store.to(backend.device)
        broken.block_table[2, 0, 1, 1] = value
        k, v = run_dequantize(backend, broken, **options)
        first = 64 + (10 if right_align else 0)
        assert k[2, 1, first : first + 64].isnan().all()
        k[2, 1, first : first + 64] = expected[0][2, 1, first : first + 64]
        assert_bitwise_equal(k, expected[0])
        assert_bitwise_equal(v, expected[1])
        assert_reported(backend, "block_table")


@each_device_backend
@pytest.mark.parametrize("op", ["turbo_calibrate", "turbo_head_priority"])
@pytest.mark.parametrize("value", [-1, 71, INT_MAX, -(2**31)])
def test_padding_out_of_range_gives_nan(backend, op, value):
    k, _ = make_kv(64, 70, kv_heads=2, batch=3)
    padding = torch.tensor([3, value, 0], dtype=torch.int32)
    actual = run(backend, op, k, padding)
    assert_reported(backend, "left_padding")
    padding[BAD] = 0
    expected = run(backend, op, k, padding)
    if op == "turbo_head_priority":
        actual, expected = (actual,), (expected,)
    for a, e in zip(actual, expected, strict=True):
        assert a[BAD].isnan().all()
        assert_bitwise_equal(a[[0, 2]], e[[0, 2]])


@each_device_backend
def test_check_values_raises_before_anything_is_written(backend):
    store = filled_store()
    store.seq_lens[BAD] = -1
    actual = store.to(backend.device)
    k, v = on(backend.device, *make_kv(64, 3, kv_heads=2, batch=3))
    message = r"turbo_append: seq_lens\[1\] must be in \[0, 447\], got -1"
    with pytest.raises(RuntimeError, match=message):
        backend.ops.turbo_append(k, v, *actual.writable, check_values=True)
    assert raised_errors(backend) == ""
    assert_same_store(sequences(actual, [0, 2]), sequences(store, [0, 2]))


@each_device_backend
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_more_slabs_than_the_small_table_takes(backend, dtype):
    """Every block in a slab of its own, 72 of them."""
    store = filled_store()
    k, v = make_kv(64, 200, seed=3, kv_heads=2, batch=3, dtype=dtype)
    numbers = {}
    slabs = []
    for slab_idx, slab in enumerate(store.pool):
        for row in range(len(slab)):
            numbers[slab_idx << blocks.SLAB_INDEX_BITS | row] = len(slabs)
            slabs.append(slab[row : row + 1].clone())
    assert len(slabs) > 16
    table = store.block_table.clone()
    table.apply_(lambda entry: numbers[entry] << blocks.SLAB_INDEX_BITS)
    many = Store(slabs, table, *(x.clone() for x in store.writable[2:]))
    actual = many.to(backend.device)
    for where, s in ((REFERENCE, many), (backend, actual)):
        append(where, s, k, v)
        append(where, s, k[:, :, :1], v[:, :, :1])
        rewind(where, s, torch.tensor([7, 70, 250], dtype=torch.int32))
    assert_same_store(actual, many)
    for a, e in zip(
        run_dequantize(backend, actual, kv_len=300, dtype=dtype),
        run_dequantize(REFERENCE, many, kv_len=300, dtype=dtype),
        strict=True,
    ):
        assert_bitwise_equal(a, e)
    q = cases.normal(3, 2, 1, 64, seed=4, dtype=dtype)
    got = backend.ops.turbo_decode(q.to(backend.device), *actual.readable)
    assert_same_attention(got, REFERENCE.ops.turbo_decode(q, *many.readable))


@each_device_backend
def test_blocks_that_are_not_aligned_are_rejected(backend):
    store = filled_store().to(backend.device)
    slab = store.pool[1]
    memory = torch.zeros(slab.numel() + 8, dtype=torch.uint8, device=backend.device)
    store.pool[1] = memory[8:].view(slab.shape)
    k, v = on(backend.device, *make_kv(64, 1, kv_heads=2, batch=3))
    before = store.to("cpu")
    message = r"pool\[1\] must begin at a multiple of 16 bytes, got an address 8 bytes past one"
    with pytest.raises(RuntimeError, match=message):
        backend.ops.turbo_append(k, v, *store.writable)
    with pytest.raises(RuntimeError, match=message):
        run_dequantize(backend, store, kv_len=300)
    assert_same_store(store, before)


@each_device_backend
def test_a_scale_that_is_too_small_counts_what_it_clamps(backend):
    """Clamped codes of one token at a time, until the page is full, are those of the reference."""
    expected = cases.empty_store(2, 2, 64, 2)
    actual = expected.to(backend.device)
    for i in range(66):
        k, v = make_kv(64, 1, seed=i, kv_heads=2, batch=2)
        grown = math.exp(i / 20)
        append(REFERENCE, expected, k * grown, v * grown, tail_margin=1.0)
        append(backend, actual, k * grown, v * grown, tail_margin=1.0)
    assert_same_store(actual, expected)
    assert (expected.clamp_count > 0).all()
