"""Exact attention on CPUs: forward and backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import kvcore
from cases import BF16, F16, F32, LAYOUTS, normal
from compare import assert_bitwise_equal, assert_close, relative_l2
from dense_cases import (
    LSE_ATOL,
    MAX_ERROR,
    MAX_GRADIENT_ERROR,
    NAMES,
    PROBLEMS,
    SMALL,
    Problem,
    assert_near,
    doubles,
    expected_of,
)
from kvcore.ops import dense_autograd
from kvcore.reference import dense as reference


def run(q, k, v, d_out, **scalars):
    """Results and gradients of the ops."""
    results = kvcore.dense_attention(q, k, v, **scalars)
    return results, kvcore.dense_attention_backward(d_out, q, k, v, *results, **scalars)


def check(problem, **scalars):
    tensors, scalars = problem.make(), {"causal": problem.causal, **scalars}
    (out, lse), grads = run(*tensors, **scalars)
    (expected, expected_lse), expected_grads = expected_of(*tensors, **scalars)
    assert {x.dtype for x in (out, *grads)} == {problem.dtype}
    assert_near(out, expected, MAX_ERROR[problem.dtype], "out")
    assert_close(lse.double(), expected_lse, rtol=1e-6, atol=LSE_ATOL, name="lse")
    for a, e, name in zip(grads, expected_grads, NAMES, strict=True):
        if problem.kv_len == 1 and name != "dv":
            # One weight, always 1: what is left of dP - delta when all has cancelled.
            assert a.abs().max() <= 4 * MAX_GRADIENT_ERROR[problem.dtype]
            continue
        assert_near(a, e, MAX_GRADIENT_ERROR[problem.dtype], name)


@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_kernels(problem):
    check(problem)


@pytest.mark.isa
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_matches_reference(problem):
    check(problem)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_many_tiles(dtype):
    check(Problem(700, 900, 64, 1, 2, dtype=dtype))


@pytest.mark.asan
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_noncontiguous(layout, dtype):
    check(Problem(70, 140, 32, 2, 2, 2, dtype, layout=layout))


def test_the_reference_is_the_derivative():
    for causal, (q_len, kv_len) in itertools.product((False, True), ((5, 9), (9, 5), (7, 7))):
        problem = Problem(q_len, kv_len, 16, 2, 2, 2)
        q, k, v, d_out = doubles(problem.make())
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = reference.dense_attention(*leaves, causal=causal, scale=0.3)
        seen = lse.isfinite()
        d_lse = normal(*lse.shape, seed=9).double().where(seen, 0)
        total = (out * d_out).sum() + (lse * d_lse)[seen].sum()
        expected = torch.autograd.grad(total, leaves)
        actual = reference.dense_attention_backward(
            d_out, q, k, v, out, lse, d_lse, causal=causal, scale=0.3
        )
        for a, e, name in zip(actual, expected, NAMES, strict=True):
            assert_near(a, e, 1e-12, name)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_matches_torch(dtype, causal):
    """No further from fp64 than scaled_dot_product_attention is, or not much."""
    tensors = Problem(300, 300, 64, 2, 2, 2, dtype).make()
    (out, _), grads = run(*tensors, causal=causal)

    def of_torch(q, k, v, d_out):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        result = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
        return [result, *torch.autograd.grad(result, leaves, d_out)]

    exact, theirs = of_torch(*doubles(tensors)), of_torch(*tensors)
    for a, t, e in zip((out, *grads), theirs, exact, strict=True):
        bound = 1.2 * relative_l2(t, e)
        assert_near(a, e, max(bound, MAX_GRADIENT_ERROR[F32]), "result")


@pytest.mark.isa
@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 20.0])
def test_scale(scale):
    # Weights next to 0 and 1 leave gradients of differences: of fp32, errors of the scores.
    problem = Problem(70, 150, 32, 1, 2)
    tensors = problem.make()
    scalars = {"causal": True, "scale": scale}
    (out, lse), grads = run(*tensors, **scalars)
    (expected, expected_lse), expected_grads = expected_of(*tensors, **scalars)
    bound = 1e-6 * max(1.0, 10 * abs(scale))
    assert_near(out, expected, bound, "out")
    assert_close(lse.double(), expected_lse, rtol=1e-6, atol=LSE_ATOL, name="lse")
    for a, e, name in zip(grads, expected_grads, NAMES, strict=True):
        if scale == 0.0 and name != "dv":
            assert_bitwise_equal(a.abs(), torch.zeros_like(a))
        else:
            assert_near(a, e, 3 * bound, name)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_scores(dtype):
    """Differences beyond what fp32 has exponents for: weights are 0 or 1."""
    q, k, v, d_out = Problem(70, 150, dtype=dtype).make()
    (out, lse), grads = run(100 * q, 100 * k, v, d_out, causal=True)
    (expected, expected_lse), _ = expected_of(100 * q, 100 * k, v, d_out, causal=True)
    assert_near(out, expected, {F32: 1e-3, BF16: 5e-3}[dtype], "out")
    assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0, name="lse")
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.isa
@pytest.mark.asan
def test_gradient_of_lse():
    for causal in (False, True):
        q, k, v, d_out = Problem(70, 130, 32, 1, 2).make()
        d_lse = normal(1, 2, 70, seed=7)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = kvcore.dense_attention(*leaves, causal=causal)
        both = torch.autograd.grad((out, lse), leaves, (d_out, d_lse), retain_graph=True)
        alone = torch.autograd.grad(lse, leaves, d_lse)
        wide = doubles([d_out, q.detach(), k.detach(), v.detach(), out.detach(), lse.detach()])
        expected = reference.dense_attention_backward(*wide, d_lse.double(), causal=causal)
        for a, e, name in zip(both, expected, NAMES, strict=True):
            assert_near(a, e, MAX_GRADIENT_ERROR[F32], name)
        wide[0] = torch.zeros_like(wide[0])
        expected = reference.dense_attention_backward(*wide, d_lse.double(), causal=causal)
        for a, e, name in zip(alone[:2], expected, NAMES, strict=False):
            assert_near(a, e, MAX_GRADIENT_ERROR[F32], name)
        assert_bitwise_equal(alone[2].abs(), torch.zeros_like(v))


def test_partial_results_merge():
    q, k, v, d_out = Problem(64, 200, causal=False).make()
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = kvcore.dense_attention(*whole)
    expected = torch.autograd.grad(out, whole, d_out)
    parts = [x.clone().requires_grad_() for x in (q, k, v)]
    results = [kvcore.dense_attention(parts[0], *(x[:, :, s] for x in parts[1:]))
               for s in (slice(0, 70), slice(70, 200))]  # fmt: skip
    merged, merged_lse = kvcore.merge_attention(*map(torch.stack, zip(*results, strict=True)))
    assert_near(merged, out.double(), 1e-6, "out")
    assert_near(merged_lse, lse.double(), 1e-6, "lse")
    for a, e, name in zip(torch.autograd.grad(merged, parts, d_out), expected, NAMES, strict=True):
        assert_near(a, e.double(), 1e-5, name)


# ---- what is not a number


PLACES = [(0, 5), (1, 3), (1, 75), (1, 129), (2, 0), (2, 77), (2, 139), (3, 6), (3, 69)]


@pytest.mark.isa
@pytest.mark.asan
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("which", "token"), PLACES)
def test_what_is_not_finite_reaches_what_sees_it(which, token, dtype):
    problem = Problem(70, 140, 32, 1, 2, 2, dtype)
    clean = run(*problem.make(), causal=True)
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors = problem.make()
        tensors[which][1, 0, token, 3] = value
        (out, lse), grads = run(*tensors, causal=True)
        (expected, expected_lse), expected_grads = expected_of(*tensors, causal=True)
        names = ("out", "lse", *NAMES)
        every = zip(
            names,
            (out, lse, *grads),
            (expected, expected_lse, *expected_grads),
            (*clean[0], *clean[1]),
            strict=True,
        )
        reached = 0
        for name, a, e, c in every:
            wrong = a.isfinite() != e.isfinite()
            assert not wrong.any(), f"{name} at {wrong.nonzero()[:4].tolist()}"
            reached += int((~e.isfinite()).sum())
            kept = e.isfinite()
            close = (a.double() - c.double()).where(kept, 0).norm()
            # A score of -inf is a weight of 0, which moves others: only what is not reached stays.
            if value != value or which >= 2:
                assert close <= 1e-2 * c.double().norm(), name
        assert reached > 0


@pytest.mark.isa
def test_minus_infinity_hides():
    """A key of -inf along a query of ones has no weight."""
    q, k, v, _ = Problem(20, 40, 16, causal=False).make()
    q = q.abs() + 0.1
    hidden = k.clone()
    hidden[:, :, 7, :] = -float("inf")
    kept = torch.arange(40) != 7
    out, lse = kvcore.dense_attention(q, hidden, v)
    expected, expected_lse = kvcore.dense_attention(q, k[:, :, kept], v[:, :, kept])
    assert_close(out, expected, rtol=1e-5, atol=1e-6, name="out")
    assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6, name="lse")


# ---- nothing


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_empty(dtype):
    for batch, q_len, kv_len, heads in ((0, 3, 3, 2), (1, 0, 5, 2), (2, 5, 0, 2), (1, 3, 3, 0)):
        q = torch.zeros(batch, heads, q_len, 32, dtype=dtype)
        k = torch.zeros(batch, 2 if heads else 1, kv_len, 32, dtype=dtype)
        for causal in (False, True):
            (out, lse), (dq, dk, dv) = run(q, k, k, q, causal=causal)
            assert_bitwise_equal(out, torch.zeros_like(q))
            assert_bitwise_equal(dq, torch.zeros_like(q))
            assert_bitwise_equal(dk, torch.zeros_like(k))
            assert_bitwise_equal(dv, torch.zeros_like(k))
            assert lse.shape == q.shape[:3]
            assert (lse == -float("inf")).all() or kv_len > 0


@pytest.mark.isa
def test_queries_without_keys():
    for dtype in (F32, BF16):
        (out, lse), grads = run(*Problem(150, 20, dtype=dtype).make(), causal=True)
        assert_bitwise_equal(out[:, :, :130], torch.zeros_like(out[:, :, :130]))
        assert (lse[:, :, :130] == -float("inf")).all()
        assert_bitwise_equal(grads[0][:, :, :130].abs(), torch.zeros_like(out[:, :, :130]))


def test_poisoned_output(poisoned_memory):
    for problem in (Problem(70, 150, 48, 2, 2, 2), Problem(130, 20, dtype=BF16)):
        (out, _), grads = run(*problem.make(), causal=True)
        assert all(x.isfinite().all() for x in (out, *grads))


# ---- bits


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.isa
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_deterministic(dtype, kv_heads, threads):
    """One key head is shared by the threads, three are not where there are two."""
    tensors = Problem(300, 400, 32, kv_heads, 2, dtype=dtype).make()
    every = []
    for count in (1, 2, 2, 5):
        threads(count)
        results, grads = run(*tensors, causal=True)
        every.append((*results, *grads))
    for other in every[1:]:
        for a, e, name in zip(other, every[0], ("out", "lse", *NAMES), strict=True):
            assert_bitwise_equal(a, e, name)


def test_heads_are_next_to_each_other():
    q, k, v, d_out = Problem(10, 20, 32, 2, 2, 2).make()
    (out, _), grads = run(q, k, v, d_out)
    for x in (out, *grads):
        assert x.transpose(1, 2).is_contiguous()


# ---- torch


def test_opcheck():
    for causal in (False, True):
        q, k, v, d_out = Problem(5, 9, 16, 1, 2).make()
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        scalars = {"causal": causal}
        torch.library.opcheck(torch.ops.kvcore.dense_attention.default, leaves, scalars)
        results = kvcore.dense_attention(q, k, v, **scalars)
        arguments = (d_out, q, k, v, *results, normal(1, 2, 5, seed=4))
        torch.library.opcheck(torch.ops.kvcore.dense_attention_backward.default, arguments, scalars)


def test_backward_is_differentiable_once():
    q, k, v, _ = Problem(5, 9, 16).make()
    out, _ = kvcore.dense_attention(q.requires_grad_(), k, v)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="dense_attention_backward: has no backward"):
        dq.sum().backward()


def test_compiles():
    tensors = Problem(20, 30, 32, 1, 2).make()[:3]

    def function(q, k, v):
        return kvcore.dense_attention(2 * q, k, v, causal=True)[0].sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    every = []
    for f in (function, compiled):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = f(*leaves)
        out.sum().backward()
        every.append((out.detach(), *(x.grad for x in leaves)))
    for a, e in zip(*every, strict=True):
        assert_bitwise_equal(a, e)


def test_on_gpus_the_error_names_torchs_function():
    for name in ("dense_attention", "dense_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kvcore::{name}", "CUDA")
        with FakeTensorMode():
            q = torch.empty(1, 1, 4, 16, device="cuda")
        message = f"{name}: tensors must be on cpu, got cuda:0; on GPUs use .*scaled_dot_product"
        with pytest.raises(RuntimeError, match=message):
            dense_autograd.refuse_cuda(name)(q, q, q)
