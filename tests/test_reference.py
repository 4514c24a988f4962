"""The references against mathematics they do not share code with."""

import math

import pytest
import torch
from torch.nn import functional as F

import cases
from compare import assert_bitwise_equal, assert_close, assert_same_attention, relative_l2
from kvcore.reference import exact_attention, turbo
from kvcore.reference.turbo import blocks
from kvcore.reference.turbo.attention import sas

# ---- exact attention


def softmax_by_hand(q, k, v, *, causal=False, window=None, kv_len=None):
    """One row at a time, in Python floats' precision."""
    batch, q_heads, q_len, head_dim = q.shape
    group = q_heads // k.shape[1]
    kv_len = k.shape[2] if kv_len is None else kv_len
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(q_heads):
            for i in range(q_len):
                last = i + kv_len - q_len if causal else kv_len - 1
                first = 0 if window is None else max(0, last - window + 1)
                if last < 0:
                    continue
                keys = k[b, h // group, first : last + 1].double()
                scores = keys @ q[b, h, i].double() / math.sqrt(head_dim)
                lse[b, h, i] = scores.logsumexp(0)
                out[b, h, i] = scores.softmax(0) @ v[b, h // group, first : last + 1].double()
    return out, lse


@cases.each_shape
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 5)])
def test_exact_attention_is_softmax(shape, causal, window):
    if shape.q_len > 100 or shape.head_dim > 96:
        shape = cases.dataclasses.replace(shape, q_len=min(shape.q_len, 70), head_dim=64)
    q, k, v = cases.make_qkv(shape)
    want = softmax_by_hand(q, k, v, causal=causal, window=window)
    exact = exact_attention(q, k, v, causal=causal, window=window, dtype=torch.float64)
    for got, expected, name in zip(exact, want, ("out", "lse"), strict=True):
        assert_close(got, expected, rtol=1e-12, atol=1e-12, name=name)
    single = exact_attention(q, k, v, causal=causal, window=window)
    for got, expected, name in zip(single, want, ("out", "lse"), strict=True):
        assert_close(got, expected.float(), rtol=1e-4, atol=1e-4, name=name)


def test_exact_attention_is_sdpa_with_a_bottom_right_mask():
    q, k, v = cases.make_qkv(cases.Shape(64, 90, 33, 2, 3, 2))
    mask = torch.ones(33, 90, dtype=torch.bool).tril(90 - 33)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    got, _ = exact_attention(q, k, v, causal=True)
    assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_exact_attention_of_packed_and_short_sequences():
    q, k, v = cases.make_qkv(cases.Shape(64, 50, 20, 1, 2))
    cu_q, cu_k = torch.tensor([0, 7, 7, 20]), torch.tensor([0, 30, 35, 50])
    out, lse = exact_attention(q, k, v, cu_q, cu_k, causal=True)
    want = softmax_by_hand(q[:, :, 7:], k[:, :, 35:], v[:, :, 35:], causal=True)
    assert_close(out[:, :, 7:], want[0].float(), rtol=1e-4, atol=1e-5)
    q2, k2, v2 = (x.expand(2, -1, -1, -1) for x in (q, k, v))
    out, lse = exact_attention(q2, k2, v2, kv_lens=torch.tensor([50, 11]), causal=True)
    want = softmax_by_hand(q, k[:, :, :11], v[:, :, :11], causal=True)
    assert_close(out[1:], want[0].float(), rtol=1e-4, atol=1e-5)
    assert_close(lse[1:], want[1].float(), rtol=1e-4, atol=1e-5)


def test_exact_attention_keeps_nan_where_it_is_attended():
    q, k, v = cases.make_qkv(cases.Shape(64, 10, 10))
    v[0, 0, 6, 3] = math.nan
    out, lse = exact_attention(q, k, v, causal=True)
    assert out[0, 0, :6].isfinite().all()
    assert out[0, 0, 6:].isnan().any(-1).all()
    assert lse.isfinite().all()


# ---- quantized attention


def make_store(k, v, calibration=(None, None), padding=None, **widths):
    return cases.store_of(turbo.turbo_quantize(k, v, *calibration, padding, **widths))


def test_sas_is_the_exponential_above_its_threshold():
    x = torch.linspace(-10, 0, 200_001)
    error = (sas(x, -10.0).double() - x.double().exp()).abs() / x.double().exp()
    assert error.max() < 1.2e-4
    assert sas(torch.zeros(1), -10.0).item() == 1.0
    below = torch.tensor([-10.001, -50.0, -1e30, -math.inf])
    assert sas(below, -10.0).tolist() == [0.0] * 4
    assert_close(sas(x, None), x.exp(), rtol=1e-6, atol=0)


@cases.each_shape
@pytest.mark.parametrize("window", [None, 70])
def test_quantized_attention_is_near_softmax(shape, window):
    q, k, v = cases.make_qkv(shape)
    calibration = turbo.turbo_calibrate(k)
    want = exact_attention(q, k, v, causal=True, window=window, dtype=torch.float64)
    out, lse = turbo.turbo_attention(q, k, v, *calibration, causal=True, window=window)
    assert out.dtype == shape.dtype
    assert relative_l2(out, want[0]) < 0.05
    seen = want[1].isfinite()
    assert seen.equal(lse.isfinite())
    assert (lse.double() - want[1])[seen].abs().max() < 0.15


def attention_by_hand(q, k8, s_k, v8, s_v, scale):
    """Page by page in fp64 for one row and one head, with exact exponentials."""
    s_q = q.abs().max() / 119
    q8 = (q / s_q).round()
    m, total, out = -math.inf, 0.0, torch.zeros(q.shape[0], dtype=torch.float64)
    for page in range(len(k8)):
        s = float(s_q) * scale * float(s_k[page]) * (k8[page].double() @ q8.double())
        new_m = max(m, float(s.max()))
        p = (s - new_m).exp()
        p8 = (p * 119 / p.max()).round()
        decay = math.exp(m - new_m)
        total = decay * total + float(p.sum())
        out = decay * out + float(p.max() * s_v[page]) / 119 * (v8[page].double().T @ p8)
        m = new_m
    return out / total, m + math.log(total)


def test_attention_follows_the_page_loop():
    q, k, v = cases.make_qkv(cases.Shape(64, 192))
    pages = torch.stack([k, v])[:, 0, 0].unflatten(1, (3, 64))
    codes, scale = blocks.stage1(pages)
    want = attention_by_hand(q[0, 0, 0], codes[0], scale[0], codes[1], scale[1], 0.2)
    out, lse = turbo.turbo_attention(q, k, v, scale=0.2, sas_threshold=None)
    assert relative_l2(out[0, 0, 0], want[0]) < 1e-5
    assert abs(lse.item() - want[1]) < 1e-5


@cases.each_shape
def test_decode_at_8_bit_is_prefill(shape):
    """Both attend the same codes when all tokens came in whole pages or the margin is 1."""
    q, k, v = cases.make_qkv(shape)
    full = shape.kv_len // 64 * 64
    if full == 0:
        full = shape.kv_len
    k, v = k[:, :, :full], v[:, :, :full]
    calibration = turbo.turbo_calibrate(k)
    widths = {"k_bits": [8], "v_bits": [8], "tail_margin": 1.0}
    store = make_store(k, v, calibration=calibration, **widths)
    got = turbo.turbo_decode(q, *store.readable, *calibration)
    want = turbo.turbo_attention(q, k, v, *calibration, causal=True)
    for a, b in zip(got, want, strict=True):
        assert_bitwise_equal(a, b)


def test_decode_attends_what_dequantize_returns():
    shape = cases.Shape(64, 300, 5, 2, 3, 2)
    q, k, v = cases.make_qkv(shape)
    padding = torch.tensor([0, 120], dtype=torch.int32)
    calibration = turbo.turbo_calibrate(k, padding)
    store = make_store(k, v, calibration=calibration, padding=padding, k_bits=[4], v_bits=[2])
    dense = turbo.turbo_dequantize(*store.readable, *calibration, kv_len=300)
    want = exact_attention(q, *dense, kv_lens=store.seq_lens, causal=True)
    got = turbo.turbo_decode(q, *store.readable, *calibration, sas_threshold=None)
    assert relative_l2(got[0], want[0]) < 0.02
    assert (got[1] - want[1]).abs().max() < 0.05


def test_packed_sequences_are_attended_alone():
    q, k, v = cases.make_qkv(cases.Shape(64, 200, 150, 2, 2))
    cu_q, cu_k = torch.tensor([0, 50, 50, 150]), torch.tensor([0, 130, 140, 200])
    calibration = turbo.turbo_calibrate(k)
    got = turbo.turbo_attention(q, k, v, *calibration, cu_q, cu_k, causal=True)
    want = turbo.turbo_attention(
        q[:, :, 50:], k[:, :, 140:], v[:, :, 140:], *calibration, causal=True
    )
    assert_same_attention((got[0][:, :, 50:], got[1][:, :, 50:]), want)


def test_edges_of_attention():
    q, k, v = cases.make_qkv(cases.Shape(64, 130, 140, 1, 2))
    q[0, 0, 100], q[0, 1, 3], q[0, 1, 139] = 0, math.nan, math.inf
    v[0, 0, 128, 0] = math.inf
    out, lse = turbo.turbo_attention(q, k, v, causal=True)
    # Ten queries precede every key; a NaN query there attends nothing.
    assert not out[0, :, :10].any()
    assert lse[0, :, :10].eq(-math.inf).all()
    nan = torch.zeros(2, 140, dtype=torch.bool)
    nan[1, 139] = True
    nan[:, 138:] = True  # key 128 is seen from query 138 on
    assert lse[0].isnan().equal(nan)
    assert out[0].isnan().all(-1).equal(nan)
    assert out[0].isnan().any(-1).equal(nan)
    # A query of zeros attends its 91 keys alike.
    assert abs(lse[0, 0, 100].item() - math.log(91)) < 1e-5
    assert relative_l2(out[0, 0, 100], v[0, 0, :91].mean(0)) < 0.05


def test_no_keys_and_no_queries():
    q, k, v = (torch.zeros(2, 1, n, 64) for n in (3, 0, 0))
    out, lse = turbo.turbo_attention(q, k, v, *turbo.turbo_calibrate(k))
    assert not out.any()
    assert lse.eq(-math.inf).all()
    store = make_store(k, v)
    assert store.pool == []
    assert store.block_table.shape == (2, 2, 1, 0)
    out, lse = turbo.turbo_decode(q, *store.readable)
    assert not out.any()
    assert lse.eq(-math.inf).all()
    out, lse = turbo.turbo_decode(q[:, :, :0], *store.readable)
    assert out.shape == (2, 1, 0, 64)
    assert lse.shape == (2, 1, 0)


# ---- the comparator


def test_comparisons_name_what_differs():
    a = torch.zeros(2, 3)
    b = a.clone()
    b[1, 2] = math.nan
    with pytest.raises(AssertionError, match=r"x: unexpected NaN: 1 of 6 at \(1, 2\)"):
        assert_close(b, a, rtol=1, atol=1, name="x")
    b[1, 2] = math.inf
    with pytest.raises(AssertionError, match=r"x: missing inf: 1 of 6 at \(1, 2\)"):
        assert_close(a, b, rtol=1, atol=1, name="x")
    b[1, 2] = 0.5
    with pytest.raises(AssertionError, match=r"worst at \(1, 2\): 0.5, expected 0"):
        assert_close(b, a, rtol=0, atol=0.25)
    assert_close(b, a, rtol=0, atol=0.5)
    b[1, 2] = -0.0
    with pytest.raises(AssertionError, match=r"at \(1, 2\); first -0.0 \(0x80000000\)"):
        assert_bitwise_equal(b, a)
    with pytest.raises(AssertionError, match="shape must be"):
        assert_bitwise_equal(a, a[:1])
    with pytest.raises(AssertionError, match="dtype must be"):
        assert_close(a, a.double(), rtol=0, atol=0)
    out, lse = cases.normal(1, 1, 5, 64, seed=0), torch.zeros(1, 1, 5)
    assert_same_attention((out, lse), (out, lse))
    worse = out.clone()
    worse[0, 0, 3] *= 1.1
    with pytest.raises(AssertionError, match=r"worst at \(0, 0, 3\)"):
        assert_same_attention((worse, lse), (out, lse))
    with pytest.raises(AssertionError, match="relative L2"):
        assert_same_attention((out * 1.01, lse), (out, lse))
    with pytest.raises(AssertionError, match="lse: beyond"):
        assert_same_attention((out, lse + 0.01), (out, lse))
