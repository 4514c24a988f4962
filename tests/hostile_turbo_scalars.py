"""Scalars out of range that the ops of turbo must reject."""

from collections.abc import Iterator

import torch

from hostile_calls import FLOATS, INF, INT64_MIN, INT_MAX, NAN, Spoiled, put, softmax_scalars
from hostile_turbo import D, H


def of_scalars() -> Iterator[Spoiled]:
    for op in ("attention", "decode"):
        yield from softmax_scalars(op)
        text = "sas_threshold must be in [-87, 0) or None, got "
        for value, got in (
            (0.0, "0"),
            (1.0, "1"),
            (-87.5, "-87.5"),
            (NAN, "nan"),
            (INF, "inf"),
            (-INF, "-inf"),
            (1e-300, "1e-300"),
        ):
            yield Spoiled(op, f"sas_threshold={got}", put("sas_threshold", value), text + got)
    for op in ("quantize", "append"):
        text = "tail_margin must be finite and at least 1, got "
        for value, got in (
            (NAN, "nan"),
            (INF, "inf"),
            (-INF, "-inf"),
            (0.0, "0"),
            (-1.5, "-1.5"),
            (0.9999, "0.9999"),
            (1e39, "1e+39"),
        ):
            yield Spoiled(op, f"tail_margin={got}", put("tail_margin", value), text + got)
    for value in (-1, INT64_MIN):
        text = f"sink_pages must be at least 0, got {value}"
        yield Spoiled("quantize", f"sink_pages={value}", put("sink_pages", value), text)
    for name in ("k_bits", "v_bits"):
        for value, text in (
            ([], f"{name} must be 1 or {H} widths, got 0"),
            ([4, 4, 4], f"{name} must be 1 or {H} widths, got 3"),
            ([0], f"{name}[0] must be one of 8, 4, 2, got 0"),
            ([-4], f"{name}[0] must be one of 8, 4, 2, got -4"),
            ([4, 16], f"{name}[1] must be one of 8, 4, 2, got 16"),
            ([2**62], f"{name}[0] must be one of 8, 4, 2, got {2**62}"),
        ):
            yield Spoiled("quantize", f"{name}={value}", put(name, value), text)
    for value in (-2, INT64_MIN, 1, 63, D + 2, 2**62):
        text = f"rotary_dim must be -1 or an even number in [0, {D}], got {value}"
        yield Spoiled("calibrate", f"rotary_dim={value}", put("rotary_dim", value), text)
    for value in (-1, INT64_MIN, 2**31, 2**62):
        text = f"kv_len must be in [0, {INT_MAX}], got {value}"
        yield Spoiled("dequantize", f"kv_len={value}", put("kv_len", value), text)
    text = "kv_len must be at least seq_lens[0] = 130, got 129"
    yield Spoiled("dequantize", "kv_len=129", put("kv_len", 129), text)
    for dtype, name in (
        (torch.float64, "float64"),
        (torch.int8, "int8"),
        (torch.bool, "bool"),
        (torch.complex64, "ComplexFloat"),
        (torch.float8_e5m2, "Float8_e5m2"),
    ):
        text = f"dtype must be {FLOATS}, got {name}"
        yield Spoiled("dequantize", f"dtype={name}", put("dtype", dtype), text)
