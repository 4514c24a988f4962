"""What only many tries show: rare inputs, drift, and results that differ now and then.

Short in ``make test``; ``make long`` takes minutes: at least 50,000 random problems of each family
against the reference, a million decoding steps over each cache, a thousand repeats of every op.
"""

import functools
import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

import cases
import kvcore
import lexico_long_cases
import long_cases
from cache_tools import lexico_layer, random_kv, turbo_layer
from cases import BF16, F32, Shape, make_qkv
from compare import assert_bitwise_equal
from lexico_cases import CODES, make_dictionary, make_problem
from long_cases import problems

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


# By family: its checks, and how many problems each has in each part of the long run. The parts take
# different examples, so that they can run at the same time.
NUM_PARTS = 5
FAMILIES = {"turbo": (long_cases.CHECKS, 2_000), "lexico": (lexico_long_cases.CHECKS, 2_500)}


def random_problems():
    for family, (checks, per_part) in FAMILIES.items():
        assert len(checks) * NUM_PARTS * per_part >= 50_000
        for name, check in checks.items():
            yield pytest.param(check, 0, 60, id=f"{family}-{name}-short")
            for part in range(NUM_PARTS):
                yield pytest.param(
                    check, part, per_part, id=f"{family}-{name}-long-{part}", marks=long
                )


@pytest.mark.parametrize(("check", "part", "examples"), random_problems())
def test_random_problems_match_reference(check, part, examples):
    @seed(part)
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(problems)
    def compare(case):
        check(case)

    compare()


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


# Lexico's codes 8 tokens at a time, and the rewind goes back into codes.
SOAKED = {
    "turbo": functools.partial(turbo_layer, k_bits=4, v_bits=2),
    "lexico": functools.partial(lexico_layer, k_sparsity=4, v_sparsity=4),
}


@pytest.mark.parametrize("make_layer", SOAKED.values(), ids=SOAKED)
@pytest.mark.parametrize("steps", short_and_long(2_000, 1_000_000))
def test_soak(generator, steps, make_layer):
    """Append and decode, with rewinds and resets: no memory is lost and no bit ever differs."""
    layer = make_layer()
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


def turbo_calls():
    """Every op, each with work for several threads."""
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
        "append_and_rewind": grown_store,
    }


def lexico_calls():
    """The same of the other family; the encoder with each of its searches."""
    dictionary = make_dictionary(300, 64)
    gram = dictionary @ dictionary.T
    x = cases.normal(2, 2, 100, 64, seed=1)
    codes = OPS.lexico_encode(x, dictionary, sparsity=8)[:3]
    decode = make_problem(Shape(64, 1500, 1, 2, 4, 2, BF16), blocks=1, buffer=30)
    prompt = make_problem(Shape(64, 300, 44, 2, 4, 2, BF16), buffer=30, left_padding=(0, 9))
    sizes = {"k_sparsity": 5, "v_sparsity": 6, "v_atoms": 90}
    blocks = decode.k_blocks[0], decode.v_blocks[0]
    full = OPS.lexico_unseal(*blocks, **sizes)

    def append():
        tails = [torch.zeros(2, 2, 4, 64 + 96 * 8, dtype=torch.uint8) for _ in range(2)]
        lens = torch.zeros(2, dtype=torch.int32)
        OPS.lexico_append(*codes, *codes, *tails, lens)
        return *tails, lens

    return {
        "encode": lambda: OPS.lexico_encode(x, dictionary, sparsity=8),
        "encode_few": lambda: OPS.lexico_encode(x[:1, :1, :20], dictionary, sparsity=8),
        "encode_given_gram": lambda: OPS.lexico_encode(
            x[:1, :1, :20], dictionary, gram, sparsity=8
        ),
        "reconstruct": lambda: OPS.lexico_reconstruct(*codes, dictionary),
        "append": append,
        "seal": lambda: OPS.lexico_seal(*full, v_atoms=90),
        "unseal": lambda: OPS.lexico_unseal(*blocks, **sizes),
        "unpack": lambda: OPS.lexico_unpack(full[0], kv_len=4096),
        "attention": decode.run,
        "attention_prompt": prompt.run,
    }


REPEATED = {
    turbo_calls: (
        "calibrate",
        "head_priority",
        "attention",
        "quantize",
        "dequantize",
        "decode",
        "decode_split",
        "append_and_rewind",
    ),
    lexico_calls: (
        "encode",
        "encode_few",
        "encode_given_gram",
        "reconstruct",
        "append",
        "seal",
        "unseal",
        "unpack",
        "attention",
        "attention_prompt",
    ),
}


@pytest.mark.parametrize("repeats", short_and_long(12, 1_000))
@pytest.mark.parametrize(
    ("calls", "name"),
    [
        pytest.param(calls, name, id=f"{calls.__name__.removesuffix('_calls')}-{name}")
        for calls, names in REPEATED.items()
        for name in names
    ],
)
def test_repeats_are_bitwise_equal(threads, calls, name, repeats):
    call = calls()[name]
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("problems", short_and_long(10, 1_000))
def test_results_do_not_depend_on_the_batch(generator, problems, family):
    """A sequence gives what it gives alone, wherever it stands and whatever stands beside it."""
    for seed_idx in range(problems):
        draw = torch.randint(1, 300, (4,), generator=generator).tolist()
        batch, group, q_len, kv_len = 2 + draw[0] % 3, 1 + draw[1] % 8, 1 + draw[2] % 20, draw[3]
        head_dim = cases.HEAD_DIMS[seed_idx % 4]
        shape = Shape(head_dim, kv_len, q_len, 1 + draw[0] % 2, group, batch, F32)
        q, k, v = make_qkv(shape, seed_idx)
        padding = torch.randint(0, kv_len + 1, (batch,), generator=generator).int()
        order = torch.randperm(batch, generator=generator)
        results_of = RESULTS[family]
        whole = results_of(q, k, v, padding)
        moved = results_of(q[order], k[order], v[order], padding[order])
        for i, b in enumerate(order.tolist()):
            rows = slice(b, b + 1)
            alone = results_of(q[rows], k[rows], v[rows], padding[rows])
            for name in whole:
                note = f"{name} of {shape}, entry {b}"
                assert_bitwise_equal(alone[name], whole[name][rows], f"{note} alone")
                assert_bitwise_equal(moved[name][i : i + 1], whole[name][rows], f"{note} moved")


def turbo_results(q, k, v, padding):
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


def lexico_results(q, k, v, padding):
    """The same. Which search the encoder takes depends on how many vectors there are, unless it is
    given the products of the atoms."""
    dictionary = make_dictionary(40, k.shape[-1])
    gram = dictionary @ dictionary.T
    codes = [kvcore.lexico_encode(x, dictionary, gram, sparsity=3) for x in (k, v)]
    batch, heads, kv_len = k.shape[:3]
    tile_shape = (batch, heads, -(-kv_len // 32), 64 + 96 * 3)
    tails = [torch.zeros(tile_shape, dtype=torch.uint8) for _ in range(2)]
    lens = torch.zeros(batch, dtype=torch.int32)
    kvcore.lexico_append(*codes[0][:3], *codes[1][:3], *tails, lens)
    context = [[], [], *tails, lens, dictionary, dictionary]
    out, lse = kvcore.lexico_attention(q, *context, k[:, :, :5], v[:, :, :5], None, padding)
    return {
        **dict(zip(CODES, codes[0], strict=True)),
        "rebuilt": kvcore.lexico_reconstruct(*codes[1][:3], dictionary),
        "k_tail": tails[0],
        "v_tail": tails[1],
        "attention": out,
        "attention lse": lse,
    }


RESULTS = {"turbo": turbo_results, "lexico": lexico_results}
