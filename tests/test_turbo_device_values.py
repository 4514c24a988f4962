"""Values in device tensors that are out of range, where the host does not look at them first.

A kernel leaves out what they name, touches no memory through them, gives NaN where the result
would have gone, and reports; neighbours keep their bits.
"""

import pytest
import torch

import cases
from cases import Shape, make_qkv
from compare import assert_bitwise_equal, assert_same_attention
from kvcore.reference import turbo

each_device_backend = pytest.mark.parametrize(
    "backend", [p for p in cases.BACKENDS if p.values[0] != cases.CPU]
)


def problem(q_len=2):
    q, k, v = make_qkv(Shape(64, 300, q_len, 2, 2, batch=3))
    return q, cases.store_of(turbo.turbo_quantize(k, v, k_bits=[4], v_bits=[2]))


def decode(backend, q, store, **scalars):
    readable = store.to(backend.device).readable
    return [x.cpu() for x in backend.ops.turbo_decode(q.to(backend.device), *readable, **scalars)]


def raised(backend):
    with pytest.raises(RuntimeError) as caught:
        backend.ops.raise_errors(torch.empty(0, device=backend.device))
    # Raised once, then forgotten.
    backend.ops.raise_errors(torch.empty(0, device=backend.device))
    return str(caught.value)


@each_device_backend
@pytest.mark.parametrize("q_len", [2, 40])
@pytest.mark.parametrize("length", [-1, 320, 2**31 - 1, -(2**31)])
def test_lengths_out_of_range(backend, length, q_len):
    q, store = problem(q_len)
    clean = decode(backend, q, store)
    store.seq_lens[1] = length
    out, lse = decode(backend, q, store)
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    for actual, expected, name in zip((out, lse), clean, ("out", "lse"), strict=True):
        assert_bitwise_equal(actual[[0, 2]], expected[[0, 2]], name)
    assert "seq_lens: a length is negative or more than the store holds" in raised(backend)


@each_device_backend
@pytest.mark.parametrize("q_len", [2, 40])
@pytest.mark.parametrize("kv", [0, 1], ids=["K", "V"])
@pytest.mark.parametrize("entry", [-1, 2**21 - 1, 2**31 - 1, 2**30], ids=str)
def test_entries_out_of_range(backend, entry, kv, q_len):
    q, store = problem(q_len)
    clean = decode(backend, q, store)
    store.block_table[1, kv, 0, 2] = entry
    out, lse = decode(backend, q, store)
    # Kv head 0 serves query heads 0 and 1.
    assert out[1, :2].isnan().all()
    assert lse[1, :2].isnan().all()
    out[1, :2], lse[1, :2] = clean[0][1, :2], clean[1][1, :2]
    assert_bitwise_equal(out, clean[0], "out")
    assert_bitwise_equal(lse, clean[1], "lse")
    assert "block_table: an entry that is needed names no block" in raised(backend)
    # Pages that the window hides are not needed.
    expected = turbo.turbo_decode(q, *problem(q_len)[1].readable, window=60)
    assert_same_attention(decode(backend, q, store, window=60), expected)
    backend.ops.raise_errors(torch.empty(0, device=backend.device))


@each_device_backend
@pytest.mark.parametrize(
    ("q_bounds", "kv_bounds"),
    [
        ([0, 2, 5], [0, 80, 71]),
        ([0, 2, 5], [0, -1, 70]),
        ([0, 2, 5], [1, 30, 70]),
        ([0, 6, 5], [0, 30, 70]),
        ([0, 2, 4], [0, 30, 70]),
        ([0, 2, 2**31 - 1], [0, 30, 70]),
        ([0], [0]),
    ],
    ids=str,
)
def test_cu_seqlens_out_of_range(backend, q_bounds, kv_bounds):
    q, k, v = (x.to(backend.device) for x in make_qkv(Shape(64, 70, 5, 1, 40)))
    bounds = [
        torch.tensor(x, dtype=torch.int32, device=backend.device) for x in (q_bounds, kv_bounds)
    ]
    out, lse = backend.ops.turbo_attention(q, k, v, None, None, *bounds)
    assert out.isnan().all()
    assert lse.isnan().all()
    assert "cu_seqlens: not rising from 0 to the number of tokens" in raised(backend)


@cases.each_backend
@pytest.mark.parametrize("q_len", [1, 30])
def test_a_pool_of_many_slabs(backend, q_len):
    q, k, v = make_qkv(Shape(64, 400, q_len, 2, 2))
    store = cases.store_of(turbo.turbo_quantize(k, v, k_bits=[4], v_bits=[8]))
    expected = decode(backend, q, store)
    # One slab for each block.
    slab, row = store.block_table >> 21, store.block_table & (2**21 - 1)
    first = torch.tensor([0, *[len(x) for x in store.pool]]).cumsum(0)
    used = store.block_table >= 0
    store.block_table[used] = ((first[slab[used]] + row[used]) << 21).int()
    store.pool = [x[i : i + 1].clone() for x in store.pool for i in range(len(x))]
    assert len(store.pool) > 16
    for actual, want in zip(decode(backend, q, store), expected, strict=True):
        assert_bitwise_equal(actual, want)
