"""Valid calls of every op of turbo, and every way to spoil one with the error that must follow."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import cases

NAN, INF = math.nan, math.inf
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
INT64_MIN = -(2**63)
FLOATS = "float32, float16 or bfloat16"
# Sizes of the valid calls: [batch, 2, kv_heads, max_pages], and a block of 8 bit.
B, H, Q_HEADS, D, PAGES, BLOCK = 2, 2, 4, 64, 4, 4160

Arguments = dict[str, object]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


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


sample = functools.cache(valid)  # for the shapes only


def schema_name(op: str) -> str:
    return "turbo_" + op.removesuffix("_packed")


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """A call that must fail: what is done to valid(op), and what the error must say."""

    op: str
    label: str
    spoil: Callable[[Arguments], None]
    message: str  # after "turbo_<op>: ", unless error says otherwise
    error: type[Exception] = RuntimeError
    exact: bool = True  # else: the error's text contains message

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


def put(name: str, value: object) -> Callable[[Arguments], None]:
    def spoil(args: Arguments) -> None:
        args[name] = value

    return spoil


def change(name: str, f: Callable[[Tensor], Tensor]) -> Callable[[Arguments], None]:
    def spoil(args: Arguments) -> None:
        args[name] = f(args[name])

    return spoil


def element(name: str, index: tuple[int, ...], value: int) -> Callable[[Arguments], None]:
    def spoil(args: Arguments) -> None:
        args[name][index] = value

    return spoil


# ---- Tensors of a fixed form. "*" stands for any size.


@dataclasses.dataclass(frozen=True)
class Form:
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def text(self) -> str:
        return "[" + ", ".join(map(str, self.shape)) + "]"


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
OPTIONAL = ("k_balance", "k_mean", "left_padding", "cu_seqlens_q", "cu_seqlens_k")
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
WRONG_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
)
DTYPE_NAMES = {torch.complex64: "ComplexFloat", torch.float8_e4m3fn: "Float8_e4m3fn"}
TAILS = "[batch, 2, kv_heads, 2, bytes] with bytes one of 4160, 6208, 8256, 16448"
STORE_OPS = ("append", "rewind", "dequantize", "decode")


def dtype_name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def resized(i: int, size: int | None = None) -> Callable[[Tensor], Tensor]:
    """Zeros with one dimension of another size, by default one larger."""

    def f(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[i] = shape[i] + 1 if size is None else size
        return x.new_zeros(shape)

    return f


def with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


# What the changed argument makes the op say about another one, or in other words than its form.
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


def of_fixed_form() -> Iterator[Spoiled]:
    """Every tensor that has to have one form, in every other one."""
    for op, names in TENSORS.items():
        for name in names:
            form = FORMS[name]
            spoilers: list[tuple[str, Callable[[Tensor], Tensor]]] = [
                ("rank-", lambda x: x[..., 0].contiguous()),
                ("rank+", lambda x: x.unsqueeze(-1)),
                ("scalar", lambda x: x.new_zeros(())),
            ]
            for i, size in enumerate(form.shape):
                if size != "*":
                    spoilers.append((f"dim{i}={size + 1}", resized(i)))
                    spoilers.append((f"dim{i}=0", resized(i, 0)))
            for label, f in spoilers:
                got = list(f(sample(op)[name]).shape)
                words = other_words(op, name, label) or f"{name} must be {form.text()}, got {{got}}"
                message = words.format(got=got)
                yield Spoiled(op, f"{name}-{label}", change(name, f), message)
            if name not in OPTIONAL:
                words = (
                    other_words(op, name, "None") or f"{name} must be {form.text()}, got {{got}}"
                )
                yield Spoiled(op, f"{name}-None", put(name, None), words.format(got="None"))
            for dtype in WRONG_DTYPES:
                if dtype != form.dtype:
                    text = f"{name} must be {dtype_name(form.dtype)}, got {dtype_name(dtype)}"
                    spoil = change(name, lambda x, dtype=dtype: x.to(dtype))
                    yield Spoiled(op, f"{name}-{dtype_name(dtype)}", spoil, text)
            for label, f in (("gaps", with_gaps), ("expanded", lambda x: x[:1].expand_as(x))):
                strides = list(f(sample(op)[name]).stride())
                text = f"{name} must be contiguous, got strides {strides}"
                yield Spoiled(op, f"{name}-{label}", change(name, f), text)


# ---- Tensors that no native code sees


def tensor_names(op: str) -> list[str]:
    """Tensor arguments of valid(op) in the order of the schema; of the pool its first slab."""
    names = []
    for name, value in sample(op).items():
        if isinstance(value, (list, Tensor)):
            names.append("pool[0]" if name == "pool" else name)
    return names


def change_any(name: str, f: Callable[[Tensor], object]) -> Callable[[Arguments], None]:
    """`pool[0]` is the first of the list."""

    def spoil(args: Arguments) -> None:
        if name == "pool[0]":
            args["pool"] = [f(args["pool"][0]), *args["pool"][1:]]
        else:
            args[name] = f(args[name])

    return spoil


def quantized(x: Tensor) -> Tensor:
    # What torch.quantize_per_tensor makes, with a warning that it is deprecated.
    return torch._empty_affine_quantized(x.shape, scale=1.0, zero_point=0, dtype=torch.qint8)


def of_other_kinds() -> Iterator[Spoiled]:
    """Sparse, quantized and meta tensors, and values that are no tensors, in every place."""
    for op in (*TENSORS, "attention_packed"):
        names = tensor_names(op)
        for name in names:
            backends = {"SparseCPU": lambda x: x.to_sparse()}
            if name in ("q", "k", "v", "x"):
                backends |= {"QuantizedCPU": quantized, "MkldnnCPU": lambda x: x.to_mkldnn()}
            for backend, f in backends.items():
                text = f"Could not run 'kvcore::{schema_name(op)}' with arguments from the "
                text += f"'{backend}' backend"
                spoil = change_any(name, f)
                label = f"{name}-{backend}"
                yield Spoiled(op, label, spoil, text, NotImplementedError, exact=False)
            if name == names[0]:
                other = "pool[1]" if name == "pool[0]" else names[1]
                text = f"{other} must be on meta like {name}, got cpu"
            else:
                text = f"{name} must be on cpu like {names[0]}, got meta"
            yield Spoiled(op, f"{name}-meta", change_any(name, lambda x: x.to("meta")), text)

            if name == "pool[0]":
                kind, argument = "List[Tensor]", "pool"
                strangers = [("text", "text"), ("None", None), ("number", 3)]
                strangers += [("array", np.zeros((3, BLOCK), np.uint8))]
            else:
                kind, argument = ("Optional[Tensor]" if name in OPTIONAL else "Tensor"), name
                strangers = [("text", "text"), ("number", 3), ("list", [torch.zeros(2)])]
                strangers += [("array", np.zeros(2, np.float32))]
            for label, value in strangers:
                found = "list" if name == "pool[0]" else type(value).__name__
                text = f"kvcore::{schema_name(op)}() Expected a value of type '{kind}' for "
                text += f"argument '{argument}' but instead found type '{found}'."
                spoil = change_any(name, lambda x, value=value: value)
                yield Spoiled(op, f"{name}-{label}", spoil, text, exact=False)


# ---- Float inputs


def of_inputs() -> Iterator[Spoiled]:
    bad_dtypes = (torch.float64, torch.int8, torch.int32, torch.bool, torch.complex64)
    bad_dtypes += (torch.float8_e4m3fn,)
    first = {"attention": "q", "decode": "q", "calibrate": "k", "head_priority": "x"}
    first |= {"quantize": "k", "append": "k"}
    for op, name in first.items():
        for dtype in bad_dtypes:
            text = f"{name} must be {FLOATS}, got {dtype_name(dtype)}"
            spoil = change(name, lambda x, dtype=dtype: x.to(dtype))
            yield Spoiled(op, f"{name}-{dtype_name(dtype)}", spoil, text)
        for label, f in (
            ("rank3", lambda x: x[0]),
            ("rank5", lambda x: x[None]),
            ("scalar", lambda x: x.sum()),
        ):
            got = list(f(sample(op)[name]).shape)
            text = f"{name} must be 4-dimensional, got {got}"
            yield Spoiled(op, f"{name}-{label}", change(name, f), text)
        text = f"{name} must be 4-dimensional, got None"
        yield Spoiled(op, f"{name}-None", put(name, None), text)
        for head_dim in (0, 1, 32, 63, 65, 192, 257, 512):
            text = f"head_dim must be one of 64, 96, 128, 256, got {head_dim}"
            yield Spoiled(op, f"{name}-dim3={head_dim}", change(name, resized(3, head_dim)), text)

    for op in ("attention", "quantize", "append"):
        shape = "[2, 2, 70, 64]"
        for i, size in itertools.product(range(4), (0, None)):
            got = list(resized(i, size)(sample(op)["v"]).shape)
            text = f"v must be {shape}, got {got}"
            yield Spoiled(op, f"v-dim{i}={got[i]}", change("v", resized(i, size)), text)
        for label, value in (("rank3", torch.zeros(2, 70, 64)), ("None", None)):
            got = None if value is None else list(value.shape)
            yield Spoiled(op, f"v-{label}", put("v", value), f"v must be {shape}, got {got}")
        for dtype in (*bad_dtypes, torch.float16, torch.bfloat16):
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


def all_of_forms() -> list[Spoiled]:
    return [*of_fixed_form(), *of_other_kinds(), *of_inputs()]
