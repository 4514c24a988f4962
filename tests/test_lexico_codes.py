"""Coefficients and their rounding, lexico_reconstruct; wrong calls, and torch's use of both ops."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kvcore
from cases import BF16, DTYPES, F32, HEAD_DIMS, each_backend, normal
from compare import assert_bitwise_equal, assert_close
from kvcore.reference import lexico
from lexico_cases import changed, make_dictionary


def reconstruct_exactly(codes, dictionary):
    return lexico.lexico_reconstruct(*codes[:3], dictionary).double()


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
@pytest.mark.parametrize("size", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_and_odd_shapes(backend, size):
    dictionary = make_dictionary(10, 64).to(backend.device)
    codes = backend.ops.lexico_encode(
        torch.zeros(*size, 64, device=backend.device), dictionary, sparsity=3
    )
    assert [tuple(c.shape) for c in codes] == [(*size, 3), (*size, 3), size, size]
    back = backend.ops.lexico_reconstruct(*codes[:3], dictionary)
    assert back.shape == (*size, 64)


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
    with pytest.raises(RuntimeError, match=r"^lexico_reconstruct: has no backward; .*no_grad\(\)$"):
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
