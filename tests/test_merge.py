"""Merging partial attention results."""

import itertools

import pytest
import torch

import kvcore
from cases import DTYPES, Shape, make_qkv, normal
from compare import assert_close, assert_same_attention, assert_same_nonfinite
from kvcore.reference import exact_attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", [(0, 100), (0, 37, 100), (0, 1, 64, 65, 100), (0, 0, 50, 100)])
def test_matches_one_pass(bounds, dtype):
    q, k, v = make_qkv(Shape(64, 100, 5, 2, 2, 2, dtype))
    parts = [exact_attention(q, k[:, :, a:b], v[:, :, a:b]) for a, b in itertools.pairwise(bounds)]
    out, lse = kvcore.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    want, want_lse = exact_attention(q, k, v)
    # fp32 carries lse of about 30 to 2e-6, which is the relative error of a weight.
    bound = max(4 * torch.finfo(dtype).eps, 1e-5)
    assert_close(out, want, rtol=bound, atol=bound, name="out")
    assert_close(lse, want_lse, rtol=0, atol=1e-5, name="lse")


def test_merges_turbo_attention():
    # Split at a page edge the parts quantize the same blocks.
    q, k, v = make_qkv(Shape(64, 300, 3, 2, 2))
    parts = [
        kvcore.turbo_attention(q, k[:, :, a:b], v[:, :, a:b], sas_threshold=None)
        for a, b in ((0, 128), (128, 192), (192, 300))
    ]
    merged = kvcore.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    assert_same_attention(merged, kvcore.turbo_attention(q, k, v, sas_threshold=None))


def test_rows_without_keys():
    outs = [normal(3, 4, seed=i) for i in range(2)]
    outs[0][0], outs[1][0], outs[1][1] = 0, 0, 0
    lses = [torch.tensor([-torch.inf, 1.0, 2.0]), torch.tensor([-torch.inf, -torch.inf, 1e4])]
    out, lse = kvcore.merge_attention(outs, lses)
    assert_close(out[0], torch.zeros(4), rtol=0, atol=0)
    assert_close(out[1], outs[0][1], rtol=1e-6, atol=0)
    assert_close(out[2], outs[1][2], rtol=1e-6, atol=0)
    assert_close(lse, torch.tensor([-torch.inf, 1, 1e4]), rtol=1e-6, atol=0)


def test_nan_stays_in_its_row():
    outs, lses = [normal(3, 4, seed=i) for i in range(2)], [torch.zeros(3) for _ in range(2)]
    outs[1][1], lses[1][1] = torch.nan, torch.nan
    out, lse = kvcore.merge_attention(outs, lses)
    want = torch.zeros(3, 4)
    want[1] = torch.nan
    assert_same_nonfinite(out, want)
    assert_same_nonfinite(lse, want[:, 0].contiguous())


def test_compiled_equals_eager():
    outs = [normal(2, 3, 5, 8, seed=i) for i in range(3)]
    lses = [normal(2, 3, 5, seed=i + 9) for i in range(3)]
    compiled = torch.compile(kvcore.merge_attention, fullgraph=True, backend="aot_eager")
    for actual, want in zip(compiled(outs, lses), kvcore.merge_attention(outs, lses), strict=True):
        assert_close(actual, want, rtol=1e-6, atol=1e-6)


REJECTED = [
    ([], [], "outs must be at least one tensor, got none"),
    ([torch.zeros(2, 4)], [], "lses must be 1 tensors like outs, got 0"),
    ([torch.tensor(0.0)], [torch.zeros(())], r"outs\[0\] must be \[..., head_dim\], got a scalar"),
    (
        [torch.zeros(2, 4), torch.zeros(2, 5)],
        [torch.zeros(2)] * 2,
        r"outs\[1\] must be \[2, 4\], got \[2, 5\]",
    ),
    (
        [torch.zeros(2, 4), torch.zeros(2, 4).half()],
        [torch.zeros(2)] * 2,
        r"outs\[1\] must be torch.float32, got torch.float16",
    ),
    (
        [torch.zeros(2, 4), torch.zeros(2, 4, device="meta")],
        [torch.zeros(2)] * 2,
        r"outs\[1\] must be on cpu, got meta",
    ),
    ([torch.zeros(2, 4)], [torch.zeros(3)], r"lses\[0\] must be \[2\], got \[3\]"),
    (
        [torch.zeros(2, 4)],
        [torch.zeros(2).double()],
        r"lses\[0\] must be torch.float32, got torch.float64",
    ),
    (
        [torch.zeros(2, 4)],
        [torch.zeros(2, device="meta")],
        r"lses\[0\] must be on cpu, got meta",
    ),
]


@pytest.mark.parametrize(("outs", "lses", "message"), REJECTED, ids=range(len(REJECTED)))
def test_rejects(outs, lses, message):
    with pytest.raises(RuntimeError, match=f"^merge_attention: {message}$"):
        kvcore.merge_attention(outs, lses)
