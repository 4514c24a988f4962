"""turbo_decode: attention of new queries over a quantized store."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import kvcore
from cases import BF16, F32, LAYOUTS, LONG_SHAPES, SHAPES, Shape, each_backend, make_qkv, normal
from compare import assert_bitwise_equal, assert_same_attention, relative_l2
from kvcore.reference import exact_attention, turbo


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# Widths of K and V, one for all heads or one for each: kernels differ in all of them.
WIDTHS = [((8,), (8,)), ((4,), (4,)), ((2,), (2,)), ((4,), (2,)), ((2,), (8,)), ((8,), (4,))]
each_width = pytest.mark.parametrize(
    ("k_bits", "v_bits"), WIDTHS, ids=[f"K{k[0]}V{v[0]}" for k, v in WIDTHS]
)


@dataclasses.dataclass
class Problem:
    """Queries, a store and its calibration."""

    q: torch.Tensor
    store: cases.Store
    calibration: tuple[torch.Tensor | None, torch.Tensor | None]

    def run(self, ops, device="cpu", **scalars):
        store = self.store.to(device)
        tensors = [x if x is None else x.to(device) for x in self.calibration]
        return ops.turbo_decode(self.q.to(device), *store.readable, *tensors, **scalars)

    def agree(self, backend, **scalars):
        actual = self.run(backend.ops, backend.device, **scalars)
        assert_same_attention(actual, self.run(turbo, **scalars))
        return actual


def make_problem(shape, k_bits=(4,), v_bits=(4,), padding=None, calibrate=True):
    """A store of kv_len tokens of which the last were appended one by one or a few at once."""
    q, k, v = make_qkv(shape)
    pad = None if padding is None else torch.tensor(padding, dtype=torch.int32)
    calibration = turbo.turbo_calibrate(k, pad) if calibrate else (None, None)
    bits = {"k_bits": k_bits, "v_bits": v_bits, "sink_pages": 1}
    store = cases.store_of(kvcore.turbo_quantize(k, v, *calibration, pad, **bits))
    return Problem(q, store, calibration)


@each_backend
@pytest.mark.parametrize(
    ("shape", "width"),
    [pytest.param(s, i % len(WIDTHS), id=str(s)) for i, s in enumerate([*SHAPES, *LONG_SHAPES])],
)
def test_matches_reference(backend, shape, width):
    if not backend.runs(shape.macs):
        pytest.skip(f"{shape.macs} multiply-adds take too long here")
    problem = make_problem(shape, *WIDTHS[width])
    problem.agree(backend, sas_threshold=None)
    # The threshold drops other scores where the context is split, which short ones are not.
    if shape.kv_len < 512:
        problem.agree(backend, causal=False)


@pytest.mark.isa
@pytest.mark.asan
@each_width
@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
def test_matches_reference_at_every_isa_level(head_dim, k_bits, v_bits):
    for group, q_len in ((1, 1), (2, 1), (4, 1), (5, 1), (7, 1), (8, 2), (3, 9)):
        problem = make_problem(Shape(head_dim, 140, q_len, 1, group), k_bits, v_bits)
        problem.agree(cases.CPU)


@each_backend
@each_width
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("q_len", [1, 2, 5, 64, 65, 200])
def test_rows_match_reference(backend, group, q_len, k_bits, v_bits):
    shape = Shape(64, 333, q_len, 1, group)
    if not backend.runs(shape.macs):
        pytest.skip(f"{shape.macs} multiply-adds take too long here")
    make_problem(shape, k_bits, v_bits).agree(backend)


def test_splits_of_few_rows_are_merged():
    # 16 pages each, with a running maximum of their own; the open page is the last split's.
    problem = make_problem(Shape(64, 2600, 1, 2, 8), (4,), (2,))
    pool, block_table, tail, _ = problem.store.readable
    parts = []
    for first, last in ((0, 16), (16, 32), (32, 40)):
        tokens = (2600 if last == 40 else 64 * last) - 64 * first
        table, lens = block_table[..., first:last].contiguous(), int32(tokens)
        parts.append(turbo.turbo_decode(problem.q, pool, table, tail, lens, *problem.calibration))
    expected = kvcore.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    actual = problem.run(torch.ops.kvcore)
    assert_same_attention(actual, expected)


@each_backend
@pytest.mark.parametrize("q_len", [1, 30])
def test_heads_of_different_widths(backend, q_len):
    shape = Shape(128, 400, q_len, 4, 2, dtype=BF16)
    make_problem(shape, (8, 4, 2, 4), (2, 2, 8, 4)).agree(backend)


@each_backend
@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 500, 2**62])
def test_windows_match_reference(backend, window, q_len):
    make_problem(Shape(64, 1500, q_len, 1, 2)).agree(backend, window=window, sas_threshold=None)


@each_backend
def test_pages_before_the_window_may_be_gone(backend):
    problem = make_problem(Shape(64, 1500, 3, 1, 2))
    before = problem.run(backend.ops, backend.device, window=200)
    # The earliest query sees keys from 1500 - 3 + 1 - 200 on: page 20.
    problem.store.block_table[..., :20] = -1
    after = problem.run(backend.ops, backend.device, window=200)
    for a, b in zip(after, before, strict=True):
        assert_bitwise_equal(a, b)


@each_backend
@pytest.mark.parametrize(
    "scalars",
    [
        {"sas_threshold": -6.0},
        {"sas_threshold": -87.0},
        {"scale": 0.3},
        {"scale": -0.125},
        {"causal": False},
    ],
    ids=str,
)
def test_options_match_reference(backend, scalars):
    # A threshold at which much is dropped drops other scores in parts of the context, each with a
    # maximum of its own, than in one pass; CUDA kernels may have a part for each page.
    is_low = scalars.get("sas_threshold", -15.0) > -10 and backend != cases.CPU
    shape = Shape(64, 64 if is_low else 300, 4, 2, 3, 2)
    make_problem(shape).agree(backend, **scalars)
    make_problem(shape, calibrate=False).agree(backend, **scalars)


@each_backend
@cases.each_append
def test_follows_appends(backend, lens):
    total = sum(lens)
    q, k, v = make_qkv(Shape(64, total, 2, 2, 2))
    calibration = turbo.turbo_calibrate(k)
    store = cases.empty_store(1, 2, 64, total // 64, k_bits=2)
    begin = 0
    for num_new in lens:
        end = begin + num_new
        part = (x[:, :, begin:end].contiguous() for x in (k, v))
        kvcore.turbo_append(*part, *store.writable, *calibration)
        begin = end
        Problem(q, store, calibration).agree(backend)


@each_backend
def test_sequences_of_different_lengths(backend):
    padding = (0, 1, 64, 299, 300, 171)
    problem = make_problem(Shape(64, 300, 3, 2, 2, 6), padding=padding)
    out, lse = problem.agree(backend)
    assert not out[4].any()
    assert (lse[4] == -torch.inf).all()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.025), (4, 0.16)], ids=["8", "4"])
def test_is_close_to_exact_attention(bits, bound):
    q, k, v = (normal(1, 4, n, 128, seed=n) for n in (8, 1000, 1001))
    v = v[:, :, :1000]
    store = cases.store_of(kvcore.turbo_quantize(k, v, k_bits=(bits,), v_bits=(bits,)))
    out, _ = kvcore.turbo_decode(q, *store.readable)
    assert relative_l2(out, exact_attention(q, k, v, causal=True)[0]) < bound


@each_backend
def test_agrees_with_prefill(backend):
    # At 8 bit the store holds the pages that turbo_attention makes; both end on a page edge.
    shape = Shape(128, 320, 70, 2, 4, dtype=BF16)
    problem = make_problem(shape, (8,), (8,))
    q, k, v = (x.to(backend.device) for x in make_qkv(shape))
    tensors = [x.to(backend.device) for x in problem.calibration]
    expected = backend.ops.turbo_attention(q, k, v, *tensors, causal=True)
    assert_same_attention(problem.run(backend.ops, backend.device), expected)


@each_backend
@pytest.mark.parametrize("q_len", [1, 30])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nonfinite_values_stay_where_they_are_seen(backend, value, q_len):
    shape = Shape(64, 1200, q_len, 2, 2, 2)
    for name, index in (
        ("q", (1, 2, 0, 5)),
        ("k", (0, 1, 130, 0)),
        ("v", (1, 0, 5, 63)),
        ("v", (0, 0, 1199, 1)),
    ):
        q, k, v = (x.clone() for x in make_qkv(shape))
        {"q": q, "k": k, "v": v}[name][index] = value
        store = cases.store_of(kvcore.turbo_quantize(k, v))
        problem = Problem(q, store, (None, None))
        out, lse = problem.agree(backend)
        assert out.isnan().any()
        assert not lse.isnan().all()
        out, _ = problem.agree(backend, window=40)
        assert out.isnan().any() == (name == "q" or index[2] > 1100)


@each_backend
def test_poisoned_output(backend, poisoned_memory):
    for shape, padding in (
        (Shape(64, 40, 100, 1, 2), None),
        (Shape(96, 1300, 3, 2, 1, 2, BF16), (1299, 3)),
        (Shape(64, 0, 4), None),
        (Shape(128, 200, 40, 1, 3, 2), (200, 70)),
    ):
        make_problem(shape, padding=padding).agree(backend)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noncontiguous(backend, layout):
    problem = make_problem(Shape(64, 130, 20, 2, 2, 2))
    strided = cases.with_layout(problem.q, layout)
    store = problem.store.to(backend.device)
    moved = cases.with_layout(problem.q.to(backend.device), layout)
    actual = backend.ops.turbo_decode(moved, *store.readable)
    expected = backend.ops.turbo_decode(strided.contiguous().to(backend.device), *store.readable)
    for a, b, name in zip(actual, expected, ("out", "lse"), strict=True):
        assert a.is_contiguous()
        assert_bitwise_equal(a, b, name)


@each_backend
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 70, 5, 2, 2, batch=0),
        Shape(64, 70, 0, 2, 2),
        Shape(64, 0, 5, 2, 2),
        Shape(64, 0, 0, 2, 2),
        Shape(64, 70, 5, 2, 0),
        Shape(96, 1, 1),
        Shape(64, 63, 97, 1, 1),
        Shape(64, 1030, 1, 1, 17),
    ],
    ids=str,
)
def test_empty_and_odd_shapes(backend, shape):
    out, lse = make_problem(shape).agree(backend)
    if shape.kv_len == 0:
        assert not out.any()
        assert (lse == -torch.inf).all()


@each_backend
@pytest.mark.parametrize("q_len", [1, 40])
def test_deterministic(backend, q_len):
    padding = (1500, 3, 0, 900)
    problem = make_problem(Shape(64, 2500, q_len, 2, 4, 4), padding=padding)
    first = problem.run(backend.ops, backend.device)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            again = problem.run(backend.ops, backend.device)
            assert_bitwise_equal(again[0], first[0], f"out of {num_threads} threads")
            assert_bitwise_equal(again[1], first[1], f"lse of {num_threads} threads")
    finally:
        torch.set_num_threads(threads)
    store = problem.store
    for b in range(4):
        rows = slice(b, b + 1)
        single = cases.Store(
            store.pool,
            store.block_table[rows].contiguous(),
            store.tail[rows],
            store.tail_scale[rows],
            store.clamp_count[rows],
            store.seq_lens[rows],
        )
        calibration = tuple(x[rows] for x in problem.calibration)
        alone = Problem(problem.q[rows], single, calibration).run(backend.ops, backend.device)
        assert_bitwise_equal(alone[0], first[0][rows], f"out of entry {b} alone")
        assert_bitwise_equal(alone[1], first[1][rows], f"lse of entry {b} alone")


def test_leaves_the_store_alone():
    problem = make_problem(Shape(64, 300, 3, 2, 2))
    before = problem.store.to("cpu")
    problem.run(torch.ops.kvcore)
    for name, tensor in problem.store.named().items():
        assert_bitwise_equal(tensor, before.named()[name], name)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_opcheck(dtype):
    problem = make_problem(Shape(64, 200, 5, 1, 2, dtype=dtype))
    op = torch.ops.kvcore.turbo_decode.default
    arguments = (problem.q, *problem.store.readable)
    torch.library.opcheck(op, (*arguments, *problem.calibration), {"window": 9})
    torch.library.opcheck(op, arguments, {"causal": False, "sas_threshold": None})


def test_compiled_equals_eager():
    problem = make_problem(Shape(64, 300, 2, 2, 2, dtype=BF16))

    def run(q, pool, block_table, tail, seq_lens):
        out, lse = kvcore.turbo_decode(q * 0.5, pool, block_table, tail, seq_lens)
        return out + 0, lse

    compiled = torch.compile(run, fullgraph=True)
    arguments = (problem.q, *problem.store.readable)
    for a, b in zip(compiled(*arguments), run(*arguments), strict=True):
        assert_bitwise_equal(a, b)


def test_fake_tensors_on_cuda():
    problem = make_problem(Shape(64, 300, 2, 2, 2, dtype=BF16))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, table, tail, lens = (
            torch.empty_like(mode.from_tensor(x), device="cuda")
            for x in (problem.q, *problem.store.readable[1:])
        )
        pool = [torch.empty(9, 10, dtype=torch.uint8, device="cuda")]
        out, lse = kvcore.turbo_decode(q, pool, table, tail, lens)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, BF16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == (q.shape[:3], F32, "cuda")
