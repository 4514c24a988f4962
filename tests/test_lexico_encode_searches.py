"""lexico_encode on the CPU: one code from each search, on dictionaries that are hard to search."""

import math

import pytest
import torch

import kvcore
from cases import F32, HEAD_DIMS, normal
from compare import assert_bitwise_equal
from kvcore.reference import lexico
from lexico_cases import CODES, assert_same_codes, make_dictionary


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def clustered(atoms, head_dim):
    """Atoms around a few directions, products from 0.9 to 0.9999 within a cluster."""
    centres = make_dictionary(8, head_dim, seed=30)
    spread = torch.logspace(-2.5, -0.7, atoms)[:, None]
    return unit(centres[torch.arange(atoms) % 8] + spread * normal(atoms, head_dim, seed=31))


def duplicated(atoms, head_dim):
    """Every atom three times, once negated."""
    some = make_dictionary(-(-atoms // 3), head_dim, seed=32)
    return torch.cat([some, -some, some])[:atoms].contiguous()


def axes(atoms, head_dim):
    """Atoms of one channel, whose integers are the largest, and what lies beside them."""
    eye = torch.eye(head_dim)
    beside = unit(eye + 1e-3 * normal(head_dim, head_dim, seed=33))
    return torch.cat([eye, beside, make_dictionary(atoms, head_dim, seed=34)])[:atoms].contiguous()


DICTIONARIES = {
    "random": make_dictionary,
    "clustered": clustered,
    "duplicated": duplicated,
    "axes": axes,
}


def each_search(x, dictionary, **arguments):
    """Codes by products of residuals, by a given Gram matrix, and by one that the op computes, of
    as many vectors as that is worth, and of as many as bytes of it are."""
    atoms, sparsity = len(dictionary), arguments["sparsity"]
    few = max(1, atoms // sparsity - 1)
    gram = dictionary @ dictionary.T
    yield "residuals", kvcore.lexico_encode(x[:, :, :few], dictionary, **arguments)
    yield "given", kvcore.lexico_encode(x[:, :, :few], dictionary, gram, **arguments)
    for name, least in (("computed", few + 1), ("in bytes", 80 * atoms // sparsity**2)):
        copies = -(-least // x.shape[2])
        many = kvcore.lexico_encode(x.repeat(1, 1, max(copies, 1), 1), dictionary, **arguments)
        yield name, [y[:, :, : x.shape[2]].contiguous() for y in many]


@pytest.mark.isa
@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize(
    ("atoms", "head_dim", "sparsity"), [(300, 64, 16), (130, 96, 40), (513, 128, 8), (257, 256, 64)]
)
def test_every_search_gives_the_same_bits(kind, atoms, head_dim, sparsity):
    # Integers leave the candidates, the same fp32 products decide among them.
    dictionary = DICTIONARIES[kind](atoms, head_dim)
    x = normal(1, 1, 40, head_dim, seed=35)
    # Vectors of few atoms, and nearly so: their residuals end at rounding.
    weights = normal(20, 4, seed=36)
    chosen = torch.randint(0, atoms, (20, 4), generator=torch.Generator().manual_seed(0))
    x[0, 0, :20] = (weights[:, :, None] * dictionary[chosen]).sum(1)
    x[0, 0, :10] += torch.logspace(-7, -2, 10)[:, None] * normal(10, head_dim, seed=37)
    arguments = {"sparsity": sparsity, "dtype": F32}
    found = dict(each_search(x, dictionary, **arguments))
    for what in ("given", "computed", "in bytes"):
        for y, e, name in zip(found[what], found["residuals"], CODES, strict=True):
            n = min(y.shape[2], e.shape[2])
            assert_bitwise_equal(
                y[:, :, :n].contiguous(), e[:, :, :n].contiguous(), f"{what} {name}"
            )


@pytest.mark.isa
@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_small_residuals_are_searched_as_well_as_large_ones(kind, tolerance):
    # The residual falls to a thousandth of the vector: the products' base has to be renewed.
    dictionary = DICTIONARIES[kind](200, 64)
    weights = torch.logspace(0, -4, 12) * normal(60, 12, seed=38)
    chosen = torch.stack(
        [torch.randperm(200, generator=torch.Generator().manual_seed(i))[:12] for i in range(60)]
    )
    x = (weights[:, :, None] * dictionary[chosen]).sum(1)[None, None]
    arguments = {"sparsity": 24, "tolerance": tolerance, "dtype": F32}
    expected = lexico.lexico_encode(x, dictionary, **arguments)
    for name, actual in each_search(x, dictionary, **arguments):
        n = actual[0].shape[2]
        part = [y[:, :, :n] for y in expected]
        share = 0.95 if tolerance else 0.0
        assert ((actual[3] - part[3]).abs() <= 1e-3 * part[3] + 1e-5).all(), name
        assert_same_codes(actual, part, x[:, :, :n], dictionary, share)
        # Up to where fp32 ends.
        shared = (actual[0] == part[0]).int().cumprod(-1).sum(-1)
        assert (shared >= 6).float().mean() >= 0.9, name


def worst_rounding(head_dim, unit=32750):
    """A vector and two atoms in units of the integers that the searches round them to: each channel
    lies next to the middle of two, and is rounded to where the worse atom, the first one, gains.

    Of two products in integers that one is then the larger by nearly all that the bound allows.
    """
    rest = head_dim - 2
    step = math.floor(unit / math.sqrt(head_dim))
    # What is left of the norm is in the last two channels.
    last = math.sqrt((unit**2 - rest * (step + 0.5) ** 2) / 2)
    up = torch.arange(rest) % 2 == 0
    x = torch.cat([step + torch.where(up, 0.51, 0.49), torch.tensor([last, last])]).double()
    # Along what rounding adds to the vector, and rounded up: so all that is added is a gain.
    worse = torch.where(up, step + 0.51, -step - 0.49).double()
    better = torch.where(up, -step - 0.51, step + 0.49).double()
    atoms = [torch.cat([y, torch.tensor([last, -last])]) for y in (worse, better)]
    for atom, wanted in zip(atoms, (5e5, 5.1e5), strict=True):
        atom[-2:] += (wanted - atom @ x) / (2 * last)
    return x / unit, torch.stack(atoms) / unit


@pytest.mark.isa
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_rounding_hides_the_best_atom(head_dim):
    x, atoms = worst_rounding(head_dim)
    # Others are far from the vector, but there have to be some for a search by residuals.
    others = unit(normal(62, head_dim, seed=40)).double()
    others = unit(others - (others @ x)[:, None] * x / (x @ x))
    dictionary = torch.cat([atoms, others]).float()
    products = dictionary.double() @ x.float().double()
    assert products.abs().argmax() == 1
    for name, codes in each_search(x.float()[None, None, None], dictionary, sparsity=1, dtype=F32):
        assert codes[0].flatten()[0] == 1, name


@pytest.mark.isa
def test_what_no_atom_explains_hides_no_atom():
    """Nearly all of the vectors is orthogonal to all atoms, so the products' base is renewed while
    the coefficients are as small as what is left to find."""
    head_dim, atoms = 64, 128
    some = normal(atoms, head_dim, seed=41)
    some[:, 40:] = 0
    dictionary = unit(some)
    x = 0.02 * normal(1, 1, 40, head_dim, seed=42)
    x[..., 40:] *= 50
    arguments = {"sparsity": 20, "dtype": F32}
    expected = lexico.lexico_encode(x, dictionary, **arguments)
    for name, actual in each_search(x, dictionary, **arguments):
        n = actual[0].shape[2]
        part = [y[:, :, :n] for y in expected]
        assert_same_codes(actual, part, x[:, :, :n], dictionary, 0.95)
        assert (actual[0] == part[0]).float().mean() > 0.99, name


@pytest.mark.isa
def test_a_part_has_the_codes_of_the_whole():
    # 300 vectors take another search than 7.
    dictionary = clustered(300, 128)
    x = normal(2, 1, 300, 128, seed=39)
    whole = kvcore.lexico_encode(x, dictionary, sparsity=12, tolerance=0.1)
    part = kvcore.lexico_encode(x[1:, :, 17:24], dictionary, sparsity=12, tolerance=0.1)
    for a, b, name in zip(part, whole, CODES, strict=True):
        assert_bitwise_equal(a, b[1:, :, 17:24].contiguous(), name)
