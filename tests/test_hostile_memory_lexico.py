"""Calls of lexico's ops wherever their tensors lie: at the edge of memory, far apart, shared."""

import concurrent.futures

import pytest
import torch

import cases
from cases import BF16, F16, Shape
from compare import assert_bitwise_equal
from hostile_memory import (
    assert_reads_inputs_only,
    assert_same,
    each_edge,
    far_apart,
    guarded_all,
)
from lexico_cases import make_dictionary, make_problem, random_codes

OPS = torch.ops.kvcore
SIZES = {"k_sparsity": 5, "v_sparsity": 6, "v_atoms": 90}


def tails(tiles, sparsity=5, batch=2):
    shape = (batch, 2, tiles, 64 + 96 * sparsity)
    return [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)]


def new_codes(tokens, seed=0, sparsity=5):
    k, v = (random_codes(2, 2, tokens, sparsity, 70, seed + i) for i in range(2))
    return (*k, *v)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@each_edge
def test_nothing_outside_the_inputs_is_read(edge, head_dim, dtype):
    """Neither are they written. The encoder with each of its searches."""
    x, dictionary = (
        cases.normal(2, 2, 9, head_dim, seed=1, dtype=dtype),
        make_dictionary(70, head_dim),
    )
    gram = dictionary @ dictionary.T
    options = {"sparsity": 5, "tolerance": 0.3}
    for args in ((x, dictionary), (x[:1, :1], dictionary), (x[:1, :1], dictionary, gram)):
        args = [arg.contiguous() for arg in args]
        assert_reads_inputs_only(OPS.lexico_encode, args, options, edge)
    codes = random_codes(2, 2, 9, 5, 70, seed=2)
    assert_reads_inputs_only(OPS.lexico_reconstruct, (*codes, dictionary), {"dtype": dtype}, edge)
    for q_len in (1, 3, 17):
        shape = Shape(head_dim, 40, q_len, 2, 2, 2, dtype)
        problem = make_problem(shape, buffer=5, buffer_lens=(5, 2), left_padding=(3, 0))
        assert_reads_inputs_only(OPS.lexico_attention, problem.tensors(), {}, edge)


@pytest.mark.isa
@each_edge
def test_nothing_outside_the_store_is_touched(edge):
    blocks = make_problem(Shape(64, 70, 1, 2, 2), blocks=1, buffer=3)
    assert_reads_inputs_only(OPS.lexico_attention, blocks.tensors(), {}, edge)
    both = (blocks.k_blocks[0], blocks.v_blocks[0])
    assert_reads_inputs_only(OPS.lexico_unseal, both, SIZES, edge)
    full = OPS.lexico_unseal(*both, **SIZES)
    assert_reads_inputs_only(OPS.lexico_seal, full, {"v_atoms": 90}, edge)
    assert_reads_inputs_only(OPS.lexico_unpack, full[:1], {"kv_len": 4096}, edge)

    plain = [*tails(3), torch.zeros(2, dtype=torch.int32)]
    fenced = guarded_all(plain, edge)
    for i, num_new in enumerate((1, 31, 40, 24)):
        codes = new_codes(num_new, i)
        OPS.lexico_append(*codes, *plain)
        OPS.lexico_append(*guarded_all(codes, edge, readonly=True), *fenced)
        for name, a, b in zip(("k_tail", "v_tail", "tail_lens"), fenced, plain, strict=True):
            assert_bitwise_equal(a, b, f"{name} after {num_new} more")


@pytest.mark.parametrize("dim", range(4), ids=["batch", "head", "token", "channel"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_elements_may_lie_far_apart(dim, dtype):
    x, dictionary = cases.normal(2, 2, 9, 64, seed=1, dtype=dtype), make_dictionary(70, 64)
    options = {"sparsity": 5}
    expected = OPS.lexico_encode(x, dictionary, **options)
    assert_same(OPS.lexico_encode(far_apart(x, dim), dictionary, **options), expected)
    problem = make_problem(Shape(64, 40, 3, 2, 2, 2, dtype), buffer=5)
    expected = problem.run()
    for name in ("q", "k_buffer", "v_buffer"):
        setattr(problem, name, far_apart(getattr(problem, name), dim))
    assert_same(problem.run(), expected)


@pytest.mark.asan
def test_lazy_negation():
    x, dictionary = cases.normal(2, 2, 9, 64, seed=1), make_dictionary(70, 64)
    expected = OPS.lexico_encode(x, dictionary, sparsity=5)
    lazy = torch.complex(x, -x).conj().imag  # x, negated twice, once when it is read
    assert lazy.is_neg()
    assert_same(OPS.lexico_encode(lazy, dictionary, sparsity=5), expected)
    problem = make_problem(Shape(64, 40, 3, 2, 2), buffer=5)
    expected = problem.run()
    problem.q = torch.complex(problem.q, -problem.q).conj().imag
    assert_same(problem.run(), expected)


@pytest.mark.asan
def test_lazy_copies_are_copied_by_who_writes():
    """torch._lazy_clone shares memory until one side is written."""
    original = [*tails(3), torch.zeros(2, dtype=torch.int32)]
    OPS.lexico_append(*new_codes(40), *original)
    before = [x.clone() for x in original]
    lazy = [torch._lazy_clone(x) for x in original]
    OPS.lexico_unpack(lazy[0], kv_len=70)
    assert all(torch._C._is_cow_tensor(x) for x in lazy), "a reader made a copy"
    for store in (lazy, before):
        OPS.lexico_append(*new_codes(20, 5), *store)
    assert_same(tuple(lazy), tuple(before))
    assert original[2].tolist() == [40, 40]
    assert not original[0][:, :, 1, 64:].equal(before[0][:, :, 1, 64:])


@pytest.mark.asan
def test_inputs_may_overlap_themselves_and_each_other():
    """Every stride that as_strided allows, one memory for queries and buffers."""
    memory = cases.normal(5000, seed=3)
    dictionary = make_dictionary(70, 64)
    problem = make_problem(Shape(64, 40, 5, 2, 2, 2), buffer=7)
    for strides in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 64, 1, 3), (3, 0, 5, 1), (7, 200, 0, 2)):
        q, k, v = (
            memory.as_strided((2, heads, n, 64), strides, at)
            for heads, n, at in ((4, 5, 0), (2, 7, 1), (2, 7, 17))
        )
        encoded = OPS.lexico_encode(q, dictionary, sparsity=3)
        assert_same(OPS.lexico_encode(q.contiguous(), dictionary, sparsity=3), encoded)
        problem.q, problem.k_buffer, problem.v_buffer = q, k, v
        strided = problem.run()
        problem.q, problem.k_buffer, problem.v_buffer = (x.contiguous() for x in (q, k, v))
        assert_same(problem.run(), strided)


@pytest.mark.asan
def test_inference_tensors():
    with torch.inference_mode():
        x, dictionary = cases.normal(2, 2, 9, 64, seed=1), make_dictionary(70, 64)
        codes = OPS.lexico_encode(x, dictionary, sparsity=5)[:3]
        store = [*tails(1), torch.zeros(2, dtype=torch.int32)]
        OPS.lexico_append(*codes, *codes, *store)
    with torch.no_grad():  # a store of inference tensors is read outside
        assert_same(OPS.lexico_unpack(store[0], kv_len=9), codes)


def test_threads_may_call_at_once():
    """Readers share one store, each writer has its own."""
    problem = make_problem(Shape(64, 330, 3, 2, 4, 2), buffer=20)
    expected = problem.run()
    x, dictionary = cases.normal(2, 2, 60, 64, seed=1), make_dictionary(70, 64)
    encoded = OPS.lexico_encode(x, dictionary, sparsity=5)
    codes = new_codes(330)
    alone = [*tails(11), torch.zeros(2, dtype=torch.int32)]
    OPS.lexico_append(*codes, *alone)

    def read(_):
        return [(problem.run(), OPS.lexico_encode(x, dictionary, sparsity=5)) for _ in range(10)]

    def write(_):
        store = [*tails(11), torch.zeros(2, dtype=torch.int32)]
        for t in range(330):
            step = [c[:, :, t : t + 1].contiguous() for c in codes]
            OPS.lexico_append(*step, *store)
        return store

    def fail(_):
        for _ in range(50):
            with pytest.raises(RuntimeError, match="lexico_encode: x must be 4-dimensional"):
                OPS.lexico_encode(x[0], dictionary, sparsity=5)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(f, i) for i in range(2) for f in (read, write, fail)]
        results = [job.result() for job in jobs]
    for results_of_one in results[0::3]:
        for attended, coded in results_of_one:
            assert_same(attended, expected)
            assert_same(coded, encoded)
    for store in results[1::3]:
        assert_same(tuple(store), tuple(alone))
