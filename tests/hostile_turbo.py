"""Valid calls of every op of turbo, and what can be spoiled in their tensors."""

import itertools
from collections.abc import Callable, Iterator

import torch

import cases
from hostile_calls import (
    WRONG_DTYPES,
    Arguments,
    Family,
    Form,
    Spoiled,
    change,
    dtype_name,
    int32,
    put,
    resized,
)

# Sizes of the valid calls: [batch, 2, kv_heads, max_pages], and a block of 8 bit.
B, H, Q_HEADS, D, PAGES, BLOCK = 2, 2, 4, 64, 4, 4160


def valid(op: str) -> Arguments:
    """Arguments of a call that works, every optional tensor given."""
    balance, mean = 1 + torch.rand(B, H, D), torch.rand(B, H, D)
    calibration = {"k_balance": balance, "k_mean": mean}
    k, v = cases.normal(2, B, H, 70, D, seed=1)
    padding = {"left_padding": int32(0, 3)}
    q = cases.normal(B, Q_HEADS, 5, D, seed=2)
    if op == "attention":
        return {"q": q, "k": k, "v": v, **calibration}
    if op == "attention_packed":
        packed = {name: x[:1].clone() for name, x in calibration.items()}
        cu_seqlens = {"cu_seqlens_q": int32(0, 2, 5), "cu_seqlens_k": int32(0, 30, 70)}
        return {"q": q[:1], "k": k[:1], "v": v[:1], **packed, **cu_seqlens}
    if op == "calibrate":
        return {"k": k, **padding}
    if op == "head_priority":
        return {"x": k, **padding}
    if op == "quantize":
        return {"k": k, "v": v, **calibration, **padding}
    # Sequences of 130 and 70 tokens; the 70 new ones fill page 2 of the first, 1 of the second.
    store = cases.empty_store(B, H, D, PAGES)
    first = cases.normal(2, B, H, 130, D, seed=0)
    torch.ops.kvcore.turbo_append(*first, *store.writable, balance, mean, int32(0, 60))
    state = {name: getattr(store, name) for name in ("pool", "block_table", "tail", "seq_lens")}
    if op == "rewind":
        return {**state, "new_lens": int32(5, 70)}
    if op == "dequantize":
        return {**state, **calibration, "kv_len": 130}
    if op == "decode":
        return {"q": q, **state, **calibration}
    counts = {"tail_scale": store.tail_scale, "clamp_count": store.clamp_count}
    seq_lens = {"seq_lens": state.pop("seq_lens")}
    return {"k": k, "v": v, **state, **counts, **seq_lens, **calibration, **padding}


PER_CHANNEL = Form((B, H, D), torch.float32)
FORMS = {
    "k_balance": PER_CHANNEL,
    "k_mean": PER_CHANNEL,
    "left_padding": Form((B,), torch.int32),
    "block_table": Form((B, 2, H, "*"), torch.int32),
    "tail": Form((B, 2, H, 2, BLOCK), torch.uint8),
    "tail_scale": Form((B, 2, H), torch.float32),
    "clamp_count": Form((B, 2, H), torch.int64),
    "seq_lens": Form((B,), torch.int32),
    "new_lens": Form((B,), torch.int32),
}
CALIBRATION = ("k_balance", "k_mean")
STATE = ("block_table", "tail", "seq_lens")
TENSORS = {
    "attention": CALIBRATION,
    "calibrate": ("left_padding",),
    "head_priority": ("left_padding",),
    "quantize": (*CALIBRATION, "left_padding"),
    "append": (*STATE, "tail_scale", "clamp_count", *CALIBRATION, "left_padding"),
    "rewind": (*STATE, "new_lens"),
    "dequantize": (*STATE, *CALIBRATION),
    "decode": (*STATE, *CALIBRATION),
}
TAILS = "[batch, 2, kv_heads, 2, bytes] with bytes one of 4160, 6208, 8256, 16448"
STORE_OPS = ("append", "rewind", "dequantize", "decode")


def other_words(op: str, name: str, label: str) -> str | None:
    tells_sizes = op in ("rewind", "dequantize")  # block_table and tail alone tell the sizes
    if name == "block_table" and (tells_sizes or op == "decode"):
        if label in ("rank-", "rank+", "scalar", "None"):
            return "block_table must be 4-dimensional, got {got}"
        if op == "decode" and label == "dim2=0":
            return "block_table must be of at least 1 head, got 0"
        if op == "decode" and label == "dim2=3":
            return "q must be of a multiple of 3 heads, got 4"
        if tells_sizes and label in ("dim0=0", "dim0=3"):
            return f"tail must be [{label[-1]}, 2, 2, 2, {BLOCK}], got [2, 2, 2, 2, {BLOCK}]"
        if tells_sizes and label in ("dim2=0", "dim2=3"):
            return f"tail must be [2, 2, {label[-1]}, 2, {BLOCK}], got [2, 2, 2, 2, {BLOCK}]"
    if name == "tail" and tells_sizes and label.startswith(("rank", "scalar", "None", "dim4")):
        return f"tail must be {TAILS}, got {{got}}"
    return None


SCALARS = {
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
# What append and rewind take, in the order of their messages, and what they write.
MEMORY = {
    "append": (
        (
            "pool[0]",
            "block_table",
            "tail",
            "tail_scale",
            "clamp_count",
            "seq_lens",
            "k",
            "v",
            *CALIBRATION,
            "left_padding",
        ),
        ("pool[0]", "tail", "tail_scale", "clamp_count", "seq_lens"),
    ),
    "rewind": (
        ("pool[0]", "block_table", "tail", "seq_lens", "new_lens"),
        ("tail", "seq_lens"),
    ),
}

TURBO = Family(
    name="turbo",
    ops=(*TENSORS, "attention_packed"),
    valid=valid,
    forms={op: {name: FORMS[name] for name in names} for op, names in TENSORS.items()},
    optional=("k_balance", "k_mean", "left_padding", "cu_seqlens_q", "cu_seqlens_k"),
    inputs={
        "attention": "q",
        "decode": "q",
        "calibrate": "k",
        "head_priority": "x",
        "quantize": "k",
        "append": "k",
    },
    scalars=SCALARS,
    memory=MEMORY,
    other_words=other_words,
)


def of_two_inputs() -> Iterator[Spoiled]:
    """K and V, or K and the queries, that do not fit each other."""
    for op in ("attention", "quantize", "append"):
        shape = "[2, 2, 70, 64]"
        for i, size in itertools.product(range(4), (0, None)):
            got = list(resized(i, size)(TURBO.sample(op)["v"]).shape)
            text = f"v must be {shape}, got {got}"
            yield Spoiled(op, f"v-dim{i}={got[i]}", change("v", resized(i, size)), text)
        for label, value in (("rank3", torch.zeros(2, 70, 64)), ("None", None)):
            got = None if value is None else list(value.shape)
            yield Spoiled(op, f"v-{label}", put("v", value), f"v must be {shape}, got {got}")
        for dtype in WRONG_DTYPES[1:]:
            text = f"v must be float32 like k, got {dtype_name(dtype)}"
            spoil = change("v", lambda x, dtype=dtype: x.to(dtype))
            yield Spoiled(op, f"v-{dtype_name(dtype)}", spoil, text)

    def both(**sizes: int) -> Callable[[Arguments], None]:
        def spoil(args: Arguments) -> None:
            shape = [
                sizes.get(name, size) for name, size in zip("bhtd", (B, H, 70, D), strict=True)
            ]
            args["k"], args["v"] = torch.zeros(2, *shape)

        return spoil

    yield Spoiled("attention", "kv-batch", both(b=3), "k must be [2, *, *, 64], got [3, 2, 70, 64]")
    yield Spoiled(
        "attention", "kv-head_dim", both(d=96), "k must be [2, *, *, 64], got [2, 2, 70, 96]"
    )
    yield Spoiled("attention", "kv-heads0", both(h=0), "k must be of at least 1 head, got 0")
    yield Spoiled("attention", "kv-heads3", both(h=3), "q must be of a multiple of 3 heads, got 4")
    for dtype in (torch.float16, torch.bfloat16):

        def halves(args: Arguments, dtype: torch.dtype = dtype) -> None:
            args["k"], args["v"] = args["k"].to(dtype), args["v"].to(dtype)

        text = f"k must be float32 like q, got {dtype_name(dtype)}"
        yield Spoiled("attention", f"kv-{dtype_name(dtype)}", halves, text)
    text = f"block_table must be [3, 2, 2, *], got [2, 2, 2, {PAGES}]"
    yield Spoiled("append", "kv-batch", both(b=3), text)
    yield Spoiled("decode", "q-batch", change("q", resized(0)), text)
    yield Spoiled("append", "kv-heads", both(h=1), text.replace("3, 2, 2,", "2, 2, 1,"))
    text = f"tail must be [2, 2, 2, 2, 6208], got [2, 2, 2, 2, {BLOCK}]"
    yield Spoiled("append", "kv-head_dim", both(d=96), text)
    yield Spoiled("decode", "q-head_dim", change("q", resized(3, 96)), text)
    text = "q must be of a multiple of 2 heads, got 5"
    yield Spoiled("decode", "q-heads", change("q", resized(1)), text)
    yield Spoiled("attention", "q-heads", change("q", resized(1)), text)
    text = "k_balance must be [3, 2, 64], got [2, 2, 64]"
    yield Spoiled("quantize", "kv-batch", both(b=3), text)
