"""Calls that must work wherever their tensors lie: at the edge of memory, far apart, shared."""

import concurrent.futures
import functools
import mmap

import pytest
import torch

import cases
from cases import BF16, F16, Shape, make_qkv
from compare import assert_bitwise_equal
from hostile_memory import (
    assert_reads_inputs_only,
    assert_same,
    each_edge,
    far_apart,
    guarded_all,
)

OPS = torch.ops.kvcore
INT_MAX = 2**31 - 1


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def reading_calls(shape, k_bits, v_bits):
    """Every op that writes none of its arguments: name, positional and keyword arguments."""
    q, k, v = make_qkv(shape)
    balance, mean = OPS.turbo_calibrate(k)
    padding = int32(*(3 * b for b in range(shape.batch)))
    store = cases.store_of(
        OPS.turbo_quantize(k, v, balance, mean, k_bits=[k_bits], v_bits=[v_bits])
    )
    # Allocated together these would touch each other, not the guards.
    bounds = [int32(0, q.shape[2]), int32(0, k.shape[2])]
    first = [x[:1] for x in (q, k, v, balance, mean)]
    return {
        "calibrate": ((k, padding), {}),
        "head_priority": ((v, padding), {}),
        "attention": ((q, k, v, balance, mean), {"causal": True}),
        "attention_packed": ((*first, *bounds), {}),
        "quantize": (
            (k, v, balance, mean, padding),
            {"k_bits": [k_bits], "v_bits": [v_bits], "sink_pages": 0},
        ),
        "dequantize": ((*store.readable, balance, mean), {"kv_len": 200, "dtype": shape.dtype}),
        "decode": ((q, *store.readable, balance, mean), {}),
    }


def writing_calls(shape, k_bits, v_bits):
    _, k, v = make_qkv(shape)
    balance, mean = OPS.turbo_calibrate(k)
    pages = -(-2 * shape.kv_len // 64)
    store = cases.empty_store(
        shape.batch, shape.kv_heads, shape.head_dim, pages, k_bits=k_bits, v_bits=v_bits
    )
    for _ in range(2):
        yield "append", (k, v, *store.writable, balance, mean), {}, store
    for new_len in (150, 129, 70):
        yield "rewind", (*store.readable, int32(*[new_len] * shape.batch)), {}, store


def call(name, *args, **kwargs):
    return getattr(OPS, f"turbo_{name.removesuffix('_packed')}")(*args, **kwargs)


WIDTHS = [(8, 8), (4, 2), (2, 4)]
each_width = pytest.mark.parametrize(("k_bits", "v_bits"), WIDTHS, ids=["K8V8", "K4V2", "K2V4"])
each_head_dim = pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@each_head_dim
@each_width
@each_edge
def test_nothing_outside_the_inputs_is_read(edge, k_bits, v_bits, head_dim, dtype):
    """Neither are they written: their pages are read-only."""
    for q_len in (1, 3, 17):
        shape = Shape(head_dim, 130, q_len, 2, 2, 2, dtype)
        for name, (args, kwargs) in reading_calls(shape, k_bits, v_bits).items():
            assert_reads_inputs_only(functools.partial(call, name), args, kwargs, edge)


@pytest.mark.isa
@each_head_dim
@each_width
@each_edge
def test_nothing_outside_the_store_is_touched(edge, k_bits, v_bits, head_dim):
    shape = Shape(head_dim, 100, 1, 2, 1, 2, BF16)
    fenced_state = None
    for name, args, kwargs, store in writing_calls(shape, k_bits, v_bits):
        if fenced_state is None:
            fenced_state = guarded_all(store.named(), edge)
            places = {id(x): fenced_state[n] for n, x in store.named().items()}
        others = [guarded_all(x, edge, readonly=True) if id(x) not in places else x for x in args]
        fenced = [
            [places[id(y)] for y in x] if isinstance(x, list) else places.get(id(x), other)
            for x, other in zip(args, others, strict=True)
        ]
        call(name, *args, **kwargs)
        call(name, *fenced, **kwargs)
        for n, x in store.named().items():
            assert_bitwise_equal(fenced_state[n], x, f"{n} after {name}")


# ---- More than 2^31 elements or bytes between neighbours


@pytest.mark.parametrize("dim", range(4), ids=["batch", "head", "token", "channel"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_elements_may_lie_far_apart(dim, dtype):
    q, k, v = make_qkv(Shape(64, 70, 3, 2, 2, 2, dtype))
    far_q, far_k, far_v = (far_apart(x, dim) for x in (q, k, v))
    assert_same(OPS.turbo_calibrate(far_k), OPS.turbo_calibrate(k))
    assert_same(OPS.turbo_head_priority(far_v), OPS.turbo_head_priority(v))
    assert_same(OPS.turbo_attention(far_q, far_k, far_v), OPS.turbo_attention(q, k, v))
    quantized = OPS.turbo_quantize(k, v)
    assert_same(OPS.turbo_quantize(far_k, far_v), quantized)
    stores = [cases.empty_store(2, 2, 64, 3) for _ in range(2)]
    OPS.turbo_append(k, v, *stores[0].writable)
    OPS.turbo_append(far_k, far_v, *stores[1].writable)
    for name, x in stores[1].named().items():
        assert_bitwise_equal(x, stores[0].named()[name], name)
    store = stores[0].readable
    assert_same(OPS.turbo_decode(far_q, *store), OPS.turbo_decode(q, *store))


def test_blocks_beyond_2_to_the_31_bytes():
    """The largest entry there can be, in the last of 1024 slabs, and one behind 2^31 bytes."""
    plain = cases.empty_store(1, 1, 64, 2, k_bits=2, v_bits=2, sink_pages=0)
    slabs = [torch.zeros(0, 1216, dtype=torch.uint8)] * 1023
    # Zeros from the system: what is not touched takes no memory.
    zeros = mmap.mmap(-1, 2**21 * 1216)
    slabs.append(torch.frombuffer(zeros, dtype=torch.uint8).view(2**21, 1216))
    far = cases.empty_store(1, 1, 64, 2, k_bits=2, v_bits=2, sink_pages=0)
    far.pool = slabs
    far.block_table.copy_(
        int32(INT_MAX, INT_MAX - 2, INT_MAX - 1, (1023 << 21) + 5).view(1, 2, 1, 2)
    )
    assert (2**21 - 3) * 1216 > 2**31
    q, k, v = make_qkv(Shape(64, 150, 3, 1, 2))
    for store in (plain, far):
        OPS.turbo_append(k, v, *store.writable)
    for name, entry in (("K0", INT_MAX), ("V1", 5)):
        kv, page = name[0] == "V", int(name[1])
        place = int(plain.block_table[0, int(kv), 0, page])
        block = plain.pool[place >> 21][place & (2**21 - 1)]
        assert_bitwise_equal(slabs[-1][entry & (2**21 - 1)], block, name)
    assert_same(OPS.turbo_decode(q, *far.readable), OPS.turbo_decode(q, *plain.readable))
    for store in (plain, far):
        OPS.turbo_rewind(*store.readable, int32(20))
    read = [OPS.turbo_dequantize(*store.readable, kv_len=20) for store in (plain, far)]
    assert_same(read[1], read[0])


def test_outputs_without_elements_of_huge_inputs():
    huge = torch.zeros(())
    q, k = huge.expand(2**45, 1, 0, 64), huge.expand(2**45, 1, 3, 64)
    out, lse = OPS.turbo_attention(q, k, k)
    assert (out.shape, lse.shape) == ((2**45, 1, 0, 64), (2**45, 1, 0))
    for sizes in ((0, 2**40, 64, 64), (2**40, 0, 64, 64)):
        k = huge.expand(sizes)
        assert [x.numel() for x in OPS.turbo_calibrate(k)] == [0, 0]
        assert OPS.turbo_head_priority(k).shape == sizes[:2]
    k = huge.expand(0, 2**20, 2**31 - 1, 64)
    results = OPS.turbo_quantize(k, k)
    assert [x.numel() for x in results] == [0] * 8
    assert results[3].shape == (0, 2, 2**20, 2**25 - 1)


# ---- Tensors that are not what they seem


@pytest.mark.asan
def test_lazy_negation_and_conjugation():
    q, k, v = make_qkv(Shape(64, 130, 3, 2, 2))
    store = cases.store_of(OPS.turbo_quantize(k, v))
    lazy = torch.complex(q, -q).conj().imag  # q, negated twice, once when it is read
    assert lazy.is_neg()
    expected = OPS.turbo_decode(q, *store.readable)
    assert_same(OPS.turbo_decode(lazy, *store.readable), expected)
    lazy_k, lazy_v = (torch.complex(x, -x).conj().imag for x in (k, v))
    assert_same(OPS.turbo_attention(lazy, lazy_k, lazy_v), OPS.turbo_attention(q, k, v))
    states = [cases.empty_store(1, 2, 64, 4) for _ in range(2)]
    OPS.turbo_append(k, v, *states[0].writable)
    OPS.turbo_append(lazy_k, lazy_v, *states[1].writable)
    for name, x in states[1].named().items():
        assert_bitwise_equal(x, states[0].named()[name], name)


@pytest.mark.asan
def test_lazy_copies_are_copied_by_who_writes():
    """torch._lazy_clone shares memory until one side is written."""
    q, k, v = make_qkv(Shape(64, 130, 3, 2, 2))
    original = cases.empty_store(1, 2, 64, 5)
    OPS.turbo_append(k, v, *original.writable)
    before = original.to("cpu")
    lazy = cases.Store(
        [torch._lazy_clone(slab) for slab in original.pool],
        *(torch._lazy_clone(x) for x in original.writable[1:]),
    )
    expected = OPS.turbo_decode(q, *original.readable)
    assert_same(OPS.turbo_decode(torch._lazy_clone(q), *lazy.readable), expected)
    assert all(torch._C._is_cow_tensor(x) for x in lazy.named().values()), "a reader made a copy"
    OPS.turbo_append(k, v, *lazy.writable)
    OPS.turbo_rewind(*lazy.readable, int32(3))
    for name, x in original.named().items():
        assert_bitwise_equal(x, before.named()[name], name)
    OPS.turbo_append(k, v, *before.writable)
    assert_bitwise_equal(lazy.pool[0], before.pool[0], "pool[0]")
    assert lazy.seq_lens.tolist() == [3]


@pytest.mark.asan
def test_inputs_may_overlap_themselves_and_each_other():
    """Every stride that as_strided allows, one memory for q, k and v."""
    memory = cases.normal(5000, seed=3)
    for strides in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 64, 1, 3), (3, 0, 5, 1), (7, 200, 0, 2)):
        q, k, v = (
            memory.as_strided((2, heads, n, 64), strides, at)
            for heads, n, at in ((4, 5, 0), (2, 70, 1), (2, 70, 17))
        )
        plain = [x.contiguous() for x in (q, k, v)]
        assert_same(OPS.turbo_attention(q, k, v), OPS.turbo_attention(*plain))
        assert_same(OPS.turbo_calibrate(k), OPS.turbo_calibrate(plain[1]))
        assert_same(OPS.turbo_quantize(k, v), OPS.turbo_quantize(*plain[1:]))
        assert_same(OPS.turbo_quantize(k, k), OPS.turbo_quantize(plain[1], plain[1]))


@pytest.mark.asan
def test_modules_parameters_and_inference_tensors():
    q, k, v = make_qkv(Shape(64, 130, 3, 2, 2))
    expected = OPS.turbo_attention(q, k, v)
    parameters = [torch.nn.Parameter(x.clone()) for x in (q, k, v)]
    out, lse = OPS.turbo_attention(*parameters)
    assert_same((out.detach(), lse.detach()), expected)
    with torch.inference_mode():
        inside = [x.clone() for x in (q, k, v)]
        assert_same(OPS.turbo_attention(*inside), expected)
        store = cases.empty_store(1, 2, 64, 3)
        OPS.turbo_append(*inside[1:], *store.writable)
    with torch.no_grad():  # a store of inference tensors is read outside
        read = OPS.turbo_dequantize(*store.readable, kv_len=130)
    assert not any(x.requires_grad for x in read)


def test_vmap_equals_a_loop():
    q, k, v = (torch.stack([x, 2 * x]) for x in make_qkv(Shape(64, 70, 3, 2, 2)))
    together = torch.vmap(OPS.turbo_attention)(q, k, v)
    for i in range(2):
        assert_same(tuple(x[i] for x in together), OPS.turbo_attention(q[i], k[i], v[i]))


# ---- Callers in several threads


def test_threads_may_call_at_once():
    """Readers share one store, each writer has its own."""
    q, k, v = make_qkv(Shape(64, 330, 3, 2, 4, 2))
    shared = cases.store_of(OPS.turbo_quantize(k, v))
    expected = OPS.turbo_decode(q, *shared.readable)
    alone = cases.empty_store(2, 2, 64, 12)
    for t in range(330):
        OPS.turbo_append(k[:, :, t : t + 1], v[:, :, t : t + 1], *alone.writable)

    def read(_):
        return [OPS.turbo_decode(q, *shared.readable) for _ in range(20)]

    def write(_):
        store = cases.empty_store(2, 2, 64, 12)
        for t in range(330):
            OPS.turbo_append(k[:, :, t : t + 1], v[:, :, t : t + 1], *store.writable)
        return store

    def fail(_):
        for _ in range(50):
            with pytest.raises(RuntimeError, match="turbo_decode: q must be 4-dimensional"):
                OPS.turbo_decode(q[0], *shared.readable)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(f, i) for i in range(2) for f in (read, write, fail)]
        results = [job.result() for job in jobs]
    for results_of_one in results[0::3]:
        for result in results_of_one:
            assert_same(result, expected)
    for store in results[1::3]:
        for name, x in store.named().items():
            assert_bitwise_equal(x, alone.named()[name], name)
