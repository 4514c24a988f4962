"""lexico_attention against exact attention over the vectors that the codes stand for."""

import itertools

import pytest
import torch

import cases
import kvcore
from cases import BF16, F16, F32, HEAD_DIMS, LAYOUTS, Shape, each_backend, with_layout
from compare import assert_bitwise_equal, assert_close, relative_l2
from kvcore.reference import lexico
from lexico_cases import make_problem, random_codes


def agree(problem, backend=cases.CPU, **scalars):
    """Within rounding of the output's type; the family's bound is 2e-3."""
    out, lse = problem.run(backend, **scalars)
    want, want_lse = problem.expected(**scalars)
    unit = {F32: 1e-5, F16: 1e-3, BF16: 8e-3}[out.dtype]
    assert_close(lse, want_lse, rtol=1e-5, atol=1e-4, name="lse")
    assert_close(out, want, rtol=unit, atol=unit * 0.1, name="out")
    finite = want.isfinite()
    bound = 2e-3 if out.dtype == BF16 else 1e-3
    assert relative_l2(out.where(finite, 0), want.where(finite, 0)) <= bound
    return out, lse


@each_backend
@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_matches_reference(backend, head_dim):
    for dtype, group, q_len in ((F32, 1, 1), (F32, 5, 1), (F16, 4, 1), (F16, 3, 3), (BF16, 7, 5)):
        shape = Shape(head_dim, 75, q_len, 2, group, dtype=dtype)
        agree(make_problem(shape, buffer=9), backend)


@each_backend
@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize(("dtype", "group"), [(F32, 2), (F16, 4), (BF16, 8)], ids=str)
def test_a_block_matches_reference(backend, dtype, group):
    agree(make_problem(Shape(64, 70, 1, 1, group, dtype=dtype), blocks=1, buffer=3), backend)


@each_backend
@pytest.mark.isa
@pytest.mark.parametrize("q_len", [1, 3])
def test_blocks_match_reference(backend, q_len):
    for group in (1, 4, 6, 10):
        agree(make_problem(Shape(64, 1030, q_len, 1, group), blocks=2, buffer=20), backend)


@each_backend
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 64, 1023, 1024, 1025])
@pytest.mark.parametrize("buffer", [0, 1, 40])
def test_every_length_of_the_tail(backend, tokens, buffer):
    problem = make_problem(Shape(64, tokens, 1, 2, 4), buffer=buffer)
    out, lse = agree(problem, backend)
    if tokens + buffer == 0:
        assert not out.any()
        assert (lse == -torch.inf).all()


@each_backend
def test_many_queries(backend):
    # More rows than one unit takes: no splits, the weights decay from segment to segment.
    q_len = 60 if backend.runs(2 * 16 * 60 * 4300 * 64) else 9
    problem = make_problem(Shape(64, 200, q_len, 2, 4, 2), blocks=1, buffer=80)
    agree(problem, backend)
    agree(problem, backend, causal=False)
    agree(problem, backend, window=100)


@each_backend
@pytest.mark.parametrize("q_len", [1, 30])
def test_sequences_of_different_lengths(backend, q_len):
    problem = make_problem(
        Shape(64, 100, q_len, 2, 2, 3),
        buffer=40,
        tail_lens=(100, 0, 37),
        buffer_lens=(0, 40, 11),
        left_padding=(99, 3, 48),
    )
    agree(problem, backend)
    agree(problem, backend, causal=False)


@each_backend
@pytest.mark.parametrize("window", [1, 2, 31, 33, 90, 1200, 5000, 2**62])
def test_windows(backend, window):
    problem = make_problem(Shape(64, 1100, 2, 1, 2), blocks=1, buffer=30)
    agree(problem, backend, window=window)


@each_backend
def test_more_blocks_than_a_launch_takes(backend):
    problem = make_problem(Shape(64, 40, 2, 1, 2), blocks=1, buffer=3)
    problem.k_blocks, problem.v_blocks = problem.k_blocks * 130, problem.v_blocks * 130
    for window in (30, 4200):
        actual, expected = problem.run(backend, window=window), problem.run(window=window)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, rtol=1e-5, atol=1e-6)


@each_backend
def test_padding_over_a_block(backend):
    problem = make_problem(Shape(64, 50, 2, 1, 2, 2), blocks=1, left_padding=(4100, 4000))
    agree(problem, backend)


@each_backend
@pytest.mark.parametrize("scalars", [{"scale": 0.3}, {"scale": -0.05}, {"causal": False}])
def test_scalars(backend, scalars):
    agree(make_problem(Shape(64, 90, 3, 2, 2), buffer=5), backend, **scalars)


@each_backend
@pytest.mark.parametrize("sparsity", [(1, 1), (64, 3), (2, 64)])
def test_sparsities(backend, sparsity):
    k, v = sparsity
    problem = make_problem(Shape(64, 100, 1, 1, 4), blocks=1, k_sparsity=k, v_sparsity=v)
    agree(problem, backend)


@each_backend
def test_many_atoms(backend):
    agree(make_problem(Shape(64, 300, 1, 1, 4), atoms=(5000, 4097)), backend)
    agree(make_problem(Shape(64, 40, 1, 1, 3, dtype=BF16), blocks=1, atoms=(8200, 300)), backend)


@each_backend
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("size", [1e-5, 300.0])
def test_queries_of_any_size(backend, dtype, size):
    # Large scores too: products with atoms must not be rounded to 16 bits.
    problem = make_problem(Shape(64, 60, 1, 1, 4, dtype=dtype), buffer=3)
    problem.q = problem.q * size
    agree(problem, backend, scale=1.0 / size)


@each_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_atom_that_every_token_has(backend, dtype):
    problem = make_problem(Shape(64, 100, 1, 1, 3, dtype=dtype))
    codes = random_codes(1, 1, 4096, 5, 70, 5), random_codes(1, 1, 4096, 6, 90, 6)
    for indices, coefficients, _ in codes:
        indices[..., 1:] += (indices[..., 1:] == 17).short()
        indices[..., 0], coefficients[..., 0] = 17, 50
    tails = [lexico.empty_tail(1, 1, 128, sparsity) for sparsity in (5, 6)]
    kvcore.lexico_append(*codes[0], *codes[1], *tails, torch.zeros(1, dtype=torch.int32))
    k_block, v_block = kvcore.lexico_seal(*tails, v_atoms=90)
    problem.k_blocks, problem.v_blocks = [k_block], [v_block]
    agree(problem, backend)


@each_backend
@pytest.mark.isa
def test_nonfinite_values_poison_the_rows_that_see_them(backend):
    def problem():
        return make_problem(Shape(64, 70, 4, 1, 2), blocks=1, buffer=12)

    scales = [[0x00, high] for high in (0x7E, 0x7C, 0xFC)]  # NaN, inf, -inf
    for name, scale in itertools.product(("k_tail", "v_tail", "k_blocks", "v_blocks"), scales):
        p = problem()
        # Token 40 of the tail; of V's block token 33, of K's, behind 128 widths, the 31st.
        spoil_scale(p, name, {"k_blocks": 31, "v_blocks": 33}.get(name, 40), scale)
        out, lse = p.run(backend)
        assert out.isnan().all(), name
        assert lse.isnan().all() == name.startswith("k"), name
        want, _ = p.expected()
        assert not want.isfinite().any(), name
        out, _ = agree(p, backend, window=20)
        assert out.isfinite().all(), name
    for name, value in itertools.product(
        ("k_buffer", "v_buffer"), (torch.nan, torch.inf, -torch.inf)
    ):
        p = problem()
        getattr(p, name)[0, 0, 9, 3] = value
        out, _ = p.run(backend)
        # The last three of four queries are at or behind the buffer's tenth token, of twelve.
        assert (~out.isfinite()).any(-1).tolist() == [[[False, True, True, True]] * 2], name
    for value in (torch.nan, torch.inf, -torch.inf):
        p = problem()
        p.q[0, 1, 2, 5] = value
        out, lse = p.run(backend)
        wrong = torch.zeros(1, 2, 4, dtype=torch.bool)
        wrong[0, 1, 2] = True
        assert torch.equal(out.isnan().all(-1), wrong)
        assert torch.equal(lse.isnan(), wrong)


def spoil_scale(problem, name, token, scale):
    """Another scale of a token, two bytes, in all heads: of the tail, or of the first 32 of K's
    block and any of V's."""
    data = getattr(problem, name)
    data = data[0] if isinstance(data, list) else data[:, :, token // 32]
    at = {"k_blocks": 128 + 2 * token, "v_blocks": 2 * token}.get(name, 2 * (token % 32))
    data[..., at : at + 2] = torch.tensor(scale, dtype=torch.uint8)


@each_backend
@pytest.mark.isa
@pytest.mark.parametrize("high", [0x7E, 0x7C, 0xFC], ids=["nan", "inf", "-inf"])
def test_nonfinite_values_do_not_reach_rows_that_do_not_see_them(backend, high):
    """Hidden tokens beside visible ones, in the same tile."""
    value = torch.tensor([0x00, high], dtype=torch.uint8).view(F16).float()

    def problem(**spoiled):
        p = make_problem(Shape(64, 70, 4, 1, 2), blocks=1, buffer=12)
        for name, token in spoiled.items():
            if name.endswith("buffer"):
                getattr(p, name)[:, :, token] = value
            else:
                spoil_scale(p, name, token, [0x00, high])
        return p

    # The first query is token 4174, the last 4177; of them, the first that one sees is
    # 25 in the block; 4136, 40 in the tail; 4170, 4 in the buffer.
    hidden = (
        ({"k_blocks": 8, "v_blocks": 8}, 4150),
        ({"k_tail": 39, "v_tail": 39}, 39),
        ({"k_buffer": 3, "v_buffer": 3}, 5),
    )
    for spoiled, window in hidden:
        clean = problem().run(backend, window=window)
        for a, b in zip(problem(**spoiled).run(backend, window=window), clean, strict=True):
            assert_bitwise_equal(a, b, str(spoiled))
    # The last token is seen by the last query alone.
    clean = problem().run(backend)
    for name in ("k_buffer", "v_buffer"):
        out, lse = problem(**{name: 11}).run(backend)
        assert_bitwise_equal(out[:, :, :3], clean[0][:, :, :3], name)
        assert not out[:, :, 3].isfinite().any()
        assert_bitwise_equal(lse[:, :, :3], clean[1][:, :, :3], name)


@each_backend
def test_poisoned_output(backend, poisoned_memory):
    agree(make_problem(Shape(64, 40, 100, 1, 2)), backend)
    agree(make_problem(Shape(96, 1300, 3, 2, 1, 2), blocks=1, left_padding=(5300, 3)), backend)
    agree(make_problem(Shape(64, 0, 4)), backend)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noncontiguous(backend, layout):
    problem = make_problem(Shape(64, 60, 6, 2, 2, 2), buffer=30)
    names = ("q", "k_buffer", "v_buffer")
    for name in names:
        setattr(problem, name, with_layout(getattr(problem, name), layout))
    actual = problem.run(backend)
    for name in names:
        setattr(problem, name, getattr(problem, name).contiguous())
    for a, b in zip(actual, problem.run(backend), strict=True):
        assert a.is_contiguous()
        assert_bitwise_equal(a, b)


@each_backend
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 70, 5, 2, 2, batch=0),
        Shape(64, 70, 0, 2, 2),
        Shape(64, 70, 5, 2, 0),
        Shape(64, 3, 97, 1, 1),
        Shape(64, 130, 1, 1, 17),
    ],
    ids=str,
)
def test_empty_and_odd_shapes(backend, shape):
    problem = make_problem(shape)
    out, lse = problem.run(backend)
    assert (out.shape, lse.shape) == (problem.q.shape, problem.q.shape[:3])
    if out.numel():
        agree(problem, backend)


@each_backend
@pytest.mark.parametrize("q_len", [1, 44])
def test_deterministic(backend, q_len):
    shape = Shape(64, 1500, q_len, 2, 4, 3)
    # With 44 queries the CUDA kernels share the work out otherwise than for one sequence alone.
    blocks = 1 if q_len == 1 or backend.runs(4 * shape.macs) else 0
    problem = make_problem(shape, blocks=blocks, buffer=30, tail_lens=(1500, 3, 900))
    first = problem.run(backend)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5) if backend == cases.CPU else (1,):
            torch.set_num_threads(num_threads)
            for a, b in zip(problem.run(backend), first, strict=True):
                assert_bitwise_equal(a, b, f"{num_threads} threads")
    finally:
        torch.set_num_threads(threads)
    for b in range(3):
        rows = slice(b, b + 1)
        alone = make_problem(Shape(64, 0, q_len, 2, 4))
        for name in ("q", "k_tail", "v_tail", "tail_lens", "k_buffer", "v_buffer"):
            setattr(alone, name, getattr(problem, name)[rows])
        alone.k_blocks = [x[rows] for x in problem.k_blocks]
        alone.v_blocks = [x[rows] for x in problem.v_blocks]
        for x, y in zip(alone.run(backend), first, strict=True):
            assert_bitwise_equal(x, y[rows], f"entry {b} alone")


def test_partial_results_merge():
    problem = make_problem(Shape(64, 90, 1, 2, 4), blocks=1, buffer=17)
    whole = problem.run()
    store = problem.run()
    tail = problem.tail_lens.clone()
    buffer = (problem.k_buffer, problem.v_buffer)
    problem.k_buffer = problem.v_buffer = None
    parts = [problem.run(causal=False)]
    blocks = (problem.k_blocks, problem.v_blocks)
    problem.k_blocks, problem.v_blocks, problem.tail_lens = [], [], tail * 0
    problem.k_buffer, problem.v_buffer = buffer
    parts.append(problem.run(causal=False))
    merged = kvcore.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    for a, b, c in zip(merged, whole, store, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert_bitwise_equal(b, c)
    assert len(blocks[0]) == 1


def test_leaves_the_store_alone():
    problem = make_problem(Shape(64, 100, 2, 1, 2), blocks=1, buffer=5)
    flat = lambda: [y for x in problem.tensors() for y in (x if isinstance(x, list) else [x])]  # noqa: E731
    before = [x if x is None else x.clone() for x in flat()]
    problem.run()
    for a, b in zip(flat(), before, strict=True):
        if a is not None:
            assert_bitwise_equal(a, b)


def test_encoded_vectors_are_attended():
    # From vectors to the output through every op, in the types of a model.
    torch.manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(256, 64), dim=1)
    k, v = (torch.randn(1, 2, 70, 64).bfloat16() for _ in range(2))
    q = torch.randn(1, 8, 1, 64).bfloat16()
    codes = [kvcore.lexico_encode(x, dictionary, sparsity=16)[:3] for x in (k, v)]
    tails = [torch.zeros(1, 2, 4, 64 + 96 * 16, dtype=torch.uint8) for _ in range(2)]
    lens = torch.zeros(1, dtype=torch.int32)
    kvcore.lexico_append(*codes[0], *codes[1], *tails, lens)
    out, _ = kvcore.lexico_attention(q, [], [], *tails, lens, dictionary, dictionary)
    back = [kvcore.lexico_reconstruct(*c, dictionary).repeat_interleave(4, 1) for c in codes]
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), *back)
    # bf16 rounds the output to 2^-9.
    assert relative_l2(out, want) <= 2e-3
