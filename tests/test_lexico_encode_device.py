"""lexico_encode and lexico_reconstruct where they run as CUDA kernels: what tests for all backends
do not ask of them."""

import pytest
import torch

import cases
import kvcore
from cases import BF16, DTYPES, F32, HEAD_DIMS, normal
from compare import assert_bitwise_equal
from kvcore.reference import lexico
from lexico_cases import CODES, GOALS, assert_same_codes, make_dictionary, same_support

each_device_backend = pytest.mark.parametrize(
    "backend", [p for p in cases.BACKENDS if p.values[0] != cases.CPU]
)


def encode(backend, x, dictionary, gram=None, **arguments):
    tensors = [y if y is None else y.to(backend.device) for y in (x, dictionary, gram)]
    return [y.cpu() for y in backend.ops.lexico_encode(*tensors, **arguments)]


def assert_same_bits(actual, expected, what):
    for a, e, name in zip(actual, expected, CODES, strict=True):
        assert_bitwise_equal(a, e, f"{name} of {what}")


@each_device_backend
@pytest.mark.asan
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_kernel(backend, head_dim):
    # Two stages of the dictionary, warps with and without vectors, every way to end.
    x = normal(1, 2, 9, head_dim, seed=head_dim, dtype=DTYPES[head_dim % 3])
    x[0, 0, 3] = 0
    x[0, 1, 2, 5] = torch.nan
    dictionary = make_dictionary(70, head_dim)
    x[0, 1, 4] = dictionary[8] - dictionary[3]
    for arguments in ({"sparsity": 3}, {"sparsity": 2, "tolerance": 0.9, "dtype": F32}):
        actual = encode(backend, x, dictionary, **arguments)
        expected = lexico.lexico_encode(x, dictionary, **arguments)
        assert_same_codes(actual, expected, x, dictionary, 1)
    codes = [y.to(backend.device) for y in actual[:3]]
    out = backend.ops.lexico_reconstruct(*codes, dictionary.to(backend.device), dtype=F32)
    expected = lexico.lexico_reconstruct(*actual[:3], dictionary)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@GOALS
@each_device_backend
@pytest.mark.parametrize(
    "size", [(40, 512, 64), pytest.param((400, 4096, 128), marks=pytest.mark.slow)], ids=str
)
def test_support_and_residual(backend, size, sparsity, share):
    vectors, atoms, head_dim = size
    x, dictionary = normal(1, 1, vectors, head_dim, seed=3), make_dictionary(atoms, head_dim)
    expected = lexico.lexico_encode(x, dictionary, sparsity=sparsity)
    actual = encode(backend, x, dictionary, sparsity=sparsity)
    assert same_support(actual[0], expected[0]) >= share
    assert 0.999 <= actual[3].norm() / expected[3].norm() <= 1.001


@each_device_backend
@pytest.mark.parametrize("given_gram", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.85])
def test_a_vector_does_not_depend_on_the_others(backend, given_gram, tolerance):
    # Alone, its search is split between as many CTAs as there are stages of the dictionary; among
    # many, lists are compacted in another order.
    x, dictionary = normal(1, 2, 150, 64, seed=21), make_dictionary(130, 64)
    gram = dictionary @ dictionary.T if given_gram else None
    arguments = {"sparsity": 5, "tolerance": tolerance}
    all_of_them = encode(backend, x, dictionary, gram, **arguments)
    for part in (slice(0, 1), slice(31, 33), slice(140, 150)):
        some = encode(backend, x[:, 1:, part], dictionary, gram, **arguments)
        assert_same_bits(some, [y[:, 1:, part].contiguous() for y in all_of_them], part)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    shuffled = encode(backend, x[:, :, order], dictionary, gram, **arguments)
    assert_same_bits(shuffled, [y[:, :, order] for y in all_of_them], "another order")


@each_device_backend
@pytest.mark.asan
def test_dictionaries_begin_anywhere(backend):
    x, dictionary = normal(1, 1, 3, 64, seed=20), make_dictionary(70, 64)
    shifted = torch.cat([torch.zeros(1), dictionary.flatten()]).to(backend.device)[1:].view(70, 64)
    assert shifted.data_ptr() % 16 != 0
    codes = encode(backend, x, dictionary, sparsity=2)
    actual = backend.ops.lexico_encode(x.to(backend.device), shifted, sparsity=2)
    assert_same_bits([y.cpu() for y in actual], codes, "the same dictionary elsewhere")
    out = backend.ops.lexico_reconstruct(*actual[:3], shifted, dtype=BF16)
    assert_bitwise_equal(out.cpu(), run_reconstruct(backend, codes[:3], dictionary), "vectors")


@each_device_backend
def test_the_largest_dictionary(backend):
    # More stages than CTAs: several to a part. Indices end at 32,767.
    dictionary = make_dictionary(32768, 64)
    x = normal(1, 1, 3, 64, seed=22)
    x[0, 0, 1] = 3 * dictionary[-1]
    actual = encode(backend, x, dictionary, sparsity=1)
    assert_same_codes(actual, lexico.lexico_encode(x, dictionary, sparsity=1), x, dictionary, 1)
    assert actual[0][0, 0, 1, 0] == 32767


@each_device_backend
def test_more_vectors_than_are_in_work_at_a_time(backend):
    # Zeros are done when they are loaded; the rest lies at the ends of the chunks.
    vectors = 100_000
    x = torch.zeros(1, 1, 1, 64).expand(1, 1, vectors, 64).clone()
    places = [0, 1, 27_647, 27_648, 43_519, 43_520, 87_039, 87_040, vectors - 1]
    x[0, 0, places] = normal(len(places), 64, seed=23)
    dictionary = make_dictionary(64, 64)
    actual = encode(backend, x, dictionary, sparsity=2)
    few = encode(backend, x[:, :, places], dictionary, sparsity=2)
    assert_same_bits([y[:, :, places] for y in actual], few, "those that are not zero")
    rest = torch.ones(vectors, dtype=torch.bool)
    rest[places] = False
    for y in actual:
        assert not y[0, 0, rest].any()


@each_device_backend
def test_equal_atoms_give_the_first(backend):
    dictionary = make_dictionary(140, 64)
    dictionary[139] = dictionary[2]
    dictionary[70] = dictionary[2]
    dictionary[30] = -dictionary[2]
    x = dictionary[2].view(1, 1, 1, 64)
    for gram in (None, dictionary @ dictionary.T):
        indices, values, _, residual = encode(backend, x, dictionary, gram, sparsity=4, dtype=F32)
        assert indices.flatten().tolist() == [2, 0, 0, 0]
        assert (values != 0).sum() == 1
        assert residual.item() < 1e-6


@each_device_backend
@pytest.mark.parametrize("given_gram", [False, True])
def test_an_atom_in_the_span_of_the_others_ends_the_code(backend, given_gram):
    # Two atoms whose angle is 2^-9: the second one would explain more, with huge coefficients.
    dictionary = torch.zeros(2, 64)
    dictionary[:, 0] = 1
    dictionary[1, 1] = 2**-9
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    x = torch.zeros(1, 1, 1, 64)
    x[..., :2] = 1
    gram = dictionary @ dictionary.T if given_gram else None
    arguments = {"sparsity": 2, "dtype": F32}
    actual = encode(backend, x, dictionary, gram, **arguments)
    assert_same_codes(actual, lexico.lexico_encode(x, dictionary, **arguments), x, dictionary, 1)
    assert actual[0].flatten().tolist() == [1, 0]
    assert (actual[1] != 0).sum() == 1


@each_device_backend
@pytest.mark.parametrize("sparsity", [33, 64])
def test_long_codes(backend, sparsity):
    # Lanes have two rows and two columns of the factorization.
    x, dictionary = normal(1, 1, 5, 64, seed=24), make_dictionary(150, 64)
    actual = encode(backend, x, dictionary, sparsity=sparsity, dtype=F32)
    expected = lexico.lexico_encode(x, dictionary, sparsity=sparsity, dtype=F32)
    # 64 atoms span everything: the last ones are chosen by what rounding has left.
    same = (actual[0] == expected[0]).int().cumprod(-1).sum(-1)
    assert (same >= 33).all()
    back = lexico.lexico_reconstruct(*actual[:3], dictionary).double()
    error = (back - x).norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(error.float(), actual[3], rtol=1e-3, atol=1e-5)


@each_device_backend
@pytest.mark.parametrize("index", [-1, 20, 32767, -32768])
def test_indices_out_of_range(backend, index):
    dictionary = make_dictionary(20, 64)
    x = normal(1, 2, 5, 64, seed=25)
    codes = lexico.lexico_encode(x, dictionary, sparsity=3)[:3]
    clean = run_reconstruct(backend, codes, dictionary)
    codes[0][0, 1, 2, 1] = index
    out = run_reconstruct(backend, codes, dictionary)
    assert out[0, 1, 2].isnan().all()
    out[0, 1, 2] = clean[0, 1, 2]
    assert_bitwise_equal(out, clean, "neighbours")
    with pytest.raises(RuntimeError, match="indices: out of range"):
        backend.ops.raise_errors(torch.empty(0, device=backend.device))
    with pytest.raises(RuntimeError, match=r"indices\[0, 1, 2, 1\] must be in \[0, 20\)"):
        run_reconstruct(backend, codes, dictionary, check_values=True)
    backend.ops.raise_errors(torch.empty(0, device=backend.device))


def run_reconstruct(backend, codes, dictionary, **arguments):
    codes = [y.to(backend.device) for y in codes]
    out = backend.ops.lexico_reconstruct(
        *codes, dictionary.to(backend.device), dtype=BF16, **arguments
    )
    return out.cpu()


@each_device_backend
def test_check_values(backend):
    dictionary = make_dictionary(20, 64)
    dictionary[7] *= 1.01
    x = normal(1, 1, 2, 64, seed=26)
    with pytest.raises(RuntimeError, match=r"dictionary\[7\] must be an atom of norm 1"):
        encode(backend, x, dictionary, sparsity=2, check_values=True)


@pytest.mark.cuda
def test_graphs():
    # Launches and memory depend on shapes alone, so a graph of one call serves other vectors.
    x, dictionary = normal(1, 2, 40, 128, seed=27).cuda(), make_dictionary(512, 128).cuda()
    other = normal(1, 2, 40, 128, seed=28).cuda()
    other[0, 0, 3] = 0
    arguments = {"sparsity": 8, "tolerance": 0.3}
    kvcore.lexico_encode(x, dictionary, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = kvcore.lexico_encode(x, dictionary, **arguments)
        back = kvcore.lexico_reconstruct(*codes[:3], dictionary)
    x.copy_(other)
    graph.replay()
    expected = kvcore.lexico_encode(other, dictionary, **arguments)
    assert_same_bits(codes, expected, "a replay")
    assert_bitwise_equal(back, kvcore.lexico_reconstruct(*expected[:3], dictionary), "vectors")
