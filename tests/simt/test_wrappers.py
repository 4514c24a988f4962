"""The shim's models of intrinsics and PTX, against torch and the layouts of the PTX manual.

On a machine with a GPU, bench/gpu_check.sh compares the same program compiled by nvcc with it.
"""

import os
import re
import shutil
import subprocess

import pytest
import torch
from programs import CSRC, program

WORD = 1 << 32


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the program printed, by name, and a reader of what it saved."""
    folder = tmp_path_factory.mktemp("wrappers")
    run = subprocess.run(
        [program("wrappers", "plain"), folder], capture_output=True, text=True, check=True
    )
    lines = {}
    for line in run.stdout.splitlines():
        kind, name, *rest = line.split()
        lines[name] = (kind, *rest)

    def read(name, dtype=torch.int32):
        data = bytearray((folder / f"{name}.bin").read_bytes())
        return torch.frombuffer(data, dtype=dtype)

    return lines, read


def random_words(count, state):
    words = []
    for _ in range(count):
        state = (state * 1664525 + 1013904223) % WORD
        words.append(state ^ state >> 16)
    return words


def float_patterns():
    """The inputs of the program that are no special cases."""
    bits = torch.arange(0, WORD, 65537, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def same(actual, expected):
    """Equal bits, NaN apart."""
    actual, expected = actual[: len(expected)], expected
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    kind = bits[expected.dtype]
    assert torch.equal(actual[~nan].view(kind), expected[~nan].view(kind))


def test_approximations_keep_their_bounds(results):
    bounds = {name: rest for name, (kind, *rest) in results[0].items() if kind == "bound"}
    assert len(bounds) == 6
    assert {name: rest for name, rest in bounds.items() if rest[0] != "ok"} == {}


@pytest.mark.parametrize(
    ("name", "dtype"), [("half_to_float", torch.float16), ("bfloat16_to_float", torch.bfloat16)]
)
def test_widening(results, name, dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    same(results[1](name, torch.float32), every.float())


@pytest.mark.parametrize(
    ("name", "dtype"), [("float_to_half", torch.float16), ("float_to_bfloat16", torch.bfloat16)]
)
def test_narrowing(results, name, dtype):
    expected = float_patterns().to(dtype)
    actual = results[1](name).to(torch.int16).view(dtype)
    same(actual, expected)


def test_tf32_rounds_ties_away_from_zero(results):
    x = float_patterns()
    x = x[x.isfinite()]
    actual = results[1]("float_to_tf32", torch.float32)[: len(float_patterns())]
    actual = actual[float_patterns().isfinite()].double()
    # The mantissa keeps 10 bits; exact in double.
    ulp = torch.exp2(x.double().abs().clamp_min(2.0**-126).log2().floor() - 10)
    ulp = torch.where(x.double().abs() / ulp >= 2048, ulp * 2, ulp)
    expected = (x.double().abs() / ulp + 0.5).floor() * ulp * x.double().sign()
    expected = torch.where(expected.abs() >= 2.0**128, expected.sign() * torch.inf, expected)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("fsqrt", lambda x: x.double().sqrt().float()),  # torch's own is off by a bit
        ("frcp", lambda x: 1 / x),
        ("ceil", torch.ceil),
        ("rint", torch.round),
        ("fadd_patterns", lambda x: x + x.roll(-1)),
        ("fmul_patterns", lambda x: x * x.roll(-1)),
        ("fdiv_patterns", lambda x: x / x.roll(-1)),
    ],
)
def test_float_arithmetic(results, name, function):
    # The last pattern's neighbour is a special case.
    same(results[1](name, torch.float32), function(float_patterns())[:-1])


def test_fused_multiply_add_rounds_once(results):
    x = torch.tensor(random_words(1 << 14, 1), dtype=torch.int64).to(torch.int32)
    x = x.view(torch.float32)
    y, z = x.roll(-1), x.roll(-2)
    # Where double is exact: no bit of the smaller summand lies below the larger one's last place.
    product, sum_ = x.double() * y.double(), x.double() * y.double() + z.double()
    exact = (sum_ - product == z.double()) & (sum_ - z.double() == product) & sum_.isfinite()
    expected = sum_.float()
    actual = results[1]("fma_random", torch.float32)
    assert exact.sum() > 100
    assert torch.equal(actual[exact], expected[exact])


def test_conversions_to_integers_saturate(results):
    x = float_patterns()
    low, high = -(2**31), 2**31 - 1
    rounded = {"rn": torch.round, "rz": torch.trunc, "rd": torch.floor, "ru": torch.ceil}
    for name, function in rounded.items():
        expected = function(x).double().nan_to_num(0, high, low).clamp(low, high).to(torch.int32)
        assert torch.equal(results[1](f"float2int_{name}")[: len(x)], expected)
    expected = x.round().double().nan_to_num(0, 2.0**32, 0).clamp(0, 2.0**32 - 1).to(torch.int64)
    actual = results[1]("float2uint_rn")[: len(x)].to(torch.int64) % WORD
    assert torch.equal(actual, expected)


def signed_bytes(word):
    return [(word >> s & 255) - 2 * (word >> s & 128) for s in (0, 8, 16, 24)]


def test_integer_intrinsics(results):
    a = random_words(1 << 14, 1)
    triples = list(zip(a, a[1:] + a[:1], a[2:] + a[:2], strict=True))

    def dp4a(a, b, c):
        return c + sum(x * y for x, y in zip(signed_bytes(a), signed_bytes(b), strict=True))

    def byte_perm(a, b, c):
        return sum(((b << 32 | a) >> 8 * (c >> 4 * i & 7) & 255) << 8 * i for i in range(4))

    expected = {
        "dp4a_signed": dp4a,
        "byte_perm": byte_perm,
        "popc": lambda a, b, c: a.bit_count(),
        "clz": lambda a, b, c: 32 - a.bit_length(),
        "ffs": lambda a, b, c: (a & -a).bit_length(),
        "umulhi": lambda a, b, c: a * b >> 32,
        "funnelshift": lambda a, b, c: (b << 32 | a) >> (c & 31),
    }
    for name, function in expected.items():
        actual = [x % WORD for x in results[1](name).tolist()]
        assert actual == [function(*t) % WORD for t in triples], name


def test_halves_are_fused_and_rounded_once(results):
    words = torch.tensor(random_words(1 << 14, 1), dtype=torch.int64).to(torch.int32)
    halves = words.view(torch.float16).view(-1, 2)
    halves = torch.where(halves.isfinite(), halves, 0)
    a, b, c = (halves.roll(-i, 0).double() for i in range(3))
    exact = (a * b + c - a * b == c) & (a * b + c - c == a * b)
    expected = (a * b + c).half()  # torch rounds a double through float: leave its ties out
    exact &= (a * b + c).float().double() == a * b + c
    actual = results[1]("fma_halves_random").view(torch.float16).view(-1, 2)
    assert exact.sum() > 1000
    same(actual[exact], expected[exact])


# ---- Matrices, from the fragment layouts that the PTX manual draws


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("suffix", ["", "_trans"])
def test_ldmatrix(results, count, suffix):
    memory = torch.tensor(random_words(128, 11), dtype=torch.int64).to(torch.int32)
    rows = memory.view(torch.int16).view(32, 8)
    actual = results[1](f"ldmatrix_x{count}{suffix}").view(torch.int16).view(32, 4, 2)
    for matrix in range(4):
        for lane in range(32):
            expected = [0, 0]
            if matrix < count:
                source = [rows[(8 * matrix + i) * 5 % (8 * count)] for i in range(8)]
                elements = torch.stack(source)
                elements = elements.T if suffix else elements
                pair = elements[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
                expected = pair.tolist()
            assert actual[lane, matrix].tolist() == expected


def operands(words, dtype, depth):
    """A [16, depth], B [depth, 8] and C [16, 8] of the 32 lanes' fragments."""
    per_word = 4 // dtype.itemsize
    lanes = words.view(32, 10)
    elements = lanes[:, :6].contiguous().view(dtype).view(32, 6, per_word).double()
    a, b = torch.zeros(16, depth).double(), torch.zeros(depth, 8).double()
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(per_word):
            for register in range(4):
                column = thread * per_word + i + register // 2 * (depth // 2)
                a[group + register % 2 * 8, column] = elements[lane, register, i]
            for register in range(2):
                row = thread * per_word + i + register * (depth // 2)
                b[row, group] = elements[lane, 4 + register, i]
    return a, b, lanes[:, 6:].contiguous()


def accumulators(per_lane):
    c = torch.zeros(16, 8).double()
    for lane in range(32):
        for e in range(4):
            c[lane // 4 + e // 2 * 8, lane % 4 * 2 + e % 2] = per_lane[lane, e].item()
    return c


@pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [
        ("mma_s8", torch.int8, 32),
        ("mma_f16", torch.float16, 16),
        ("mma_bf16", torch.bfloat16, 16),
        ("mma_tf32", torch.float32, 8),
    ],
)
def test_matrix_products(results, name, dtype, depth):
    kind = torch.int32 if dtype == torch.int8 else torch.float32
    a, b, c = operands(results[1](f"{name}_in"), dtype, depth)
    expected = a @ b + accumulators(c.view(kind))
    if kind == torch.int32:  # sums wrap
        expected = (expected.to(torch.int64) + 2**31) % WORD - 2**31
    actual = accumulators(results[1](name).view(kind).view(32, 4))
    assert torch.equal(actual, expected.double())


@pytest.mark.parametrize("name", ["mma_s8_start", "mma_s8_half", "mma_s8_half_start"])
def test_variants_of_the_integer_product(results, name):
    a, b, c = operands(results[1]("mma_s8_in"), torch.int8, 32)
    c = c.view(torch.int32)
    if "start" in name:  # every element of a lane starts at the same number
        c = c[:, :1].expand(32, 4)
    if "half" in name:
        a, b = a[:, :16], b[:16]
    expected = (a @ b + accumulators(c)).to(torch.int64)
    expected = (expected + 2**31) % WORD - 2**31
    actual = accumulators(results[1](name).view(torch.int32).view(32, 4))
    assert torch.equal(actual, expected.double())


# ---- Everything at once


@pytest.mark.parametrize("variant", ["plain", "asan"])
@pytest.mark.parametrize("seed", ["", "1"])
def test_results_depend_on_nothing_else(results, variant, seed):
    env = {**os.environ, "KVCORE_SIMT_SEED": seed, "ASAN_OPTIONS": "detect_leaks=0"}
    env.pop("LD_PRELOAD", None)
    run = subprocess.run([program("wrappers", variant)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {name: (kind, *rest) for kind, name, *rest in lines} == results[0]


def test_every_wrapper_is_in_the_program():
    """A new name in core/cuda must come into wrappers.cu."""
    sources = sorted((CSRC.parent / "tests" / "simt").glob("wrappers*"))
    text = "".join(path.read_text() for path in sources)
    declared = set()
    for path in (CSRC / "core" / "cuda").glob("*.cuh"):
        if path.name in ("device.cuh", "launch.cuh"):
            continue
        code = re.sub(r"//[^\n]*", "", path.read_text())
        declared |= set(re.findall(r"__device__ __forceinline__ [^;{=]*?\b(\w+)\(", code))
    covered_by = {
        "smem_address": "ldmatrix",
        "pack_16": "pack_floats",
        "warp_reduce": "warp_sum",
        "block_reduce": "block_sum",
        "negative_infinity": "sas",
        "scale_pow2": "sas",
    }
    declared -= {"operator", "empty", "raise", "base", "lse"}
    missing = {name for name in declared if covered_by.get(name, name) not in text}
    assert missing == set()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_the_program(tmp_path):
    command = ["nvcc", "-std=c++20", "-arch=sm_80", "--fmad=false", "-I", CSRC, "-cubin"]
    source = CSRC.parent / "tests" / "simt" / "wrappers.cu"
    result = subprocess.run(
        [*command, source, "-o", tmp_path / "x.cubin"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
