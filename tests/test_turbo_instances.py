"""Every instance of the attention kernels, on problems that even the check for races runs quickly.

Kernels of CUDA are templates; tests/simt/test_launches.py fails if the tests marked asan leave one
of their instances out. What is computed is looked at more closely elsewhere.
"""

import pytest
import torch

import cases
from cases import BF16, F16, F32, HEAD_DIMS, Shape
from compare import assert_same_attention
from kvcore.reference import turbo

pytestmark = pytest.mark.asan


def moved(backend, *tensors):
    return [x.to(backend.device) for x in tensors]


@cases.each_backend
@pytest.mark.parametrize(
    ("head_dim", "dtype"), list(zip(HEAD_DIMS, (F32, F16, BF16, F16), strict=True)), ids=str
)
def test_prefill(backend, head_dim, dtype):
    # More rows than a tile has at head_dim 256, and an open page.
    q, k, v = cases.make_qkv(Shape(head_dim, 70, 35, 1, 2, dtype=dtype))
    inputs = (q, k, v, *turbo.turbo_calibrate(k))
    got = backend.ops.turbo_attention(*moved(backend, *inputs), causal=True)
    assert_same_attention(got, turbo.turbo_attention(*inputs, causal=True))


@cases.each_backend
def test_packed_prefill(backend):
    q, k, v = cases.make_qkv(Shape(64, 90, 9))
    lens = torch.tensor([[0, 4, 4, 9], [0, 70, 71, 90]], dtype=torch.int32)
    inputs = (q, k, v, None, None, *lens)
    on_device = [x if x is None else x.to(backend.device) for x in inputs]
    got = backend.ops.turbo_attention(*on_device, causal=True)
    assert_same_attention(got, turbo.turbo_attention(*inputs, causal=True))


@cases.each_backend
@pytest.mark.parametrize("rows", [5, 9])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_in_splits(backend, head_dim, rows):
    # 5 and 9 rows: tiles of 8 and of 16. Five pages are two splits, to be merged.
    q, k, v = cases.make_qkv(Shape(head_dim, 300, rows))
    calibration = turbo.turbo_calibrate(k)
    store = cases.store_of(turbo.turbo_quantize(k, v, *calibration, k_bits=[4], v_bits=[2]))
    scalars = {"causal": False, "sas_threshold": None}
    readable = store.to(backend.device).readable
    on_device = moved(backend, q, *calibration)
    got = backend.ops.turbo_decode(on_device[0], *readable, *on_device[1:], **scalars)
    want = turbo.turbo_decode(q, *store.readable, *calibration, **scalars)
    assert_same_attention(got, want)
