"""Every message of exact attention; a rejected call changes nothing."""

import re
import subprocess
import sys

import pytest
import torch

import kvcore


def zeros(*size, dtype=torch.float32):
    return torch.zeros(*size, dtype=dtype)


DIMS = "head_dim must be a multiple of 16 up to 256, got {}"
INPUTS = [
    ({"q": zeros(4, 6, 32)}, "q must be 4-dimensional, got [4, 6, 32]"),
    ({"q": zeros(1, 4, 6, 32).double()}, "q must be float32, float16 or bfloat16, got float64"),
    ({"k": zeros(6, 32)}, "k must be 4-dimensional, got [6, 32]"),
    ({"k": zeros(1, 2, 9, 32).int()}, "k must be float32, float16 or bfloat16, got int32"),
    *(({"q": zeros(1, 4, 6, dim)}, DIMS.format(dim)) for dim in (0, 8, 60, 100, 272)),
    ({"k": zeros(2, 2, 9, 32)}, "k must be [1, *, *, 32], got [2, 2, 9, 32]"),
    ({"k": zeros(1, 2, 9, 48)}, "k must be [1, *, *, 32], got [1, 2, 9, 48]"),
    ({"k": zeros(1, 0, 9, 32)}, "k must be of at least 1 head, got 0"),
    ({"k": zeros(1, 3, 9, 32)}, "q must be of a multiple of 3 heads, got 4"),
    ({"v": zeros(1, 2, 8, 32)}, "v must be [1, 2, 9, 32], got [1, 2, 8, 32]"),
    ({"v": zeros(1, 2, 9, 48)}, "v must be [1, 2, 9, 32], got [1, 2, 9, 48]"),
    ({"k": zeros(1, 2, 9, 32).half()}, "k must be float32 like q, got float16"),
    ({"v": zeros(1, 2, 9, 32).bfloat16()}, "v must be float32 like q, got bfloat16"),
    ({"v": zeros(1, 2, 9, 32).double()}, "v must be float32 like q, got float64"),
    ({"scale": float("nan")}, "scale must be finite in float32, got nan"),
    ({"scale": 1e39}, "scale must be finite in float32, got 1e+39"),
]
BACKWARD = [
    ({"d_out": zeros(1, 4, 5, 32)}, "d_out must be [1, 4, 6, 32], got [1, 4, 5, 32]"),
    ({"d_out": zeros(1, 4, 6, 32).half()}, "d_out must be float32 like q, got float16"),
    ({"out": zeros(4, 6, 32)}, "out must be [1, 4, 6, 32], got [4, 6, 32]"),
    ({"out": zeros(1, 4, 6, 32).half()}, "out must be float32 like q, got float16"),
    ({"lse": zeros(1, 4, 5)}, "lse must be [1, 4, 6], got [1, 4, 5]"),
    ({"lse": zeros(1, 4, 6).half()}, "lse must be float32, got float16"),
    ({"lse": zeros(1, 6, 4).mT}, "lse must be contiguous, got strides [24, 1, 4]"),
    ({"d_lse": zeros(1, 2, 6)}, "d_lse must be [1, 4, 6], got [1, 2, 6]"),
    ({"d_lse": zeros(1, 4, 6).double()}, "d_lse must be float32, got float64"),
    ({"d_lse": zeros(1, 6, 4).mT}, "d_lse must be contiguous, got strides [24, 1, 4]"),
]


def arguments(op, **changes):
    tensors = {"q": zeros(1, 4, 6, 32), "k": zeros(1, 2, 9, 32), "v": zeros(1, 2, 9, 32)}
    if op == "dense_attention_backward":
        rows = {"d_out": tensors["q"], "out": tensors["q"], "lse": zeros(1, 4, 6)}
        tensors = rows | tensors
    return tensors | changes


def rejected(op, message, changes):
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}") + "$"):
        getattr(kvcore, op)(**arguments(op, **changes))


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), INPUTS, ids=[m for _, m in INPUTS])
def test_rejects(changes, message):
    for op in ("dense_attention", "dense_attention_backward"):
        rejected(op, message, changes)


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), BACKWARD, ids=[m for _, m in BACKWARD])
def test_backward_rejects(changes, message):
    rejected("dense_attention_backward", message, changes)


def test_what_is_accepted():
    """The arguments that the cases above change."""
    for op in ("dense_attention", "dense_attention_backward"):
        assert getattr(kvcore, op)(**arguments(op))[0].shape == (1, 4, 6, 32)


NO_MEMORY = """
import torch, kvcore
q = torch.zeros(1, 1, 1, 64).expand(1, 1, 1 << 44, 64)
k = torch.zeros(1, 1, 1, 64).expand(1, 1, 1 << 50, 64)
for arguments in ((q, q[:, :, :1], q[:, :, :1]), (q[:, :, :1], k, k)):
    try:
        kvcore.dense_attention(*arguments)
    except (RuntimeError, MemoryError) as error:
        print(type(error).__name__, error)
"""


def test_sizes_that_no_memory_holds():
    # In a process of its own: after such a request the allocator serves the thread from elsewhere.
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True)
    of_output, of_scratch = done.stdout.splitlines()
    message = "RuntimeError dense_attention: out must be small enough for the memory of cpu"
    assert of_output.startswith(message)
    assert re.fullmatch(r"MemoryError no memory for \d+ bytes of scratch", of_scratch)


def test_inputs_on_another_device():
    k = torch.empty(1, 2, 9, 32, device="meta")
    with pytest.raises(RuntimeError, match="dense_attention: k must be on cpu like q, got meta"):
        kvcore.dense_attention(**arguments("dense_attention", k=k))
