"""Acceptance of turbo: bit-exact stores, and accuracy against exact attention.

The accuracy figures were fixed beforehand, from a simulation of the method.
"""

import dataclasses
import functools

import pytest
import torch
from torch.nn import functional as F

import cases
from compare import assert_bitwise_equal, assert_same_attention, relative_l2
from kvcore.reference import exact_attention, turbo

# ---- gate 1: one specification


each_head_dim = pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
each_width = pytest.mark.parametrize(
    ("k_bits", "v_bits"), [([8], [8]), ([4], [4]), ([2], [2]), ([4, 2], [2, 8])], ids=str
)
# Tokens of the prompt, then of each append: opening, filling and crossing pages.
PROMPT, APPENDS = 300, ((300, 301), (301, 370), (370, 400))
PADDING = torch.tensor([0, 97], dtype=torch.int32)


def build_store(ops, k, v, device, **widths):
    """The calibration, the store after the prompt, and the store after every append."""
    k, v, padding = (x.to(device) for x in (k, v, PADDING))
    calibration = ops.turbo_calibrate(k[:, :, :PROMPT], padding)
    results = ops.turbo_quantize(
        k[:, :, :PROMPT], v[:, :, :PROMPT], *calibration, padding, **widths
    )
    prompt_store = cases.store_of(results)
    store = with_free_pages(prompt_store, 2)
    for begin, end in APPENDS:
        ops.turbo_append(k[:, :, begin:end], v[:, :, begin:end], *store.writable, *calibration)
    return calibration, prompt_store, store


@cases.each_backend
@each_dtype
@each_width
@each_head_dim
def test_stores_are_bit_exact(backend, head_dim, k_bits, v_bits, dtype):
    _, k, v = cases.make_qkv(cases.Shape(head_dim, 400, 5, 2, 3, 2, dtype))
    widths = {"k_bits": k_bits, "v_bits": v_bits}
    got = build_store(backend.ops, k, v, backend.device, **widths)
    want = build_store(turbo, k, v, "cpu", **widths)
    for name, a, b in zip(("k_balance", "k_mean"), got[0], want[0], strict=True):
        assert_bitwise_equal(a, b, name)
    assert_same_store(got[1], want[1], "quantize")
    assert_same_store(got[2], want[2], "append")


@cases.each_backend
@each_dtype
@each_width
@each_head_dim
def test_decode_agrees(backend, head_dim, k_bits, v_bits, dtype):
    q, k, v = cases.make_qkv(cases.Shape(head_dim, 400, 5, 2, 3, 2, dtype))
    calibration, _, store = build_store(turbo, k, v, "cpu", k_bits=k_bits, v_bits=v_bits)
    on_device = [x.to(backend.device) for x in (q, *calibration)]
    readable = store.to(backend.device).readable
    got = backend.ops.turbo_decode(on_device[0], *readable, *on_device[1:])
    assert_same_attention(got, turbo.turbo_decode(q, *store.readable, *calibration))


@cases.each_backend
@each_dtype
@each_head_dim
def test_prefill_agrees(backend, head_dim, dtype):
    q, k, v = cases.make_qkv(cases.Shape(head_dim, 400, 70, 2, 3, 2, dtype))
    calibration = turbo.turbo_calibrate(k)
    got = backend.ops.turbo_attention(
        *(x.to(backend.device) for x in (q, k, v, *calibration)), causal=True
    )
    assert_same_attention(got, turbo.turbo_attention(q, k, v, *calibration, causal=True))


# A split keeps scores that one pass drops at -10, by up to a per mille of lse here; below -15 what
# either drops is nothing.
@cases.each_backend
@pytest.mark.parametrize("sas_threshold", [-15.0, None])
@pytest.mark.parametrize("shape", cases.LONG_SHAPES, ids=str)
def test_decode_agrees_over_splits(backend, shape, sas_threshold):
    if not backend.runs(shape.macs):
        pytest.skip("a long context takes minutes on the SIMT shim")
    q, k, v = cases.make_qkv(shape)
    calibration = turbo.turbo_calibrate(k)
    store = cases.store_of(turbo.turbo_quantize(k, v, *calibration))
    on_device = [x.to(backend.device) for x in (q, *calibration)]
    readable = store.to(backend.device).readable
    got = backend.ops.turbo_decode(
        on_device[0], *readable, *on_device[1:], sas_threshold=sas_threshold
    )
    want = turbo.turbo_decode(q, *store.readable, *calibration, sas_threshold=sas_threshold)
    assert_same_attention(got, want, lse_atol=1e-4)


def with_free_pages(store: cases.Store, pages: int) -> cases.Store:
    """The store with room for more pages, in a slab of 2 bit."""
    batch, _, kv_heads, old_pages = store.block_table.shape
    head_dim = turbo.blocks.tail_head_dim(store.tail.shape[-1])
    rows = torch.arange(batch * 2 * kv_heads * (old_pages + pages), dtype=torch.int32)
    fresh = rows.view(batch, 2, kv_heads, -1) + (len(store.pool) << 21)
    # Left padding leaves entries without a block inside the old table too.
    old = F.pad(store.block_table.cpu(), (0, pages), value=-1)
    copy = store.to(store.tail.device)
    copy.block_table = torch.where(old < 0, fresh, old).to(store.tail.device)
    copy.pool.append(copy.tail.new_zeros(len(rows), turbo.blocks.block_bytes(2, head_dim)))
    return copy


def assert_same_store(got: cases.Store, want: cases.Store, name: str) -> None:
    assert got.named().keys() == want.named().keys()
    for part, expected in want.named().items():
        assert_bitwise_equal(got.named()[part], expected, f"{name}: {part}")


# ---- gate 2: accuracy

HEAD_DIM = 128
INPUTS = ("gaussian", "sharp", "outlier")


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the problems; each seed is a batch entry."""

    seeds: int
    kv_len: int
    rows: int

    @property
    def macs(self) -> int:
        return 2 * self.seeds * self.rows * self.kv_len * HEAD_DIM


WHOLE = Size(8, 8192, 64)
# 1 G multiply-adds a case are more than every run of the SIMT shim can take. 4 M of one seed are no
# sample of the stated means, which one seed misses by more than 10 %: there the error has to be
# that of the reference on the same problem, which is held to the figures at full size.
SMALL = Size(1, 2048, 8)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A setting of the store, and the relative L2 errors stated for it.

    Those of int8 and K4V4 are the paper's; at 2 bit, where the store tries a shorter step, those
    of exact fp64 attention over K and V that such codes stand for. The paper's steps make .474,
    .500 and .497 of K4V2, .719, 1.117 and 1.137 of K2V2.
    """

    k_bits: int
    v_bits: int
    subtract_mean: bool
    stated: tuple[float, float, float]  # mean of 8 seeds, in the order of INPUTS


# Settings that reproduce the simulation: no balance, no 8-bit sinks, and the
# mean of K subtracted below 8 bit only. At 2 bit one seed varies by 15 % (standard deviation), so
# the mean of 8 by 5 %: the seeds are part of the gate.
VARIANTS = {
    "int8": Variant(8, 8, False, (0.020, 0.030, 0.063)),
    "K4V4": Variant(4, 4, True, (0.144, 0.219, 0.209)),
    "K4V2": Variant(4, 2, True, (0.405, 0.442, 0.435)),
    "K2V2": Variant(2, 2, True, (0.578, 0.990, 0.843)),
}


@functools.lru_cache
def problem(inputs: str, size: Size = WHOLE):
    """q, k and v with one seed per batch entry, and exact attention's output in fp64."""
    parts = []
    for seed in range(size.seeds):
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(1, size.rows, HEAD_DIM, generator=generator)
        k = torch.randn(1, size.kv_len, HEAD_DIM, generator=generator)
        v = torch.randn(1, size.kv_len, HEAD_DIM, generator=generator)
        if inputs == "sharp":
            q = 3 * q
        elif inputs == "outlier":
            channels = torch.randperm(HEAD_DIM, generator=generator)[:6]
            signs = 2.0 * torch.randint(0, 2, (6,), generator=generator) - 1
            k[..., channels] = 2 * k[..., channels] + 8 * signs
            q[..., channels] *= 2
            q = 1.5 * q
            v[..., torch.randperm(HEAD_DIM, generator=generator)[:3]] *= 4
        parts.append((q, k, v))
    q, k, v = (torch.stack(x) for x in zip(*parts, strict=True))
    return q, k, v, exact_attention(q, k, v, dtype=torch.float64)[0]


def mean_error(out, exact) -> float:
    """Relative L2 error, averaged over the seeds."""
    return sum(relative_l2(*pair) for pair in zip(out, exact, strict=True)) / len(exact)


def store_error(
    backend, inputs: str, k_bits: int, v_bits: int, *, size: Size = WHOLE, **calibration
) -> float:
    q, k, v, exact = problem(inputs, size)
    q, k, v = (x.to(backend.device) for x in (q, k, v))
    calibration = backend.ops.turbo_calibrate(k, **calibration)
    store = cases.store_of(
        backend.ops.turbo_quantize(
            k, v, *calibration, k_bits=[k_bits], v_bits=[v_bits], sink_pages=0
        )
    )
    out, _ = backend.ops.turbo_decode(q, *store.readable, *calibration, causal=False)
    return mean_error(out.cpu(), exact)


# Gate 1 ties the backends to the reference, so that it need not run every time; nor need the SIMT
# shim, which takes minutes.
each_accuracy_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(cases.REFERENCE, id="reference", marks=pytest.mark.slow),
        *(
            pytest.param(*param.values, id=param.id, marks=[*param.marks, pytest.mark.slow])
            if param.id == "simt"
            else param
            for param in cases.BACKENDS
        ),
    ],
)


@each_accuracy_backend
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_error_is_within_ten_percent_of_the_simulation(backend, name, inputs):
    variant = VARIANTS[name]
    error = store_error(
        backend,
        inputs,
        variant.k_bits,
        variant.v_bits,
        balance=False,
        subtract_mean=variant.subtract_mean,
    )
    stated = variant.stated[INPUTS.index(inputs)]
    print(f"{name} {inputs}: {error:.4f}, stated {stated}")
    assert error == pytest.approx(stated, rel=0.1)


def prefill_error(backend, inputs: str, size: Size = WHOLE) -> float:
    q, k, v, exact = problem(inputs, size)
    out, _ = backend.ops.turbo_attention(*(x.to(backend.device) for x in (q, k, v)))
    return mean_error(out.cpu(), exact)


@each_accuracy_backend
@pytest.mark.parametrize("inputs", INPUTS)
def test_prefill_error_is_that_of_the_int8_store(backend, inputs):
    stated = VARIANTS["int8"].stated[INPUTS.index(inputs)]
    assert prefill_error(backend, inputs) == pytest.approx(stated, rel=0.1)


@each_accuracy_backend
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_full_calibration_costs_nothing_where_it_is_not_needed(backend, name, inputs):
    variant = VARIANTS[name]
    error = store_error(backend, inputs, variant.k_bits, variant.v_bits, rotary_dim=0)
    print(f"{name} {inputs} balanced: {error:.4f}")
    assert error <= 1.1 * variant.stated[INPUTS.index(inputs)]


@cases.each_backend
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_error_of_a_small_problem_is_that_of_the_reference(backend, name, inputs):
    if not backend.runs(SMALL.macs):
        pytest.skip("too large for this run of the SIMT shim")
    variant = VARIANTS[name]
    for options in ({"balance": False, "subtract_mean": variant.subtract_mean}, {"rotary_dim": 0}):
        error, expected = (
            store_error(b, inputs, variant.k_bits, variant.v_bits, size=SMALL, **options)
            for b in (backend, cases.REFERENCE)
        )
        print(f"{name} {inputs} {options}: {error:.5f}, reference {expected:.5f}")
        assert error == pytest.approx(expected, rel=0.02)


@cases.each_backend
@pytest.mark.parametrize("inputs", INPUTS)
def test_prefill_error_of_a_small_problem_is_that_of_the_reference(backend, inputs):
    if not backend.runs(SMALL.macs):
        pytest.skip("too large for this run of the SIMT shim")
    error, expected = (prefill_error(b, inputs, SMALL) for b in (backend, cases.REFERENCE))
    print(f"prefill {inputs}: {error:.5f}, reference {expected:.5f}")
    assert error == pytest.approx(expected, rel=0.02)
