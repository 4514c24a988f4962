"""Random problems of the turbo ops, so small that 10,000 can be compared with the reference."""

import math
import random

import torch
from hypothesis import strategies as st

import cases
from compare import (
    assert_bitwise_equal,
    assert_close,
    assert_same_attention,
    assert_same_nonfinite,
)
from kvcore.reference import turbo
from stores import assert_same_store

OPS = torch.ops.kvcore
WIDTHS = (8, 4, 2)
KINDS = ("plain", "plain", "outliers", "tiny", "huge", "zeros", "nonfinite", "equal")

# What hypothesis chooses and shrinks; values come from the seed.
problems = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "head_dim": st.sampled_from((64, 64, 64, 96, 128, 256)),
        "dtype": st.sampled_from(cases.DTYPES),
        "batch": st.sampled_from((1, 1, 2, 3)),
        "kv_heads": st.sampled_from((1, 1, 2)),
        "group": st.sampled_from((1, 2, 3, 4, 8)),
        "kv_len": st.one_of(st.integers(0, 70), st.sampled_from((64, 127, 128, 129, 200))),
        "kind": st.sampled_from(KINDS),
        "layout": st.sampled_from(("contiguous", *cases.LAYOUTS)),
    }
)


class Problem:
    """Tensors of one case, and the choices that are made on the way."""

    def __init__(self, case):
        self.__dict__.update(case)
        self.rng = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def values(self, heads, tokens):
        """``[batch, heads, tokens, head_dim]`` of the case's kind, dtype and strides."""
        shape = (self.batch, heads, tokens, self.head_dim)
        x = torch.randn(shape, generator=self.generator)
        if self.kind == "outliers":
            x[..., self.rng.randrange(self.head_dim)] *= 100
        elif self.kind == "tiny":
            x *= 1e-40
        elif self.kind == "huge":
            # Scores, which are products of two of them, must stay below 2^128.
            x *= 1e15 if self.dtype != torch.float16 else 1e4
        elif self.kind == "zeros":
            x *= torch.rand(shape[:3], generator=self.generator).lt(0.5)[..., None]
        elif self.kind == "equal":
            x = x[..., :1, :1].expand(shape) if tokens else x
        elif self.kind == "nonfinite" and x.numel():
            for value in (math.nan, math.inf, -math.inf):
                place = tuple(self.rng.randrange(size) for size in shape)
                if self.rng.random() < 0.5:
                    x[place] = value
        layout = self.layout if x.numel() else "contiguous"
        return cases.with_layout(x.to(self.dtype), layout)

    def kv(self, tokens=None):
        tokens = self.kv_len if tokens is None else tokens
        return self.values(self.kv_heads, tokens), self.values(self.kv_heads, tokens)

    def padding(self, tokens):
        if self.rng.random() < 0.5:
            return None
        return torch.tensor([self.rng.randint(0, tokens) for _ in range(self.batch)]).int()

    def calibration(self, k, padding=None):
        """Of some of the tokens, or none."""
        if self.rng.random() < 0.4:
            return None, None
        return turbo.turbo_calibrate(k, padding)

    def bits(self):
        return [self.rng.choice(WIDTHS) for _ in range(self.rng.choice([1, self.kv_heads]))]


def check_calibrate(case):
    problem = Problem(case)
    k, v = problem.kv()
    padding = problem.padding(problem.kv_len)
    options = {
        "balance": problem.rng.random() < 0.8,
        "subtract_mean": problem.rng.random() < 0.8,
        "rotary_dim": problem.rng.choice([-1, 0, 2, 32, 64]),
    }
    expected = turbo.turbo_calibrate(k, padding, **options)
    for name, a, e in zip(
        ("k_balance", "k_mean"), OPS.turbo_calibrate(k, padding, **options), expected, strict=True
    ):
        assert_bitwise_equal(a, e, name)
    # Sums in fp64 round to the same fp32 whatever their order, but for a rare last bit.
    expected = turbo.turbo_head_priority(v, padding)
    assert_close(OPS.turbo_head_priority(v, padding), expected, rtol=2e-7, atol=0)


def check_quantize(case):
    problem = Problem(case)
    k, v = problem.kv()
    padding = problem.padding(problem.kv_len)
    args = (k, v, *problem.calibration(k, padding), padding)
    options = {
        "k_bits": problem.bits(),
        "v_bits": problem.bits(),
        "sink_pages": problem.rng.choice([0, 1, 2]),
        "tail_margin": problem.rng.choice([1.0, 1.25, 2.0]),
    }
    actual = cases.store_of(OPS.turbo_quantize(*args, **options))
    expected = cases.store_of(turbo.turbo_quantize(*args, **options))
    assert_same_store(actual, expected)
    check_dequantize(problem, actual, expected, args[2:4])


def check_dequantize(problem, actual, expected, calibration):
    longest = int(expected.seq_lens.max())
    scalars = {
        "kv_len": longest + problem.rng.choice([0, 1]),
        "right_align": problem.rng.random() < 0.5,
        "dtype": problem.rng.choice(cases.DTYPES),
    }
    read = OPS.turbo_dequantize(*actual.readable, *calibration, **scalars)
    want = turbo.turbo_dequantize(*expected.readable, *calibration, **scalars)
    for name, a, e in zip("kv", read, want, strict=True):
        assert_same_nonfinite(a, e, f"{name} rebuilt")
        # Which NaN a conversion makes of a NaN is the machine's business.
        assert_bitwise_equal(a.nan_to_num(0), e.nan_to_num(0), f"{name} rebuilt")


def check_store(case):
    """Appends and rewinds in any order, the store equal to the bit after each."""
    problem = Problem(case)
    rng = problem.rng
    options = {"k_bits": rng.choice(WIDTHS), "v_bits": rng.choice(WIDTHS)}
    expected = cases.empty_store(
        problem.batch,
        problem.kv_heads,
        problem.head_dim,
        8,
        sink_pages=rng.choice([0, 1]),
        **options,
    )
    actual = expected.to("cpu")
    calibration = problem.calibration(problem.kv(40)[0])
    for step in range(rng.randint(1, 4)):
        lens = expected.seq_lens.tolist()
        if step and rng.random() < 0.35:
            new_lens = torch.tensor([rng.randint(max(0, n - 90), n) for n in lens]).int()
            turbo.turbo_rewind(*expected.readable, new_lens)
            OPS.turbo_rewind(*actual.readable, new_lens)
            note = f" after step {step}, a rewind from {lens} to {new_lens.tolist()}"
        else:
            num_new = rng.choice([1, 1, 2, 5, 33, 63, 64, 65, 130])
            if max(lens) + num_new > 8 * 64:
                continue
            k, v = problem.kv(num_new)
            padding = problem.padding(num_new)
            margin = rng.choice([1.0, 1.25])
            for ops, store in ((turbo, expected), (OPS, actual)):
                args = (k, v, *store.writable, *calibration, padding)
                ops.turbo_append(*args, tail_margin=margin)
            note = f" after step {step}, an append of {num_new} at {lens}"
        assert_same_store(actual, expected, note)
    check_dequantize(problem, actual, expected, calibration)


def softmax_calibration(problem, k, padding=None):
    balance, mean = problem.calibration(k, padding)
    # Two huge terms of lse may cancel, and then no error is too large.
    return (balance, None) if problem.kind == "huge" else (balance, mean)


def softmax_options(problem, kv_len):
    window = problem.rng.choice([None, None, 1, 5, 63, 64, kv_len + 1])
    return {
        "causal": window is not None or problem.rng.random() < 0.6,
        "window": window,
        "scale": problem.rng.choice([None, None, 0.02, -0.1]),
        "sas_threshold": problem.rng.choice([None, -15.0, -6.0]),
    }


def check_attention(case):
    problem = Problem(case)
    k, v = problem.kv()
    q = problem.values(problem.kv_heads * problem.group, problem.rng.choice([1, 1, 2, 5, 17, 65]))
    calibration = softmax_calibration(problem, k)
    options = softmax_options(problem, problem.kv_len)
    actual = OPS.turbo_attention(q, k, v, *calibration, **options)
    expected = turbo.turbo_attention(q, k, v, *calibration, **options)
    assert_same_attention(actual, expected, lse_rtol=1e-6)


def check_decode(case):
    problem = Problem(case)
    k, v = problem.kv()
    padding = problem.padding(problem.kv_len)
    calibration = softmax_calibration(problem, k, padding)
    store = cases.store_of(
        OPS.turbo_quantize(
            k, v, *calibration, padding, k_bits=problem.bits(), v_bits=problem.bits()
        )
    )
    q = problem.values(problem.kv_heads * problem.group, problem.rng.choice([1, 1, 1, 2, 5, 17]))
    options = softmax_options(problem, problem.kv_len)
    actual = OPS.turbo_decode(q, *store.readable, *calibration, **options)
    expected = turbo.turbo_decode(q, *store.readable, *calibration, **options)
    assert_same_attention(actual, expected, lse_rtol=1e-6)


CHECKS = {
    "calibrate": check_calibrate,
    "quantize": check_quantize,
    "store": check_store,
    "attention": check_attention,
    "decode": check_decode,
}
