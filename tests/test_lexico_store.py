"""The store of codes, byte by byte, against its reference."""

import re

import pytest
import torch

import cases
import kvcore
from cases import each_backend
from compare import assert_bitwise_equal
from kvcore.reference import lexico
from lexico_cases import append, changed, make_dictionary, random_codes, run


def tails(batch, kv_heads, tiles, k_sparsity=5, v_sparsity=3):
    k = lexico.empty_tail(batch, kv_heads, tiles, k_sparsity)
    v = lexico.empty_tail(batch, kv_heads, tiles, v_sparsity)
    return [k, v, torch.zeros(batch, dtype=torch.int32)]


def new_codes(batch, kv_heads, tokens, k_sparsity=5, v_sparsity=3, atoms=(50, 60), seed=0):
    k = random_codes(batch, kv_heads, tokens, k_sparsity, atoms[0], seed)
    return (*k, *random_codes(batch, kv_heads, tokens, v_sparsity, atoms[1], seed + 1))


def full_tails(backend=cases.CPU):
    store = tails(1, 2, 128)
    append(backend, new_codes(1, 2, 4096), store)
    return store[:2]


@each_backend
@pytest.mark.asan
@pytest.mark.parametrize("lens", [(1,), (32,), (31, 2), (5, 0, 64, 1), (96,), (40, 56)])
def test_append_matches_reference(backend, lens):
    actual, expected = tails(2, 3, 3), tails(2, 3, 3)
    for store in (actual, expected):
        store[2] += torch.tensor([0, 3], dtype=torch.int32) if sum(lens) <= 93 else 0
    for i, num_new in enumerate(lens):
        codes = new_codes(2, 3, num_new, seed=i)
        append(backend, codes, actual)
        lexico.lexico_append(*codes, *expected)
    for a, e, name in zip(actual, expected, ("k_tail", "v_tail", "tail_lens"), strict=True):
        assert_bitwise_equal(a, e, name)


@each_backend
@pytest.mark.asan
def test_unpack_gives_back_what_was_appended(backend):
    codes, store = new_codes(2, 2, 70), tails(2, 2, 3)
    append(backend, codes, store)
    for tail, wanted in ((store[0], codes[:3]), (store[1], codes[3:])):
        for kv_len in (0, 1, 70):
            actual = run(backend, "lexico_unpack", tail, kv_len=kv_len)
            expected = lexico.lexico_unpack(tail, kv_len=kv_len)
            for a, e, w in zip(actual, expected, wanted, strict=True):
                assert_bitwise_equal(a, e)
                assert_bitwise_equal(a, w[:, :, :kv_len].contiguous())


@each_backend
@pytest.mark.asan
def test_seal_matches_reference(backend):
    k_tail, v_tail = full_tails(backend)
    actual = run(backend, "lexico_seal", k_tail, v_tail, v_atoms=60)
    expected = lexico.lexico_seal(k_tail, v_tail, v_atoms=60)
    for a, e, name in zip(actual, expected, ("k_block", "v_block"), strict=True):
        assert_bitwise_equal(a, e, name)
    sizes = {"k_sparsity": 5, "v_sparsity": 3, "v_atoms": 60}
    opened = run(backend, "lexico_unseal", *actual, **sizes)
    for a, e, name in zip(opened, lexico.lexico_unseal(*actual, **sizes), ("k", "v"), strict=True):
        assert_bitwise_equal(a, e, name)


@each_backend
def test_sealing_loses_nothing(backend):
    tails_ = full_tails(backend)
    blocks = run(backend, "lexico_seal", *tails_, v_atoms=60)
    opened = run(backend, "lexico_unseal", *blocks, k_sparsity=5, v_sparsity=3, v_atoms=60)
    for before, after, atoms in zip(tails_, opened, (50, 60), strict=True):
        dictionary = make_dictionary(atoms, 64)
        vectors = [
            lexico.lexico_reconstruct(
                *run(backend, "lexico_unpack", x, kv_len=4096), dictionary, dtype=torch.float64
            )
            for x in (before, after)
        ]
        assert (vectors[0] - vectors[1]).abs().max() < 1e-12
    again = run(backend, "lexico_seal", *opened, v_atoms=60)
    for a, b in zip(again, blocks, strict=True):
        assert_bitwise_equal(a, b)


@each_backend
def test_empty_codes_seal(backend):
    # Zero vectors and no vector: scales alone.
    k, v, _ = tails(2, 1, 128)
    k_block, v_block = run(backend, "lexico_seal", k, v, v_atoms=1000)
    assert k_block.shape == (2, 1, 128 + 128 * 64)
    assert v_block.shape == (2, 1, 8192 + 2000 + 48)
    assert not k_block.any()
    assert not v_block.any()
    none = run(backend, "lexico_seal", k[:0], v[:0], v_atoms=10)
    assert [x.shape for x in none] == [(0, 1, 0), (0, 1, 0)]


@pytest.mark.parametrize(("sparsity", "atoms"), [(8, 1024), (16, 1024), (8, 4096), (32, 4096)])
def test_bytes_of_a_vector(sparsity, atoms):
    # All in: indices, coefficients, scales, widths, counts and padding, of K and of V.
    store = tails(1, 1, 128, sparsity, sparsity)
    codes = new_codes(1, 1, 4096, sparsity, sparsity, (atoms, atoms))
    for coefficients in (codes[1], codes[4]):
        coefficients[coefficients == 0] = 1
    kvcore.lexico_append(*codes, *store)
    for block in kvcore.lexico_seal(*store[:2], v_atoms=atoms):
        assert block.numel() / 4096 <= 3 * sparsity + 4 + 64 / 4096
    assert store[0].numel() / 4096 <= 3 * sparsity + 4


def test_tolerance_makes_blocks_smaller():
    dictionary = make_dictionary(256, 64)
    x = torch.randn(1, 1, 4096, 64, generator=torch.Generator().manual_seed(0))
    # Half of the vectors are an atom and a little noise.
    x[:, :, ::2] = dictionary[:128].repeat(16, 1) + 0.01 * x[:, :, ::2]
    sizes = []
    for tolerance in (0.0, 0.3):
        codes = kvcore.lexico_encode(x, dictionary, sparsity=16, tolerance=tolerance)[:3]
        store = tails(1, 1, 128, 16, 16)
        kvcore.lexico_append(*codes, *codes, *store)
        sizes.append([b.numel() for b in kvcore.lexico_seal(*store[:2], v_atoms=256)])
    # A tile is as wide as its longest code; V's pairs are counted one by one.
    assert sizes[1][0] <= sizes[0][0]
    assert sizes[1][1] < 0.7 * sizes[0][1]


def test_seal_counts_an_atoms_pairs():
    # As often as distinct atoms allow, as often as a count can say, and once more.
    for sparsity, spare, fits in ((1, 0, True), (16, 1, True), (16, 0, False), (64, 0, False)):
        store = tails(1, 1, 128, 1, sparsity)
        codes = [*new_codes(1, 1, 4096, 1, sparsity)]
        codes[3][:] = 17
        codes[4][:] = 5
        codes[4].view(-1)[:spare] = 0
        kvcore.lexico_append(*codes, *store)
        if fits:
            blocks = kvcore.lexico_seal(*store[:2], v_atoms=60)
            assert int(blocks[1][0, 0, 8192 + 34 : 8192 + 36].view(torch.uint16)) == (
                4096 * sparsity - spare
            )
            sizes = {"k_sparsity": 1, "v_sparsity": sparsity, "v_atoms": 60}
            opened = kvcore.lexico_unseal(*blocks, **sizes)
            for a, e in zip(opened, lexico.lexico_unseal(*blocks, **sizes), strict=True):
                assert_bitwise_equal(a, e)
            continue
        with pytest.raises(RuntimeError) as caught:
            kvcore.lexico_seal(*store[:2], v_atoms=60)
        assert str(caught.value) == (
            "lexico_seal: v_tail must be codes of distinct atoms, got more than 65535 pairs of one"
        )


def arguments_of(op):
    k_tail, v_tail = full_tails()
    if op == "seal":
        return {"k_tail": k_tail, "v_tail": v_tail, "v_atoms": 60}
    if op == "unpack":
        return {"tail": k_tail, "kv_len": 7}
    if op == "unseal":
        k, v = kvcore.lexico_seal(k_tail, v_tail, v_atoms=60)
        return {"k_block": k, "v_block": v, "k_sparsity": 5, "v_sparsity": 3, "v_atoms": 60}
    names = ("k_indices", "k_coefficients", "k_scale", "v_indices", "v_coefficients", "v_scale")
    codes = dict(zip(names, new_codes(1, 2, 4), strict=True))
    return codes | dict(zip(("k_tail", "v_tail", "tail_lens"), tails(1, 2, 2), strict=True))


REJECTED = [
    (
        "append",
        {"k_tail": torch.zeros(1, 2, 3, 99).byte()},
        "k_tail must be [batch, kv_heads, tiles, bytes] with bytes 64 + 96 * sparsity, sparsity 1 "
        "to 64, got [1, 2, 3, 99]",
    ),
    (
        "append",
        {"v_tail": torch.zeros(1, 1, 2, 352).byte()},
        "v_tail must be [1, 2, *, 352], got [1, 1, 2, 352]",
    ),
    ("append", {"k_indices": torch.zeros(4, 5).short()}, "k_indices must be 4-dimensional, got"),
    (
        "append",
        {"k_indices": torch.zeros(1, 2, 4, 6).short()},
        "k_indices must be [1, 2, 4, 5], got [1, 2, 4, 6]",
    ),
    (
        "append",
        {"v_coefficients": torch.zeros(1, 2, 4, 3)},
        "v_coefficients must be int8, got float32",
    ),
    (
        "append",
        {"v_scale": torch.zeros(1, 2, 5).half()},
        "v_scale must be [1, 2, 4], got [1, 2, 5]",
    ),
    (
        "append",
        {"tail_lens": torch.tensor([61], dtype=torch.int32)},
        "k_indices must be of at most 3 new tokens for sequence 0, got 4",
    ),
    (
        "append",
        {"tail_lens": torch.tensor([65], dtype=torch.int32)},
        "tail_lens[0] must be in [0, 64], got 65",
    ),
    (
        "append",
        lambda values: {"v_tail": values["k_tail"]},
        "v_indices must be [1, 2, 4, 5], got [1, 2, 4, 3]",
    ),
    (
        "append",
        lambda values: {
            "v_tail": values["k_tail"],
            "v_indices": values["k_indices"],
            "v_coefficients": values["k_coefficients"],
        },
        "k_tail must be in memory of its own, got that of v_tail",
    ),
    (
        "seal",
        {"k_tail": torch.zeros(1, 2, 127, 544).byte()},
        "k_tail must be [*, *, 128, 544], got [1, 2, 127, 544]",
    ),
    ("seal", {"v_atoms": 59}, "v_tail must be codes over 59 atoms, got the index 59"),
    ("seal", {"v_atoms": 0}, "v_atoms must be in [1, 32768], got 0"),
    ("unpack", {"kv_len": 4097}, "kv_len must be in [0, 4096], got 4097"),
    (
        "unpack",
        {"tail": torch.zeros(2, 544).byte()},
        "tail must be [batch, kv_heads, tiles, bytes]",
    ),
    ("unseal", {"k_sparsity": 0}, "k_sparsity must be in [1, 64], got 0"),
    (
        "unseal",
        {"k_sparsity": 4},
        "k_block must be codes of sparsity 4 as lexico_seal made them, got others",
    ),
    (
        "unseal",
        {"v_sparsity": 2},
        "v_block must be codes of sparsity 2 over 60 atoms as lexico_seal made them, got others",
    ),
    ("unseal", changed("k_block", (0, 1, 5), 200), "k_block must be codes of sparsity 5 as"),
    ("unseal", changed("v_block", (0, 0, 8192 + 1), 255), "v_block must be codes of sparsity 3"),
    ("unseal", changed("v_block", (0, 0, 8313), 255), "v_block must be codes of sparsity 3 over"),
    (
        "unseal",
        {"v_block": torch.zeros(1, 2, 8256).byte()},
        "v_block must be of a multiple of 64 bytes a head, at least 8320, got 8256",
    ),
    ("unseal", {"k_block": torch.zeros(1, 2).byte()}, "k_block must be 3-dimensional, got [1, 2]"),
]


@pytest.mark.asan
@pytest.mark.parametrize(("op", "change", "message"), REJECTED)
def test_rejects(op, change, message):
    values = arguments_of(op)
    values |= change(values) if callable(change) else change
    before = {n: x.clone() for n, x in values.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(RuntimeError, match=f"^lexico_{op}: {re.escape(message)}"):
        getattr(torch.ops.kvcore, f"lexico_{op}")(**values)
    for name, tensor in before.items():
        assert_bitwise_equal(values[name], tensor, name)


def test_opcheck():
    append = torch.ops.kvcore.lexico_append.default
    torch.library.opcheck(append, (*new_codes(1, 2, 4), *tails(1, 2, 2)))
    k_tail, v_tail = full_tails()
    torch.library.opcheck(torch.ops.kvcore.lexico_seal.default, (k_tail, v_tail), {"v_atoms": 60})
    blocks = kvcore.lexico_seal(k_tail, v_tail, v_atoms=60)
    sizes = {"k_sparsity": 5, "v_sparsity": 3, "v_atoms": 60}
    torch.library.opcheck(torch.ops.kvcore.lexico_unseal.default, blocks, sizes)
    torch.library.opcheck(torch.ops.kvcore.lexico_unpack.default, (k_tail,), {"kv_len": 9})


def test_compiled_equals_eager():
    def run(codes, k_tail, v_tail, lens):
        kvcore.lexico_append(*codes, k_tail, v_tail, lens)
        return kvcore.lexico_unpack(k_tail, kv_len=10)[0] + 1

    codes = new_codes(1, 2, 10)
    eager, compiled = tails(1, 2, 1), tails(1, 2, 1)
    expected = run(codes, *eager)
    actual = torch.compile(run, fullgraph=True)(codes, *compiled)
    assert_bitwise_equal(actual, expected)
    for a, e in zip(compiled, eager, strict=True):
        assert_bitwise_equal(a, e)
