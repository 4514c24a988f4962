"""lexico_encode's search against its reference and against scikit-learn."""

import pytest
import torch
from sklearn.linear_model import orthogonal_mp

import kvcore
from cases import DTYPES, F32, HEAD_DIMS, LAYOUTS, each_backend, normal, with_layout
from compare import assert_bitwise_equal, assert_close
from kvcore.reference import lexico
from lexico_cases import CODES, GOALS, assert_same_codes, make_dictionary, run, same_support


@each_backend
@pytest.mark.isa
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(backend, head_dim, dtype):
    tokens = 17 if backend.runs(102 * 300 * 256 * 9) else 3
    x = normal(2, 3, tokens, head_dim, seed=1, dtype=dtype)
    dictionary = make_dictionary(300, head_dim)
    for sparsity in (1, 8):
        actual = backend.ops.lexico_encode(
            x.to(backend.device), dictionary.to(backend.device), sparsity=sparsity
        )
        assert_same_codes(
            actual, lexico.lexico_encode(x, dictionary, sparsity=sparsity), x, dictionary
        )


@pytest.mark.asan
@pytest.mark.isa
@pytest.mark.parametrize("atoms", [1, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("with_gram", [False, True])
def test_every_number_of_atoms(atoms, with_gram):
    dictionary = make_dictionary(atoms, 64)
    gram = dictionary @ dictionary.T if with_gram else None
    for num_vectors in (1, 5, 14, 50):
        x = normal(1, 1, num_vectors, 64, seed=atoms)
        sparsity = min(atoms, 9)
        actual = kvcore.lexico_encode(x, dictionary, gram, sparsity=sparsity)
        assert_same_codes(
            actual, lexico.lexico_encode(x, dictionary, sparsity=sparsity), x, dictionary, 0.97
        )


@GOALS
def test_support_and_residual_of_both_searches(sparsity, share):
    # The goals of the encoder at their sizes; the two searches are chosen by the number of vectors.
    x = normal(1, 1, 400, 128, seed=3)
    dictionary = make_dictionary(4096, 128)
    expected = lexico.lexico_encode(x, dictionary, sparsity=sparsity)
    gram = dictionary @ dictionary.T
    for given in (None, gram):
        actual = kvcore.lexico_encode(
            x[:, :, :100] if given is None else x, dictionary, given, sparsity=sparsity
        )
        n = actual[0].shape[2]
        assert same_support(actual[0], expected[0][:, :, :n]) >= share
        ratio = actual[3].norm() / expected[3][:, :, :n].norm()
        assert 0.999 <= ratio <= 1.001


@pytest.mark.isa
@pytest.mark.parametrize("offset", [128, 133])
def test_atoms_that_bf16_does_not_tell_apart(offset):
    # Where the search rounds to bf16, either of two such atoms may have the larger product there.
    # They lie in one lane of its vectors, or in two.
    atoms = make_dictionary(offset, 64)
    near = torch.nn.functional.normalize(atoms + 6e-4 * normal(offset, 64, seed=9), dim=1)
    dictionary = torch.cat([atoms, near])
    x = normal(1, 2, 60, 64, seed=10)
    rounded = (dictionary.bfloat16().float() @ x[0, 0].bfloat16().float().T).abs().argmax(0)
    exact = (dictionary.double() @ x[0, 0].double().T).abs().argmax(0)
    assert (rounded != exact).float().mean() > 0.1
    expected = lexico.lexico_encode(x, dictionary, sparsity=4)
    actual = kvcore.lexico_encode(x, dictionary, sparsity=4)
    assert_same_codes(actual, expected, x, dictionary)


def test_many_vectors_agree_with_few():
    # Enough vectors for the op to compute the Gram matrix itself.
    dictionary = make_dictionary(256, 64)
    x = normal(1, 2, 300, 64, seed=5)
    many = kvcore.lexico_encode(x, dictionary, sparsity=8)
    few = kvcore.lexico_encode(x[:, :, :10], dictionary, sparsity=8)
    assert_same_codes(few, [y[:, :, :10] for y in many], x, dictionary)
    given = kvcore.lexico_encode(x, dictionary, dictionary @ dictionary.T, sparsity=8)
    assert_same_codes(given, many, x, dictionary)


def test_reference_is_sklearns_matching_pursuit():
    dictionary = make_dictionary(512, 64).double()
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    x = normal(40, 64, seed=2).double()
    for sparsity in (1, 4, 12):
        indices, values = lexico.orthogonal_matching_pursuit(x, dictionary, sparsity=sparsity)
        dense = torch.zeros(40, 512, dtype=torch.float64).scatter_(1, indices, values)
        oracle = orthogonal_mp(dictionary.T.numpy(), x.T.numpy(), n_nonzero_coefs=sparsity)
        oracle = torch.as_tensor(oracle).view(512, 40).T
        assert torch.equal(dense != 0, oracle != 0)
        assert (dense - oracle).abs().max() <= 1e-9
    # Its tolerance is a squared norm.
    indices, values = lexico.orthogonal_matching_pursuit(x, dictionary, sparsity=40, tolerance=0.6)
    dense = torch.zeros(40, 512, dtype=torch.float64).scatter_add_(1, indices, values)
    for row, expected in zip(x, dense, strict=True):
        oracle = orthogonal_mp(dictionary.T.numpy(), row.numpy(), tol=float(0.36 * row @ row))
        assert (expected - torch.as_tensor(oracle)).abs().max() <= 1e-9


def test_encode_is_sklearns_matching_pursuit():
    dictionary = make_dictionary(1024, 128)
    x = normal(1, 1, 200, 128, seed=4)
    indices, values, _, _ = kvcore.lexico_encode(x, dictionary, sparsity=8, dtype=F32)
    oracle = orthogonal_mp(
        dictionary.double().T.numpy(), x[0, 0].double().T.numpy(), n_nonzero_coefs=8
    )
    oracle = torch.as_tensor(oracle).T
    dense = torch.zeros(200, 1024).scatter_(1, indices[0, 0].long(), values[0, 0])
    same = ((dense != 0) == (oracle != 0)).all(1)
    assert same.float().mean() >= 0.995
    assert (dense - oracle).abs()[same].max() <= 1e-5


@each_backend
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, F32], ids=str)
def test_tolerance(backend, dtype):
    heads = 2 if backend.runs(240 * 512 * 64 * 24) else 1
    x = normal(heads, heads, 60, 64, seed=6) * torch.logspace(-3, 3, 60).view(1, 1, -1, 1)
    dictionary = make_dictionary(512, 64)
    arguments = {"sparsity": 24, "tolerance": 0.4, "dtype": dtype}
    actual = backend.ops.lexico_encode(
        x.to(backend.device), dictionary.to(backend.device), **arguments
    )
    expected = lexico.lexico_encode(x, dictionary, **arguments)
    assert_same_codes(actual, expected, x, dictionary, 0.98)
    assert (actual[3] <= 0.4).all()
    used = (actual[0] != 0).sum(-1)
    assert 4 < used.min() < used.max() < 24


@each_backend
def test_codes_go_on_to_small_residuals(backend):
    # What is left is known to more than the difference of two squares near 1.
    dictionary = make_dictionary(200, 64)
    weights = torch.logspace(0, -4, 12) * normal(8, 12, seed=9)
    atoms = torch.stack([torch.arange(i, 200, 16)[:12] for i in range(8)])
    x = (weights[:, :, None] * dictionary[atoms]).sum(1)[None, None]
    residual = backend.ops.lexico_encode(
        x.to(backend.device), dictionary.to(backend.device), sparsity=24, dtype=F32
    )[3]
    expected = lexico.lexico_encode(x, dictionary, sparsity=24, dtype=F32)[3]
    assert expected.max() < 1e-5
    assert_close(residual.cpu(), expected, rtol=0, atol=1e-6)


@each_backend
def test_norms_that_are_not_quite_1(backend):
    """Within a cluster the squared distance of two atoms is as small as what is off of a norm."""
    dictionary = normal(2, 128, seed=20)[torch.arange(300) % 2] + 0.02 * normal(300, 128, seed=21)
    off = 9e-5 * (2 * torch.rand(300, 1, generator=torch.Generator().manual_seed(22)) - 1)
    dictionary = dictionary / dictionary.norm(dim=1, keepdim=True) * (1 + off)
    x = normal(1, 1, 20, 128, seed=23)
    residual = run(backend, "lexico_encode", x, dictionary, sparsity=16, dtype=F32)[3]
    expected = lexico.lexico_encode(x, dictionary, sparsity=16, dtype=F32)[3]
    # Atoms that are equally good to fp32 lead to other codes.
    assert (residual <= 1.05 * expected).all()
    assert residual.mean() <= 1.002 * expected.mean()


def test_a_looser_tolerance_stops_earlier():
    # Each code begins with the atoms of the looser one, and none is longer than needed.
    x, dictionary = normal(1, 1, 50, 64, seed=8), make_dictionary(512, 64)
    full = kvcore.lexico_encode(x, dictionary, sparsity=20)[0]
    for tolerance in (0.3, 0.5, 0.9):
        indices, values, _, residual = kvcore.lexico_encode(
            x, dictionary, sparsity=20, tolerance=tolerance, dtype=F32
        )
        used = (values != 0).sum(-1, keepdim=True)
        assert ((indices == full) | (torch.arange(20) >= used)).all()
        shorter = kvcore.lexico_encode(x, dictionary, sparsity=int(used.max()) - 1)[3]
        longest = used.squeeze(-1) == used.max()
        assert (shorter[longest] > tolerance).all()
        assert (residual <= tolerance).all()


@each_backend
@pytest.mark.isa
@pytest.mark.parametrize("given_gram", [False, True])
def test_zero_and_nonfinite_vectors(backend, given_gram):
    x = normal(1, 1, 30, 64, seed=10)
    x[0, 0, 3] = 0
    x[0, 0, 7, 60] = torch.nan
    x[0, 0, 11, 0] = -torch.inf
    x[0, 0, 12] *= 1e30
    x[0, 0, 13] *= 1e-38
    dictionary = make_dictionary(100, 64)
    gram = dictionary @ dictionary.T if given_gram else None
    tensors = [y if y is None else y.to(backend.device) for y in (x, dictionary, gram)]
    actual = [y.cpu() for y in backend.ops.lexico_encode(*tensors, sparsity=4)]
    assert_same_codes(actual, lexico.lexico_encode(x, dictionary, sparsity=4), x, dictionary, 0.96)
    indices, coefficients, scale, residual = (y[0, 0] for y in actual)
    for row in (3, 7, 11):
        assert not indices[row].any()
        assert not coefficients[row].any()
    assert scale[3] == 0
    assert residual[3] == 0
    assert scale[[7, 11, 12]].isnan().all()
    assert residual[[7, 11]].isnan().all()
    # Too large or too small for the scale, not for the search.
    assert residual[[12, 13]].isfinite().all()
    assert (residual[[12, 13]] > 0).all()
    back = kvcore.lexico_reconstruct(*actual[:3], dictionary)[0, 0]
    assert back[[7, 11, 12]].isnan().all()
    assert not back[3].any()
    raw = kvcore.lexico_encode(x, dictionary, sparsity=4, dtype=F32)
    assert_close(raw[3][0, 0, [12]], residual[[12]], rtol=1e-5, atol=0)


@pytest.mark.isa
def test_what_is_explained_exactly_takes_no_further_atom():
    dictionary = make_dictionary(200, 64)
    # Combinations of 3 atoms of small coherence, and the same atom twice in the dictionary.
    q, _ = torch.linalg.qr(normal(64, 64, seed=11))
    dictionary[:64] = q
    dictionary[64] = dictionary[5]
    x = (2 * dictionary[5] - 0.5 * dictionary[9] + 0.1 * dictionary[33]).view(1, 1, 1, 64)
    for gram in (None, dictionary @ dictionary.T):
        indices, values, _, residual = kvcore.lexico_encode(
            x, dictionary, gram, sparsity=8, dtype=F32
        )
        used = values[0, 0, 0] != 0
        assert residual.item() < 1e-5
        assert used.sum() == 3
        assert indices[0, 0, 0, :3].tolist() == [5, 9, 33]


def test_equal_atoms_give_the_first():
    dictionary = make_dictionary(70, 64)
    dictionary[69] = dictionary[2]
    dictionary[30] = -dictionary[2]
    x = dictionary[2].view(1, 1, 1, 64)
    for gram in (None, dictionary @ dictionary.T):
        assert kvcore.lexico_encode(x, dictionary, gram, sparsity=1)[0].item() == 2


@each_backend
def test_noncontiguous(backend):
    dictionary = make_dictionary(100, 64).to(backend.device)
    x = normal(2, 3, 20, 64, seed=12)
    for layout in LAYOUTS:
        strided = with_layout(x, layout).to(backend.device)
        actual = backend.ops.lexico_encode(
            with_layout(x.to(backend.device), layout), dictionary, sparsity=4
        )
        expected = backend.ops.lexico_encode(strided.contiguous(), dictionary, sparsity=4)
        for a, e, name in zip(actual, expected, CODES, strict=True):
            assert a.is_contiguous()
            assert_bitwise_equal(a, e, f"{name}, {layout}")


@each_backend
def test_poisoned_output(backend, poisoned_memory):
    x, dictionary = normal(1, 2, 37, 96, seed=13), make_dictionary(50, 96)
    x[0, 1, 4] = 0
    device = backend.device
    for tolerance in (0.0, 0.7):
        arguments = {"sparsity": 6, "tolerance": tolerance}
        actual = backend.ops.lexico_encode(x.to(device), dictionary.to(device), **arguments)
        expected = lexico.lexico_encode(x, dictionary, **arguments)
        assert_same_codes(actual, expected, x, dictionary, 0.97)
        back = backend.ops.lexico_reconstruct(*actual[:3], dictionary.to(device))
        assert back.isfinite().all()


@each_backend
@pytest.mark.parametrize("given_gram", [False, True])
def test_deterministic(backend, given_gram):
    tokens = 100 if backend.runs(5 * 400 * 300 * 64 * 12) else 50
    x, dictionary = normal(2, 2, tokens, 64, seed=14), make_dictionary(300, 64)
    gram = (dictionary @ dictionary.T).to(backend.device) if given_gram else None
    x, dictionary = x.to(backend.device), dictionary.to(backend.device)
    first = backend.ops.lexico_encode(x, dictionary, gram, sparsity=12)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            again = backend.ops.lexico_encode(x, dictionary, gram, sparsity=12)
            for a, b, name in zip(again, first, CODES, strict=True):
                assert_bitwise_equal(a, b, f"{name} of {num_threads} threads")
    finally:
        torch.set_num_threads(threads)
    alone = backend.ops.lexico_encode(x[1:, :1, 3:50], dictionary, gram, sparsity=12)
    if given_gram:
        for a, b, name in zip(alone, first, CODES, strict=True):
            assert_bitwise_equal(a, b[1:, :1, 3:50].contiguous(), f"{name} of a part")
