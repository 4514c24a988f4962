"""Dictionaries that grow with what they code, against the reference that takes vectors in turn."""

import pytest
import torch

import kvcore
from kvcore.cache.adaptive import encode_adaptive
from kvcore.reference.lexico.adaptive import encode_adaptive as reference
from lexico_cases import make_dictionary

SPARSITY, TOLERANCE = 3, 0.4


def _vectors(shape, foreign=12, share=0.5, head_dim=64, seed=0, dtype=torch.float32):
    """Some are codes of three atoms, the others near to one of a few foreign directions."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = make_dictionary(80, head_dim)
    count = torch.Size(shape).numel()
    chosen = torch.rand(count, 80, generator=generator).topk(3).indices
    known = (torch.randn(count, 3, 1, generator=generator) * dictionary[chosen]).sum(1)
    directions = 4 * torch.randn(foreign, head_dim, generator=generator)
    which = torch.randint(foreign, (count,), generator=generator)
    near = directions[which] + torch.randn(count, head_dim, generator=generator)
    is_foreign = torch.rand(count, 1, generator=generator) < share
    x = torch.where(is_foreign, near, known)
    return x.view(*shape, head_dim).to(dtype), dictionary


def _with_room(dictionary, room):
    return torch.cat([dictionary, torch.zeros(room, dictionary.shape[1])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("room", [0, 1, 5, 200])
def test_matches_reference(room, head_dim, dtype):
    x, dictionary = _vectors((2, 2, 40), head_dim=head_dim, dtype=dtype)
    grown = _with_room(dictionary, room)
    found = encode_adaptive(x, grown, 80, sparsity=SPARSITY, tolerance=TOLERANCE)
    expected, atoms = reference(x, dictionary, sparsity=SPARSITY, tolerance=TOLERANCE, room=room)
    assert found.atoms == len(atoms)
    torch.testing.assert_close(grown[: found.atoms], atoms.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.residual, expected[3], rtol=1e-3, atol=1e-4, check_dtype=False)
    rebuilt = kvcore.lexico_reconstruct(*found[:3], grown)
    again = kvcore.reference.lexico.lexico_reconstruct(*expected[:3], atoms.float())
    torch.testing.assert_close(rebuilt, again, rtol=1e-3, atol=0.02 * x.float().abs().max().item())


def test_a_vector_that_misses_becomes_one_coefficient():
    x, dictionary = _vectors((1, 1, 60))
    plain = kvcore.lexico_encode(x, dictionary, sparsity=SPARSITY, tolerance=TOLERANCE)
    missed = plain[3] > TOLERANCE
    assert 20 < int(missed.sum()) < 40
    grown = _with_room(dictionary, 60)
    found = encode_adaptive(x, grown, 80, sparsity=SPARSITY, tolerance=TOLERANCE)
    # Fewer atoms than misses: those near to one another share one.
    assert 0 < found.atoms - 80 < int(missed.sum())
    assert (found.residual <= TOLERANCE * (1 + 1e-5)).all()
    assert torch.equal(found.indices[~missed], plain[0][~missed])
    # The first miss is an atom now: a single pair, and as exact as its coefficient.
    first = missed[0, 0].nonzero()[0, 0]
    assert found.indices[0, 0, first].tolist() == [80, 0, 0]
    assert found.coefficients[0, 0, first].count_nonzero() == 1
    rebuilt = kvcore.lexico_reconstruct(*found[:3], grown)[0, 0, first]
    assert (rebuilt - x[0, 0, first]).norm() < 0.005 * x[0, 0, first].norm()
    norms = grown[: found.atoms].double().norm(dim=1)
    assert (norms - 1).abs().max() < 1e-6


def test_the_limit_holds_and_is_no_failure():
    x, dictionary = _vectors((1, 2, 50), foreign=30)
    grown = _with_room(dictionary, 4)
    found = encode_adaptive(x, grown, 80, sparsity=SPARSITY, tolerance=TOLERANCE)
    assert found.atoms == 84
    plain = kvcore.lexico_encode(x, dictionary, sparsity=SPARSITY, tolerance=TOLERANCE)
    left = found.residual > TOLERANCE
    assert left.any()
    # They keep their codes.
    for kept, before in zip(found[:4], plain, strict=True):
        assert torch.equal(kept[left], before[left])
    again = encode_adaptive(x, grown, 84, sparsity=SPARSITY, tolerance=TOLERANCE)
    assert again.atoms == 84


def test_later_calls_find_the_atoms_of_earlier_ones():
    x, dictionary = _vectors((1, 1, 80), share=1.0, foreign=5)
    grown = _with_room(dictionary, 60)
    first = encode_adaptive(x, grown, 80, sparsity=SPARSITY, tolerance=TOLERANCE)
    second = encode_adaptive(x, grown, first.atoms, sparsity=SPARSITY, tolerance=TOLERANCE)
    assert second.atoms == first.atoms > 80
    assert (second.residual <= TOLERANCE * (1 + 1e-5)).all()


def test_zero_and_non_finite_vectors_become_no_atoms():
    x, dictionary = _vectors((1, 1, 8), share=0.0)
    x[0, 0, 0] = 0
    x[0, 0, 1, 5] = float("inf")
    x[0, 0, 2, 5] = float("nan")
    x[0, 0, 3] = 1e30  # beyond a finite scale
    grown = _with_room(dictionary, 10)
    found = encode_adaptive(x, grown, 80, sparsity=SPARSITY, tolerance=TOLERANCE)
    assert found.atoms == 80
    assert found.scale[0, 0, :4].isnan().tolist() == [False, True, True, True]
    assert not grown[80:].any()


def test_nothing_to_code():
    dictionary = make_dictionary(80, 64)
    found = encode_adaptive(torch.zeros(1, 2, 0, 64), dictionary, 70, sparsity=2, tolerance=0.5)
    assert found.atoms == 70
    assert found.indices.shape == (1, 2, 0, 2)


@pytest.mark.parametrize(
    ("atoms", "tolerance", "message"),
    [
        (0, 0.5, r"atoms must be in \[1, 80\]"),
        (81, 0.5, r"atoms must be in \[1, 80\], the rows of the dictionary, got 81"),
        (80, 0.0, r"tolerance must be in \(0, 1\), got 0.0"),
        (80, 1.0, r"tolerance must be in \(0, 1\), got 1.0"),
        (80, float("nan"), r"tolerance must be in \(0, 1\), got nan"),
    ],
)
def test_rejects(atoms, tolerance, message):
    x, dictionary = _vectors((1, 1, 4))
    with pytest.raises(ValueError, match=message):
        encode_adaptive(x, dictionary, atoms, sparsity=2, tolerance=tolerance)
