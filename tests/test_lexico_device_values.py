"""Values in device tensors of lexico's ops that are out of range, where no host looks at them.

A kernel leaves out what they name, touches no memory through them, gives NaN where the result
would have gone, and reports; neighbours keep their bits.
"""

import pytest
import torch

import cases
import kvcore
from cases import F16, Shape
from compare import assert_bitwise_equal
from kvcore.reference import lexico
from lexico_cases import append, make_problem, random_codes, run

each_device_backend = pytest.mark.parametrize(
    "backend", [p for p in cases.BACKENDS if p.values[0] != cases.CPU]
)


def raised(backend):
    empty = torch.empty(0, device=backend.device)
    with pytest.raises(RuntimeError) as caught:
        backend.ops.raise_errors(empty)
    # Raised once, then forgotten.
    backend.ops.raise_errors(empty)
    return str(caught.value)


def store_and_codes(batch, tokens, tiles):
    k, v = (lexico.empty_tail(batch, 2, tiles, sparsity) for sparsity in (5, 3))
    codes = random_codes(batch, 2, tokens, 5, 50, 0) + random_codes(batch, 2, tokens, 3, 60, 1)
    return codes, [k, v, torch.zeros(batch, dtype=torch.int32)]


@each_device_backend
@pytest.mark.asan
@pytest.mark.parametrize("length", [-1, 61, 65, 2**31 - 1, -(2**31)])
def test_append_leaves_a_sequence_alone_whose_length_does_not_fit(backend, length):
    codes, store = store_and_codes(3, 4, 2)
    store[2] += 60
    expected = [x.clone() for x in store]
    append(cases.CPU, codes, expected)
    store[2][1] = length
    before = [x.clone() for x in store]
    with pytest.raises(RuntimeError, match=r"^lexico_append: "):
        append(backend, codes, store, check_values=True)
    append(backend, codes, store)
    for actual, old, want in zip(store, before, expected, strict=True):
        assert_bitwise_equal(actual[1], old[1])
        assert_bitwise_equal(actual[[0, 2]], want[[0, 2]])
    assert "tail_lens: a length is negative, or more than the tails hold" in raised(backend)


@each_device_backend
def test_seal_names_an_index_out_of_range(backend):
    codes, store = store_and_codes(1, 4096, 128)
    append(cases.CPU, codes, store)
    with pytest.raises(RuntimeError, match=r"^lexico_seal: v_tail must be codes over 59 atoms, "):
        run(backend, "lexico_seal", *store[:2], v_atoms=59)


SIZES = {"k_sparsity": 5, "v_sparsity": 3, "v_atoms": 60}
# Bytes of the last head's block that change, and the tokens that are lost.
CHANGES = {
    "a width": ("k_block", 5, 200, slice(None)),
    "a count": ("v_block", 8192 + 1, 255, slice(None)),
    "a token": ("v_block", 8192 + 120 + 1, 255, slice(None)),
    # Token 0 gets pairs of others, more than it has room for.
    "a token's pairs": ("v_block", slice(8192 + 120, 8192 + 120 + 8), 0, [0]),
}


@each_device_backend
def test_seal_reports_more_pairs_of_an_atom_than_it_can_count(backend):
    store = [lexico.empty_tail(1, 1, 128, 16) for _ in range(2)]
    codes = random_codes(1, 1, 4096, 16, 60, 0)
    codes[0][:], codes[1][:] = 17, 5
    append(cases.CPU, codes + codes, [*store, torch.zeros(1, dtype=torch.int32)])
    run(backend, "lexico_seal", *store, v_atoms=60)
    assert "blocks or tails: not codes over so many atoms" in raised(backend)


def sealed():
    codes, store = store_and_codes(2, 4096, 128)
    for coefficients in codes[1], codes[4]:
        coefficients[coefficients == 0] = 1
    append(cases.CPU, codes, store)
    return kvcore.lexico_seal(*store[:2], v_atoms=60)


@each_device_backend
@pytest.mark.parametrize("change", CHANGES)
def test_unseal_of_what_seal_did_not_make(backend, change):
    blocks = sealed()
    clean = run(backend, "lexico_unseal", *blocks, **SIZES)
    name, where, value, tokens = CHANGES[change]
    which = ("k_block", "v_block").index(name)
    blocks[which][1, 1, where] = value
    tails = run(backend, "lexico_unseal", *blocks, **SIZES)
    scale = lexico.lexico_unpack(tails[which], kv_len=4096)[2]
    assert scale[1, 1][tokens].isnan().all()
    for i, (actual, want) in enumerate(zip(tails, clean, strict=True)):
        for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
            if (i, b, h) != (which, 1, 1):
                assert_bitwise_equal(actual[b, h], want[b, h])
    assert "blocks or tails: not codes over so many atoms" in raised(backend)


@each_device_backend
def test_unseal_of_a_block_that_is_cut_short(backend):
    k_block, v_block = sealed()
    tails = run(backend, "lexico_unseal", k_block[..., :-64].contiguous(), v_block, **SIZES)
    assert lexico.lexico_unpack(tails[0], kv_len=4096)[2].isnan().all()
    assert lexico.lexico_unpack(tails[1], kv_len=4096)[2].isfinite().all()
    assert "blocks or tails: not codes over so many atoms" in raised(backend)


@cases.each_backend
@pytest.mark.parametrize("sparsity", [1, 64])
def test_seal_of_skewed_atoms(backend, sparsity):
    """An atom that every token has, more atoms than a CTA takes, codes of every length."""
    generator = torch.Generator().manual_seed(sparsity)
    codes = random_codes(1, 1, 4096, sparsity, 700, 2)
    codes[0][..., 0] = 699
    codes[0][..., 1:] = codes[0][..., 1:] % 699
    keep = torch.randint(0, sparsity + 1, (1, 1, 4096, 1), generator=generator)
    codes[1][torch.arange(sparsity) >= keep] = 0
    store = [lexico.empty_tail(1, 1, 128, sparsity) for _ in range(2)]
    store.append(torch.zeros(1, dtype=torch.int32))
    append(backend, [*codes, *codes], store)
    actual = run(backend, "lexico_seal", *store[:2], v_atoms=700)
    for a, e in zip(actual, lexico.lexico_seal(*store[:2], v_atoms=700), strict=True):
        assert_bitwise_equal(a, e)
    sizes = {"k_sparsity": sparsity, "v_sparsity": sparsity, "v_atoms": 700}
    opened = run(backend, "lexico_unseal", *actual, **sizes)
    for a, e in zip(opened, kvcore.lexico_unseal(*actual, **sizes), strict=True):
        assert_bitwise_equal(a, e)


def problem(dtype=F16):
    return make_problem(
        Shape(64, 90, 3, 2, 2, batch=3, dtype=dtype),
        blocks=1,
        buffer=5,
        tail_lens=(90, 80, 90),
        buffer_lens=(5, 5, 2),
        left_padding=(0, 1, 2),
    )


@each_device_backend
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tail_lens", -1),
        ("tail_lens", 129),
        ("tail_lens", 2**31 - 1),
        ("buffer_lens", 6),
        ("buffer_lens", -(2**31)),
        ("left_padding", -1),
        ("left_padding", 2**31 - 1),
    ],
)
def test_attention_with_lengths_out_of_range(backend, name, value):
    p = problem()
    clean = p.run(backend)
    getattr(p, name)[1] = value
    for actual, want in zip(p.run(backend), clean, strict=True):
        assert actual[1].isnan().all()
        assert_bitwise_equal(actual[[0, 2]], want[[0, 2]])
    assert f"{name}: " in raised(backend)
    with pytest.raises(RuntimeError, match=rf"^lexico_attention: {name}\[1\] must be in "):
        p.run(backend, check_values=True)


# Where the bytes of kv head 1 of sequence 1 change; what lies past the ends means nothing.
CODE_CHANGES = {
    "k_tail index": ("k_tail", 1, 64, [70, 0]),
    "v_tail index": ("v_tail", 1, 65, [255]),
    "k_blocks width": ("k_blocks", None, 0, [65]),
    "k_blocks index": ("k_blocks", None, 128 + 66, [71, 0]),
    "v_blocks count": ("v_blocks", None, 8192 + 1, [255]),
    "v_blocks token": ("v_blocks", None, 8192 + 180 + 1, [16]),
}


@each_device_backend
@pytest.mark.parametrize("change", CODE_CHANGES)
def test_attention_to_what_append_and_seal_did_not_make(backend, change):
    p = problem()
    clean = p.run(backend)
    name, tile, where, values = CODE_CHANGES[change]
    data = getattr(p, name)
    data = data[0][1, 1] if tile is None else data[1, 1, tile]
    data[where : where + len(values)] = torch.tensor(values, dtype=torch.uint8)
    out, lse = p.run(backend)
    assert out[1, 2:].isnan().all()
    assert lse[1, 2:].isnan().all() if name[0] == "k" else lse[1, 2:].isfinite().all()
    for actual, want in zip((out, lse), clean, strict=True):
        assert_bitwise_equal(actual[[0, 2]], want[[0, 2]])
        assert_bitwise_equal(actual[1, :2], want[1, :2])
    assert "blocks or tails: not codes over so many atoms" in raised(backend)


@each_device_backend
def test_what_lies_past_the_ends_means_nothing(backend):
    p = problem()
    clean = p.run(backend)
    # Sequence 1's tails end with token 80, in their third tile.
    for tail, sparsity in ((p.k_tail, 5), (p.v_tail, 6)):
        pairs = tail[1, :, 2, 64 : 64 + 64 * sparsity].view(2, sparsity, 64)
        pairs[..., 2 * 16 :] = 255
        tail[1, :, 2, 2 * 16 : 64] = 255
        tail[1, :, 3] = 255
    p.k_buffer[2, :, 2:] = p.v_buffer[2, :, 2:] = torch.nan
    for actual, want in zip(p.run(backend), clean, strict=True):
        assert_bitwise_equal(actual, want)
    backend.ops.raise_errors(torch.empty(0, device=backend.device))
