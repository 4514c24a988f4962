"""lexico_encode and lexico_reconstruct against their reference and against scikit-learn."""

import re

import pytest
import torch
from sklearn.linear_model import orthogonal_mp
from torch._subclasses.fake_tensor import FakeTensorMode

import kvcore
from cases import BF16, DTYPES, F32, HEAD_DIMS, LAYOUTS, each_backend, normal, with_layout
from compare import assert_bitwise_equal, assert_close
from kvcore.reference import lexico
from lexico_cases import changed, make_dictionary

NAMES = ("indices", "coefficients", "scale", "residual")


def same_support(actual, expected):
    """Share of the vectors whose codes name the same set of atoms."""
    a, e = (x.long().sort(-1).values for x in (actual, expected))
    return (a == e).all(-1).float().mean().item()


def reconstruct_exactly(codes, dictionary):
    return lexico.lexico_reconstruct(*codes[:3], dictionary).double()


def assert_same_codes(actual, expected, x, dictionary, share=0.995):
    """Codes of one specification.

    Few vectors may have two atoms that are equally good to fp32 rounding, and then other
    coefficients; how well they are explained must be the same.
    """
    for a, e, name in zip(actual, expected, NAMES, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), name
    actual = [a.cpu() for a in actual]
    assert same_support(actual[0], expected[0]) >= share
    assert_close(actual[3], expected[3], rtol=1e-3, atol=1e-5, name="residual")
    assert torch.equal(actual[2].isnan(), expected[2].isnan())
    same = (actual[0] == expected[0]).all(-1)
    if actual[1].dtype == F32:
        bound = 1e-4 * expected[1].abs().amax(-1, keepdim=True)
        assert ((actual[1] - expected[1]).abs() <= bound)[same].all()
    elif actual[1].dtype == torch.int8:
        # A coefficient half way between two codes may be rounded to either.
        assert ((actual[1].int() - expected[1].int()).abs() <= 1)[same].all()
        assert (actual[1] == expected[1])[same].float().mean() >= 0.99
    assert_close(actual[2].float()[same], expected[2].float()[same], rtol=2e-3, atol=6e-8)


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


GOALS = pytest.mark.parametrize(("sparsity", "share"), [(8, 0.995), (16, 0.995), (32, 0.98)])


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


@pytest.mark.isa
def test_rounding_of_coefficients():
    # One atom per vector: the coefficient is the vector's size, so the scale is all there is.
    dictionary = torch.eye(64)
    sizes = torch.tensor([1.0, 127.0, 1e-3, 3e-5, 1e-7, 1e-12, 60000.0, 8e6])
    x = torch.zeros(1, 1, len(sizes), 64)
    x[0, 0, :, 5] = -sizes
    indices, coefficients, scale, _ = kvcore.lexico_encode(x, dictionary, sparsity=1)
    assert (indices == 5).all()
    back = (coefficients.float().squeeze(-1) * scale.float()).squeeze()
    # The scale is an fp16, rounded up: 2^-24 is the smallest.
    assert_close(back, -sizes, rtol=6e-3, atol=2**-24)
    assert (back.abs()[:2] >= sizes[:2]).all()
    value = kvcore.lexico_encode(x, dictionary, sparsity=1, dtype=F32)
    assert_close(value[1].squeeze(), -sizes, rtol=1e-6, atol=0)
    assert (value[2] == 1).all()


def test_e4m3_is_torchs_rounding():
    x, dictionary = normal(2, 2, 300, 64, seed=9), make_dictionary(256, 64)
    indices, values, _, _ = kvcore.lexico_encode(x, dictionary, sparsity=16, dtype=F32)
    same, coefficients, scale, _ = kvcore.lexico_encode(
        x, dictionary, sparsity=16, dtype=torch.float8_e4m3fn
    )
    assert torch.equal(same, indices)
    expected = (values / scale.float().unsqueeze(-1)).to(torch.float8_e4m3fn)
    assert (coefficients.float() == expected.float()).float().mean() > 0.999
    assert coefficients.float().abs().amax() <= 448
    a = kvcore.lexico_reconstruct(indices, coefficients, scale, dictionary)
    assert_close(
        a, lexico.lexico_reconstruct(indices, coefficients, scale, dictionary), rtol=1e-4, atol=1e-5
    )


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, F32], ids=str)
def test_reconstruct_matches_reference(backend, dtype, kind):
    for head_dim in HEAD_DIMS:
        dictionary = make_dictionary(100, head_dim)
        x = normal(2, 2, 9, head_dim, seed=head_dim)
        codes = [
            y.to(backend.device)
            for y in lexico.lexico_encode(x, dictionary, sparsity=5, dtype=kind)[:3]
        ]
        actual = backend.ops.lexico_reconstruct(*codes, dictionary.to(backend.device), dtype=dtype)
        expected = lexico.lexico_reconstruct(*[c.cpu() for c in codes], dictionary, dtype=dtype)
        rtol = {F32: 1e-5, torch.float16: 2e-3, BF16: 1e-2}[dtype]
        assert_close(actual, expected, rtol=rtol, atol=1e-5 if dtype == F32 else 1e-3)


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
        for a, e, name in zip(actual, expected, NAMES, strict=True):
            assert a.is_contiguous()
            assert_bitwise_equal(a, e, f"{name}, {layout}")


@each_backend
@pytest.mark.parametrize("size", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_and_odd_shapes(backend, size):
    dictionary = make_dictionary(10, 64).to(backend.device)
    codes = backend.ops.lexico_encode(
        torch.zeros(*size, 64, device=backend.device), dictionary, sparsity=3
    )
    assert [tuple(c.shape) for c in codes] == [(*size, 3), (*size, 3), size, size]
    back = backend.ops.lexico_reconstruct(*codes[:3], dictionary)
    assert back.shape == (*size, 64)


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
            for a, b, name in zip(again, first, NAMES, strict=True):
                assert_bitwise_equal(a, b, f"{name} of {num_threads} threads")
    finally:
        torch.set_num_threads(threads)
    alone = backend.ops.lexico_encode(x[1:, :1, 3:50], dictionary, gram, sparsity=12)
    if given_gram:
        for a, b, name in zip(alone, first, NAMES, strict=True):
            assert_bitwise_equal(a, b[1:, :1, 3:50].contiguous(), f"{name} of a part")


def arguments_of_encode():
    return {"x": normal(1, 2, 5, 64, seed=1), "dictionary": make_dictionary(20, 64), "gram": None}


ENCODE_REJECTED = [
    ({"x": torch.zeros(2, 5, 64)}, "x must be 4-dimensional, got [2, 5, 64]"),
    ({"x": torch.zeros(1, 1, 1, 64).int()}, "x must be float32, float16 or bfloat16, got int32"),
    ({"x": torch.zeros(1, 1, 1, 80)}, "head_dim must be one of 64, 96, 128, 256, got 80"),
    ({"dictionary": torch.zeros(20, 96)}, "dictionary must be [*, 64], got [20, 96]"),
    ({"dictionary": torch.zeros(64)}, "dictionary must be [*, 64], got [64]"),
    ({"dictionary": torch.zeros(20, 64).half()}, "dictionary must be float32, got float16"),
    (
        {"dictionary": torch.zeros(64, 20).T},
        "dictionary must be contiguous, got strides [1, 20]",
    ),
    ({"dictionary": torch.zeros(0, 64)}, "dictionary must be of 1 to 32768 atoms, got 0"),
    ({"dictionary": torch.zeros(32769, 64)}, "dictionary must be of 1 to 32768 atoms, got 32769"),
    (changed("dictionary", 3, 0), "dictionary[3] must be an atom of norm 1, got 0"),
    (changed("dictionary", 19, torch.nan), "dictionary[19] must be an atom of norm 1, got nan"),
    (
        lambda values: {"dictionary": values["dictionary"] * 1.001},
        "dictionary[0] must be an atom of norm 1, got 1.001",
    ),
    ({"gram": torch.zeros(20, 19)}, "gram must be [20, 20], got [20, 19]"),
    ({"gram": torch.zeros(20, 20).double()}, "gram must be float32, got float64"),
    ({"sparsity": 0}, "sparsity must be in [1, 20], got 0"),
    ({"sparsity": 21}, "sparsity must be in [1, 20], got 21"),
    (
        {"sparsity": 65, "dictionary": make_dictionary(100, 64)},
        "sparsity must be in [1, 64], got 65",
    ),
    ({"tolerance": -0.1}, "tolerance must be in [0, 1), got -0.1"),
    ({"tolerance": 1.0}, "tolerance must be in [0, 1), got 1"),
    ({"tolerance": float("nan")}, "tolerance must be in [0, 1), got nan"),
    (
        {"dtype": torch.float16},
        "dtype must be int8, float8_e4m3fn or float32, got float16",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), ENCODE_REJECTED, ids=[m for _, m in ENCODE_REJECTED]
)
def test_encode_rejects(change, message):
    values = arguments_of_encode()
    values |= {"sparsity": 4} | (change(values) if callable(change) else change)
    with pytest.raises(RuntimeError, match=f"^lexico_encode: {re.escape(message)}"):
        torch.ops.kvcore.lexico_encode(**values)


RECONSTRUCT_REJECTED = [
    ({"indices": torch.zeros(5, 3).short()}, "indices must be 4-dimensional, got [5, 3]"),
    ({"indices": torch.zeros(1, 1, 5, 3).int()}, "indices must be int16, got int32"),
    (
        {"indices": torch.zeros(1, 1, 5, 0).short()},
        "indices must be of 1 to 64 atoms a vector, got 0",
    ),
    (changed("indices", (0, 0, 2, 1), 20), "indices[0, 0, 2, 1] must be in [0, 20), got 20"),
    (changed("indices", (0, 0, 4, 2), -1), "indices[0, 0, 4, 2] must be in [0, 20), got -1"),
    (
        {"coefficients": torch.zeros(1, 1, 5, 3).half()},
        "coefficients must be int8, float8_e4m3fn or float32, got float16",
    ),
    (
        {"coefficients": torch.zeros(1, 1, 5, 4)},
        "coefficients must be [1, 1, 5, 3], got [1, 1, 5, 4]",
    ),
    ({"scale": torch.zeros(1, 1, 5)}, "scale must be float16, got float32"),
    ({"scale": torch.zeros(1, 5, 1).half()}, "scale must be [1, 1, 5], got [1, 5, 1]"),
    ({"dictionary": torch.zeros(20)}, "dictionary must be 2-dimensional, got [20]"),
    ({"dictionary": torch.zeros(20, 80)}, "head_dim must be one of 64, 96, 128, 256, got 80"),
    ({"dtype": torch.int8}, "dtype must be float32, float16 or bfloat16, got int8"),
]


@pytest.mark.parametrize(
    ("change", "message"), RECONSTRUCT_REJECTED, ids=[m for _, m in RECONSTRUCT_REJECTED]
)
def test_reconstruct_rejects(change, message):
    values = {
        "indices": torch.zeros(1, 1, 5, 3).short(),
        "coefficients": torch.zeros(1, 1, 5, 3).char(),
        "scale": torch.zeros(1, 1, 5).half(),
        "dictionary": make_dictionary(20, 64),
    }
    values |= change(values) if callable(change) else change
    with pytest.raises(RuntimeError, match=f"^lexico_reconstruct: {re.escape(message)}"):
        torch.ops.kvcore.lexico_reconstruct(**values)


def test_opcheck():
    x, dictionary = normal(1, 2, 5, 64, seed=15, dtype=BF16), make_dictionary(20, 64)
    encode = torch.ops.kvcore.lexico_encode.default
    torch.library.opcheck(encode, (x, dictionary), {"sparsity": 3})
    gram = dictionary @ dictionary.T
    arguments = {"sparsity": 3, "dtype": torch.float8_e4m3fn, "tolerance": 0.5}
    # opcheck compares with allclose, which float8 does not have.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(encode, (x, dictionary, gram), arguments, test_utils=tests)
    codes = kvcore.lexico_encode(x, dictionary, sparsity=3)[:3]
    reconstruct = torch.ops.kvcore.lexico_reconstruct.default
    torch.library.opcheck(reconstruct, (*codes, dictionary), {"dtype": BF16})


def test_fake_tensors_on_cuda():
    with FakeTensorMode():
        x = torch.empty(2, 3, 5, 96, dtype=BF16, device="cuda")
        dictionary = torch.empty(200, 96, device="cuda")
        for dtype in (torch.int8, torch.float8_e4m3fn, F32):
            codes = kvcore.lexico_encode(x, dictionary, sparsity=4, dtype=dtype)
            assert [tuple(y.shape) for y in codes] == [(2, 3, 5, 4)] * 2 + [(2, 3, 5)] * 2
            assert [y.dtype for y in codes] == [torch.int16, dtype, torch.float16, F32]
            assert {y.device.type for y in codes} == {"cuda"}
        back = kvcore.lexico_reconstruct(*codes[:3], dictionary, dtype=BF16)
        assert (back.shape, back.dtype, back.device.type) == (x.shape, BF16, "cuda")


def test_compiled_equals_eager():
    x, dictionary = normal(1, 2, 9, 64, seed=16), make_dictionary(80, 64)

    def run(x, dictionary):
        indices, coefficients, scale, residual = kvcore.lexico_encode(x * 2, dictionary, sparsity=4)
        back = kvcore.lexico_reconstruct(indices, coefficients, scale, dictionary)
        return back + 1, residual

    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(compiled(x, dictionary), run(x, dictionary), strict=True):
        assert_bitwise_equal(a, b)


def test_has_no_backward():
    x, dictionary = normal(1, 1, 3, 64, seed=17), make_dictionary(20, 64)
    out = kvcore.lexico_encode(x.requires_grad_(), dictionary, sparsity=2)[3]
    with pytest.raises(RuntimeError, match=r"^lexico_encode: has no backward"):
        out.sum().backward()
    codes = kvcore.lexico_encode(x.detach(), dictionary, sparsity=2)[:3]
    out = kvcore.lexico_reconstruct(*codes, dictionary.requires_grad_())
    with pytest.raises(RuntimeError, match=r"^lexico_reconstruct: has no backward"):
        out.sum().backward()


def test_int8_with_a_scale_has_the_smallest_error():
    # The reason for the default, on small vectors, where unscaled E4M3 would lose most.
    x, dictionary = 0.02 * normal(1, 1, 300, 64, seed=18), make_dictionary(1024, 64)
    errors = {}
    for dtype in (F32, torch.int8, torch.float8_e4m3fn):
        codes = kvcore.lexico_encode(x, dictionary, sparsity=16, dtype=dtype)
        errors[dtype] = (reconstruct_exactly(codes, dictionary) - x).norm() / x.norm()
    assert errors[F32] <= errors[torch.int8] < errors[torch.float8_e4m3fn]
    assert errors[torch.int8] < 1.01 * errors[F32]
