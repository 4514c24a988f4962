"""Scalars that ops must reject: values out of range, and other Python types."""

from collections.abc import Iterator

import torch

from hostile_calls import FLOATS, INF, INT64_MIN, INT_MAX, NAN, D, H, Spoiled, put, schema_name


def both(**scalars: object):
    return lambda args: args.update(scalars)


def of_scalars() -> Iterator[Spoiled]:
    for op in ("attention", "decode"):
        for value, got in ((NAN, "nan"), (INF, "inf"), (-INF, "-inf"), (1e39, "1e+39")):
            text = f"scale must be finite in float32, got {got}"
            yield Spoiled(op, f"scale={got}", put("scale", value), text)
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
        for value in (0, -1, INT64_MIN):
            text = f"window must be at least 1 or None, got {value}"
            yield Spoiled(op, f"window={value}", both(window=value, causal=True), text)
        text = "window must be None without causal, got 5"
        yield Spoiled(op, "window-full", both(window=5, causal=False), text)
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


def of_types() -> Iterator[Spoiled]:
    """Scalars of another Python type, which torch's schemas turn away by name."""
    wrong = {
        "bool": ("text", [1]),
        "int": ("text", 2.5, [1], None, 2**63),
        "Optional[int]": ("text", 2.5, [1], 2**63, -(2**63) - 1),
        "float": ("text", [1.0], None, 1j),
        "Optional[float]": ("text", [1.0], 1j),
        "List[int]": ("text", 4, None, [4.5], ["4"], [2**63], torch.tensor([4])),
    }
    scalars = {
        "attention": {
            "causal": "bool",
            "scale": "Optional[float]",
            "window": "Optional[int]",
            "sas_threshold": "Optional[float]",
            "check_values": "bool",
        },
        "calibrate": {"balance": "bool", "subtract_mean": "bool", "rotary_dim": "int"},
        "quantize": {
            "k_bits": "List[int]",
            "v_bits": "List[int]",
            "sink_pages": "int",
            "tail_margin": "float",
        },
        "append": {"tail_margin": "float"},
        "dequantize": {"kv_len": "int", "right_align": "bool"},
        "decode": {
            "causal": "bool",
            "scale": "Optional[float]",
            "window": "Optional[int]",
            "sas_threshold": "Optional[float]",
        },
    }
    for op, kinds in scalars.items():
        for name, kind in kinds.items():
            for i, value in enumerate(wrong[kind]):
                text = (
                    f"kvcore::{schema_name(op)}() Expected a value of type '{kind}' for argument "
                )
                text += f"'{name}' but instead found type '{type(value).__name__}'."
                label = f"{name}-{kind}-{i}"
                yield Spoiled(op, label, put(name, value), text, exact=False)
    for op in ("attention", "append", "decode", "calibrate"):
        text = "Unknown keyword argument 'mode' for operator"
        yield Spoiled(op, "unknown", put("mode", "fast"), text, exact=False)
