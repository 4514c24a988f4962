"""What only many tries show: rare inputs, drift, and results that differ now and then.

Short in ``make test``; ``make long`` takes minutes: at least 50,000 random problems of the turbo
ops against the reference, a million decoding steps, a thousand repeats of every op.
"""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

import cases
import kvcore
from cache_tools import random_kv, turbo_layer
from cases import BF16, F32, Shape, make_qkv
from compare import assert_bitwise_equal
from long_cases import CHECKS, problems

OPS = torch.ops.kvcore
long = pytest.mark.long


@pytest.fixture
def threads():
    """Sets the number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def short_and_long(short, long_run):
    return [pytest.param(short, id="short"), pytest.param(long_run, id="long", marks=long)]


# ---- random problems


# Of each op; the parts take different examples, so that they can run at the same time.
NUM_PARTS, PER_PART = 5, 2_000
assert len(CHECKS) * NUM_PARTS * PER_PART >= 50_000
EXAMPLES = [
    pytest.param(0, 60, id="short"),
    *(pytest.param(part, PER_PART, id=f"long-{part}", marks=long) for part in range(NUM_PARTS)),
]


@pytest.mark.parametrize(("part", "examples"), EXAMPLES)
@pytest.mark.parametrize("name", CHECKS)
def test_random_problems_match_reference(name, part, examples):
    @seed(part)
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(problems)
    def check(case):
        CHECKS[name](case)

    check()


# ---- soak


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# A round: tokens from one reset to the next, with a rewind on the way.
ROUND_STEPS, REWIND_AT, REWIND_BY = 250, 170, 40


def decode_round(layer, q, k, v):
    """Steps of one round; out of each."""
    layer.update(k[:, :, :70], v[:, :, :70])
    outs, position = [], 70
    for step in range(ROUND_STEPS):
        if step == REWIND_AT:
            layer.crop(-REWIND_BY)
            position -= REWIND_BY
        at = slice(position, position + 1)
        layer.update(k[:, :, at], v[:, :, at])
        outs.append(layer.store.decode(q[:, :, at], scale=None, causal=True))
        position += 1
    layer.reset()
    return torch.cat(outs, 2)


@pytest.mark.parametrize("steps", short_and_long(2_000, 1_000_000))
def test_soak(generator, steps):
    """Append and decode, with rewinds and resets: no memory is lost and no bit ever differs."""
    layer = turbo_layer(k_bits=4, v_bits=2)
    k, v = random_kv(generator, 1, 70 + ROUND_STEPS)
    q = torch.randn(1, 4, 70 + ROUND_STEPS, 64, generator=generator)
    first = decode_round(layer, q, k, v)
    num_rounds = -(-steps // ROUND_STEPS)
    before = resident_bytes()
    for i in range(num_rounds):
        assert_bitwise_equal(decode_round(layer, q, k, v), first, f"out of round {i}")
        if i == num_rounds // 20:
            gc.collect()
            before = resident_bytes()
    gc.collect()
    drift = resident_bytes() / before - 1
    print(f"{num_rounds * ROUND_STEPS} steps: drift of memory {100 * drift:+.3f} %")
    assert drift < 0.01


# ---- the same again


REPEATED = (
    "calibrate",
    "head_priority",
    "attention",
    "quantize",
    "dequantize",
    "decode",
    "decode_split",
    "append_and_rewind",
)


def calls():
    """Every op that writes no argument, each with work for several threads."""
    q, k, v = make_qkv(Shape(64, 700, 2, 2, 4, 2, BF16))
    padding = torch.tensor([0, 100], dtype=torch.int32)
    balance, mean = OPS.turbo_calibrate(k, padding)
    store = cases.store_of(OPS.turbo_quantize(k, v, balance, mean, padding))
    long_q, long_k, long_v = make_qkv(Shape(64, 2500, 1, 2, 2))
    split = cases.store_of(OPS.turbo_quantize(long_k, long_v))
    return {
        "calibrate": lambda: OPS.turbo_calibrate(k, padding),
        "head_priority": lambda: OPS.turbo_head_priority(v, padding),
        "attention": lambda: OPS.turbo_attention(q, k, v, balance, mean, causal=True),
        "quantize": lambda: OPS.turbo_quantize(k, v, balance, mean, padding),
        "dequantize": lambda: OPS.turbo_dequantize(*store.readable, balance, mean, kv_len=700),
        "decode": lambda: OPS.turbo_decode(q, *store.readable, balance, mean),
        "decode_split": lambda: OPS.turbo_decode(long_q, *split.readable),
    }


def grown_store():
    """What a prompt, appends of many sizes and a rewind leave."""
    _, k, v = make_qkv(Shape(64, 900, 1, 2, 1, 2))
    store = cases.empty_store(2, 2, 64, 14, k_bits=4, v_bits=2)
    begin = 0
    for num_new in (600, 1, 63, 130, 2):
        part = slice(begin, begin + num_new)
        OPS.turbo_append(k[:, :, part], v[:, :, part], *store.writable)
        begin += num_new
    OPS.turbo_rewind(*store.readable, torch.tensor([700, 333], dtype=torch.int32))
    return tuple(store.named().values())


@pytest.mark.parametrize("repeats", short_and_long(12, 1_000))
@pytest.mark.parametrize("name", REPEATED)
def test_repeats_are_bitwise_equal(threads, name, repeats):
    call = grown_store if name == "append_and_rewind" else calls()[name]
    threads(1)
    first = call()
    first = first if isinstance(first, tuple) else (first,)
    for i in range(repeats):
        threads(1 + i % 2)
        again = call()
        again = again if isinstance(again, tuple) else (again,)
        for j, (a, b) in enumerate(zip(again, first, strict=True)):
            if not torch.equal(a, b) or i == repeats - 1:
                assert_bitwise_equal(a, b, f"result {j} of repeat {i}")


@pytest.mark.parametrize("problems", short_and_long(10, 1_000))
def test_results_do_not_depend_on_the_batch(generator, problems):
    """A sequence gives what it gives alone, wherever it stands and whatever stands beside it."""
    for seed_idx in range(problems):
        draw = torch.randint(1, 300, (4,), generator=generator).tolist()
        batch, group, q_len, kv_len = 2 + draw[0] % 3, 1 + draw[1] % 8, 1 + draw[2] % 20, draw[3]
        head_dim = cases.HEAD_DIMS[seed_idx % 4]
        shape = Shape(head_dim, kv_len, q_len, 1 + draw[0] % 2, group, batch, F32)
        q, k, v = make_qkv(shape, seed_idx)
        padding = torch.randint(0, kv_len + 1, (batch,), generator=generator).int()
        order = torch.randperm(batch, generator=generator)
        whole = results_of(q, k, v, padding)
        moved = results_of(q[order], k[order], v[order], padding[order])
        for i, b in enumerate(order.tolist()):
            rows = slice(b, b + 1)
            alone = results_of(q[rows], k[rows], v[rows], padding[rows])
            for name in whole:
                note = f"{name} of {shape}, entry {b}"
                assert_bitwise_equal(alone[name], whole[name][rows], f"{note} alone")
                assert_bitwise_equal(moved[name][i : i + 1], whole[name][rows], f"{note} moved")


def results_of(q, k, v, padding):
    """By name: what every op makes of a batch."""
    balance, mean = kvcore.turbo_calibrate(k, padding)
    store = cases.store_of(OPS.turbo_quantize(k, v, balance, mean, padding, v_bits=[2]))
    read = kvcore.turbo_dequantize(*store.readable, balance, mean, kv_len=k.shape[2])
    out, lse = kvcore.turbo_decode(q, *store.readable, balance, mean)
    prefill, prefill_lse = kvcore.turbo_attention(q, k, v, balance, mean, causal=True)
    return {
        "balance": balance,
        "mean": mean,
        "k": read[0],
        "v": read[1],
        "decode": out,
        "decode lse": lse,
        "attention": prefill,
        "attention lse": prefill_lse,
        "priority": kvcore.turbo_head_priority(v, padding),
    }
