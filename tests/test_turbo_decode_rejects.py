"""What turbo_decode refuses, each with its message."""

import re

import pytest
import torch

import cases
import kvcore
from cases import Shape, make_qkv
from kvcore.reference import turbo

NAMES = ("q", "pool", "block_table", "tail", "seq_lens", "k_balance", "k_mean")


def arguments():
    q, k, v = make_qkv(Shape(64, 300, 5, 2, 2))
    calibration = turbo.turbo_calibrate(k)
    store = cases.store_of(kvcore.turbo_quantize(k, v, *calibration))
    return dict(zip(NAMES, (q, *store.readable, *calibration), strict=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def entry(page, value):
    """Sets the entry of one page of V's head 1."""

    def change(values):
        table = values["block_table"].clone()
        table[0, 1, 1, page] = value
        return {"block_table": table}

    return change


def with_pool(function):
    return lambda values: {"pool": function(values["pool"])}


# What is changed in arguments(), or what makes the changes from them, and the text after
# "turbo_decode: ". The store has a slab of 4 sink blocks and one of 12 with 4 bit.
REJECTED = [
    ({"q": torch.zeros(4, 5, 64)}, "q must be 4-dimensional, got [4, 5, 64]"),
    ({"q": torch.zeros(1, 4, 5, 64).int()}, "q must be float32, float16 or bfloat16, got int32"),
    ({"q": torch.zeros(1, 4, 5, 32)}, "head_dim must be one of 64, 96, 128, 256, got 32"),
    ({"q": torch.zeros(1, 5, 5, 64)}, "q must be of a multiple of 2 heads, got 5"),
    ({"q": torch.zeros(2, 4, 5, 64)}, "block_table must be [2, 2, 2, *], got [1, 2, 2, 4]"),
    ({"q": torch.zeros(1, 4, 5, 128)}, "tail must be [1, 2, 2, 2, 8256], got [1, 2, 2, 2, 4160]"),
    ({"block_table": int32(0, 1)}, "block_table must be 4-dimensional, got [2]"),
    (
        {"block_table": torch.zeros(1, 2, 0, 4).int()},
        "block_table must be of at least 1 head, got 0",
    ),
    (
        {"block_table": torch.zeros(1, 3, 2, 4).int()},
        "block_table must be [1, 2, 2, *], got [1, 3, 2, 4]",
    ),
    ({"block_table": torch.zeros(1, 2, 2, 4)}, "block_table must be int32, got float32"),
    (
        {"block_table": torch.zeros(1, 2, 2, 8).int()[..., ::2]},
        "block_table must be contiguous, got strides [32, 16, 8, 2]",
    ),
    (
        {"tail": torch.zeros(1, 2, 2, 1, 4160).byte()},
        "tail must be [1, 2, 2, 2, 4160], got [1, 2, 2, 1, 4160]",
    ),
    ({"tail": torch.zeros(1, 2, 2, 2, 4160).char()}, "tail must be uint8, got int8"),
    ({"seq_lens": int32(300, 300)}, "seq_lens must be [1], got [2]"),
    ({"seq_lens": torch.tensor([300])}, "seq_lens must be int32, got int64"),
    ({"seq_lens": int32(-1)}, "seq_lens[0] must be in [0, 319], got -1"),
    ({"seq_lens": int32(320)}, "seq_lens[0] must be in [0, 319], got 320"),
    ({"k_balance": torch.ones(1, 2, 32)}, "k_balance must be [1, 2, 64], got [1, 2, 32]"),
    ({"k_mean": torch.ones(1, 2, 64).double()}, "k_mean must be float32, got float64"),
    (with_pool(lambda pool: [pool[0].char(), pool[1]]), "pool[0] must be uint8, got int8"),
    (
        with_pool(lambda pool: [pool[0], pool[1][:, :-1]]),
        "pool[1] must be [*, 4160], [*, 2240] or [*, 1216], got [12, 2239]",
    ),
    (
        with_pool(lambda pool: [pool[0][:3], pool[1]]),
        "block_table[0, 1, 1, 0] must be the entry of a block of pool, got 3",
    ),
    (
        with_pool(lambda pool: [pool[0]]),
        "block_table[0, 0, 0, 1] must be the entry of a block of pool, got 2097152",
    ),
    (
        with_pool(lambda pool: []),
        "block_table[0, 0, 0, 0] must be the entry of a block of pool, got 0",
    ),
    (
        entry(0, 2**21 + 12),
        "block_table[0, 1, 1, 0] must be the entry of a block of pool, got 2097164",
    ),
    (entry(3, -1), "block_table[0, 1, 1, 3] must be the entry of a block of pool, got -1"),
    (
        entry(2, 2**31 - 1),
        "block_table[0, 1, 1, 2] must be the entry of a block of pool, got 2147483647",
    ),
    ({"scale": torch.inf}, "scale must be finite in float32, got inf"),
    ({"window": -3}, "window must be at least 1 or None, got -3"),
    ({"window": 5, "causal": False}, "window must be None without causal, got 5"),
    ({"sas_threshold": 1.0}, "sas_threshold must be in [-87, 0) or None, got 1"),
]


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_rejects(changes, message):
    values = arguments()
    values |= changes(values) if callable(changes) else changes
    with pytest.raises(RuntimeError, match=re.escape(f"turbo_decode: {message}") + "$"):
        kvcore.turbo_decode(**values)


def test_arguments_are_accepted_as_they_are():
    out, lse = kvcore.turbo_decode(**arguments())
    assert out.isfinite().all()
    assert lse.isfinite().all()
