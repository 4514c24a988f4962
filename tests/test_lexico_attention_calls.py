"""lexico_attention: wrong calls, and torch's use of it."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kvcore
from cases import BF16, DTYPES, F32, Shape
from compare import assert_bitwise_equal
from lexico_cases import make_problem


def arguments():
    problem = make_problem(
        Shape(64, 40, 2, 2, 2), blocks=1, buffer=6, buffer_lens=(6,), left_padding=(3,)
    )
    names = [f.name for f in problem.__dataclass_fields__.values()]
    return dict(zip(names, problem.tensors(), strict=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def corrupt_tail(name, where, value):
    def change(values):
        tail = values[name].clone()
        tail[0, 1, 0, where] = value
        return {name: tail}

    return change


def corrupt_block(name, where, value):
    def change(values):
        block = values[name][0].clone()
        block[0, 1, where] = value
        return {name: [block]}

    return change


REJECTED = [
    ({"q": torch.zeros(4, 2, 64)}, "q must be 4-dimensional, got [4, 2, 64]"),
    ({"q": torch.zeros(1, 4, 2, 64).int()}, "q must be float32, float16 or bfloat16, got int32"),
    ({"q": torch.zeros(1, 4, 2, 32)}, "head_dim must be one of 64, 96, 128, 256, got 32"),
    ({"q": torch.zeros(1, 3, 2, 64)}, "q must be of a multiple of 2 heads, got 3"),
    ({"q": torch.zeros(2, 4, 2, 64)}, "k_tail must be [2, *, *, 544], got [1, 2, 3, 544]"),
    ({"k_dictionary": torch.zeros(5, 96)}, "k_dictionary must be [*, 64], got [5, 96]"),
    ({"v_dictionary": torch.zeros(5, 64).half()}, "v_dictionary must be float32, got float16"),
    (
        {"k_tail": torch.zeros(1, 2, 3, 100).byte()},
        "k_tail must be [batch, kv_heads, tiles, bytes] with bytes 64 + 96 * sparsity, sparsity 1 "
        "to 64, got [1, 2, 3, 100]",
    ),
    (
        {"v_tail": torch.zeros(1, 3, 3, 160).byte()},
        "v_tail must be [1, 2, *, 160], got [1, 3, 3, 160]",
    ),
    ({"k_tail": torch.zeros(1, 2, 3, 160).char()}, "k_tail must be uint8, got int8"),
    ({"v_blocks": []}, "v_blocks must be as many blocks as k_blocks, 1, got 0"),
    (
        {"k_blocks": [torch.zeros(1, 2, 64).byte()]},
        "k_blocks[0] must be of a multiple of 64 bytes a head, at least 128, got 64",
    ),
    (
        {"v_blocks": [torch.zeros(1, 2, 8384).byte()[..., :8383].contiguous()]},
        "v_blocks[0] must be of a multiple of 64 bytes a head, at least 8384, got 8383",
    ),
    ({"tail_lens": int32(97)}, "tail_lens[0] must be in [0, 96], got 97"),
    ({"tail_lens": int32(-1)}, "tail_lens[0] must be in [0, 96], got -1"),
    ({"tail_lens": int32(1, 2)}, "tail_lens must be [1], got [2]"),
    ({"tail_lens": int32(1).long()}, "tail_lens must be int32, got int64"),
    ({"v_buffer": None}, "v_buffer must be given, as k_buffer is, got None"),
    (
        {"k_buffer": None, "v_buffer": None},
        "buffer_lens must be None without k_buffer, got a tensor",
    ),
    (
        {"v_buffer": torch.zeros(1, 2, 5, 64)},
        "v_buffer must be [1, 2, 6, 64], got [1, 2, 5, 64]",
    ),
    (
        {"k_buffer": torch.zeros(1, 2, 6, 64).half()},
        "k_buffer must be float32 like q, got float16",
    ),
    ({"buffer_lens": int32(7)}, "buffer_lens[0] must be in [0, 6], got 7"),
    ({"left_padding": int32(-2)}, "left_padding[0] must be in [0, 4198], got -2"),
    ({"scale": float("inf")}, "scale must be finite in float32, got inf"),
    ({"window": 0}, "window must be at least 1 or None, got 0"),
    ({"window": 3, "causal": False}, "window must be None without causal, got 3"),
    # The first index of a tile, little-endian, is behind 64 bytes of scales.
    (corrupt_tail("k_tail", 64, 70), "k_tail must be codes over 70 atoms, got others"),
    (corrupt_tail("k_tail", 65, 255), "k_tail must be codes over 70 atoms, got others"),
    (corrupt_tail("v_tail", 65, 1), "v_tail must be codes over 90 atoms, got others"),
    (corrupt_block("k_blocks", 0, 65), "k_blocks[0] must be codes over 70 atoms, got others"),
    (
        corrupt_block("k_blocks", 128 + 64, 71),
        "k_blocks[0] must be codes over 70 atoms, got others",
    ),
    (
        corrupt_block("k_blocks", slice(0, 128), 64),
        "k_blocks[0] must be codes over 70 atoms, got others",
    ),
    (
        corrupt_block("v_blocks", 8192 + 1, 255),
        "v_blocks[0] must be codes over 90 atoms, got others",
    ),
    (
        corrupt_block("v_blocks", 8192 + 180 + 1, 16),
        "v_blocks[0] must be codes over 90 atoms, got others",
    ),
]


@pytest.mark.asan
@pytest.mark.parametrize(("change", "message"), REJECTED)
def test_rejects(change, message):
    values = arguments()
    values |= change(values) if callable(change) else change
    with pytest.raises(RuntimeError, match=f"^lexico_attention: {re.escape(message)}"):
        torch.ops.kvcore.lexico_attention(**values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    problem = make_problem(Shape(64, 50, 3, 1, 2, dtype=dtype), blocks=1, buffer=4)
    op = torch.ops.kvcore.lexico_attention.default
    torch.library.opcheck(op, tuple(problem.tensors()), {"window": 9})


def test_compiled_equals_eager():
    problem = make_problem(Shape(64, 50, 1, 2, 2, dtype=BF16), blocks=1, buffer=6)

    def run(q, *store):
        out, lse = kvcore.lexico_attention(q * 0.5, *store)
        return out + 0, lse

    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(compiled(*problem.tensors()), run(*problem.tensors()), strict=True):
        assert_bitwise_equal(a, b)


def test_fake_tensors_on_cuda():
    problem = make_problem(Shape(64, 50, 1, 2, 2, dtype=BF16))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move = lambda x: torch.empty_like(mode.from_tensor(x), device="cuda")  # noqa: E731
        tensors = [x if x is None or isinstance(x, list) else move(x) for x in problem.tensors()]
        out, lse = kvcore.lexico_attention(*tensors)
    assert (out.shape, out.dtype, out.device.type) == (problem.q.shape, BF16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == (problem.q.shape[:3], F32, "cuda")


def test_has_no_backward():
    problem = make_problem(Shape(64, 20, 1, 1, 1))
    problem.q.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^lexico_attention: has no backward"):
        problem.run()[0].sum().backward()
