"""Ways to spoil valid calls of a family's ops, and the errors that must follow."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

NAN, INF = math.nan, math.inf
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
INT64_MIN = -(2**63)
FLOATS = "float32, float16 or bfloat16"
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What the std::bad_alloc of an op becomes.
NO_MEMORY = RuntimeError if torch.__version__ >= (2, 15) else MemoryError

Arguments = dict[str, object]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """A call that must fail: what is done to valid(op), and what the error must say."""

    op: str
    label: str
    spoil: Callable[[Arguments], None]
    message: str  # after "<family>_<op>: ", unless error says otherwise
    error: type[Exception] = RuntimeError
    exact: bool = True  # else: the error's text contains message

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


def put(name: str, value: object) -> Callable[[Arguments], None]:
    def spoil(args: Arguments) -> None:
        args[name] = value

    return spoil


def change(name: str, f: Callable[[Tensor], Tensor]) -> Callable[[Arguments], None]:
    """`pool[0]` is the first of the list `pool`."""
    argument = name.removesuffix("[0]")

    def spoil(args: Arguments) -> None:
        if argument == name:
            args[name] = f(args[name])
        else:
            args[argument] = [f(args[argument][0]), *args[argument][1:]]

    return spoil


def element(name: str, index: tuple[int, ...], value: int) -> Callable[[Arguments], None]:
    def spoil(args: Arguments) -> None:
        args[name][index] = value

    return spoil


def together(**arguments: object) -> Callable[[Arguments], None]:
    return lambda args: args.update(arguments)


# ---- Tensors of a fixed form. "*" stands for any size.


@dataclasses.dataclass(frozen=True)
class Form:
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    more_dtypes: tuple[torch.dtype, ...] = ()  # that will do as well

    def text(self) -> str:
        return "[" + ", ".join(map(str, self.shape)) + "]"


WRONG_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
)
DTYPE_NAMES = {
    torch.complex64: "ComplexFloat",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.float8_e5m2: "Float8_e5m2",
}


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


def quantized(x: Tensor) -> Tensor:
    # What torch.quantize_per_tensor makes, with a warning that it is deprecated.
    return torch._empty_affine_quantized(x.shape, scale=1.0, zero_point=0, dtype=torch.qint8)


def huge(*shape: int) -> Tensor:
    """A tensor of any size that takes the memory of one element."""
    return torch.zeros(()).expand(shape)


def plain(**tensors: Tensor) -> Callable[[Arguments], None]:
    """These tensors, and None in the place of all others."""

    def spoil(args: Arguments) -> None:
        for name, value in args.items():
            if isinstance(value, Tensor):
                args[name] = None
        args.update(tensors)

    return spoil


def shared(a: str, b: str) -> Callable[[Arguments], None]:
    """Arguments a and b in the same memory, from the same byte on, with the bytes of b."""

    def spoil(args: Arguments) -> None:
        views = {}
        change(a, lambda x: views.setdefault(a, x))(args)
        change(b, lambda x: views.setdefault(b, x))(args)
        memory = torch.zeros(max(x.nbytes for x in views.values()), dtype=torch.uint8)
        for name, x in views.items():
            view = memory[: x.nbytes].view(x.dtype).view(x.shape)
            change(name, lambda _, view=view, x=x: view.copy_(x))(args)

    return spoil


# Values of another Python type than a scalar's.
WRONG_VALUES = {
    "bool": ("text", [1]),
    "int": ("text", 2.5, [1], None, 2**63),
    "Optional[int]": ("text", 2.5, [1], 2**63, -(2**63) - 1),
    "float": ("text", [1.0], None, 1j),
    "Optional[float]": ("text", [1.0], 1j),
    "List[int]": ("text", 4, None, [4.5], ["4"], [2**63], torch.tensor([4])),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """What there is to spoil in the calls of a family's ops."""

    name: str
    ops: tuple[str, ...]
    # Arguments of a call that works, every optional tensor given.
    valid: Callable[[str], Arguments]
    # By op: its tensors that have to have one form; those that may be None; the float input whose
    # head_dim has kernels; scalars with their types.
    forms: dict[str, dict[str, Form]]
    optional: tuple[str, ...]
    inputs: dict[str, str]
    scalars: dict[str, dict[str, str]]
    # Of ops that write: their tensors in the order in which messages name them, and those written.
    memory: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    # What changing an argument so makes an op say about another one, or in other words than its
    # form; with "{got}" for the changed shape. Of op, argument and label; None if there is no such.
    other_words: Callable[[str, str, str], str | None]

    # There are few families, and they live as long as the process.
    @functools.cache  # noqa: B019
    def sample(self, op: str) -> Arguments:
        """valid(op), for the shapes only."""
        return self.valid(op)

    def schema(self, op: str) -> str:
        return f"{self.name}_{op.removesuffix('_packed')}"

    def calls(self) -> Iterator[Spoiled]:
        """What can be spoiled in the same way in every op."""
        yield from self.of_fixed_form()
        yield from self.of_other_kinds()
        yield from self.of_inputs()
        yield from self.of_types()
        yield from self.of_shared_memory()

    def of_fixed_form(self) -> Iterator[Spoiled]:
        """Every tensor that has to have one form, in every other one."""
        for op, forms in self.forms.items():
            for name, form in forms.items():
                yield from self._other_forms(op, name, form)

    def _other_forms(self, op: str, name: str, form: Form) -> Iterator[Spoiled]:
        def message(label: str, got: object) -> str:
            words = self.other_words(op, name, label)
            return (words or f"{name} must be {form.text()}, got {{got}}").format(got=got)

        x = self.sample(op)[name]
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
            text = message(label, list(f(x).shape))
            yield Spoiled(op, f"{name}-{label}", change(name, f), text)
        if len(self.tensor_names(op)) == 1:
            text = "There were no tensor arguments to this function"
            yield Spoiled(op, f"{name}-None", put(name, None), text, NotImplementedError, False)
        elif name not in self.optional:
            yield Spoiled(op, f"{name}-None", put(name, None), message("None", "None"))
        for dtype in WRONG_DTYPES:
            if dtype not in (form.dtype, *form.more_dtypes):
                label = dtype_name(dtype)
                text = self.other_words(op, name, label)
                text = text or f"{name} must be {dtype_name(form.dtype)}, got {label}"
                spoil = change(name, lambda x, dtype=dtype: x.to(dtype))
                yield Spoiled(op, f"{name}-{label}", spoil, text)
        for label, f in (("gaps", with_gaps), ("expanded", lambda x: x[:1].expand_as(x))):
            text = f"{name} must be contiguous, got strides {list(f(x).stride())}"
            yield Spoiled(op, f"{name}-{label}", change(name, f), text)

    def tensor_names(self, op: str) -> list[str]:
        """Tensor arguments of valid(op) in the order of the schema; of a list its first."""
        names = []
        for name, value in self.sample(op).items():
            if isinstance(value, (list, Tensor)):
                names.append(f"{name}[0]" if isinstance(value, list) else name)
        return names

    def of_other_kinds(self) -> Iterator[Spoiled]:
        """Sparse, quantized and meta tensors, and values that are no tensors, in every place."""
        for op in self.ops:
            names = self.tensor_names(op)
            for name in names:
                backends = {"SparseCPU": lambda x: x.to_sparse()}
                if name in ("q", "k", "v", "x"):
                    backends |= {"QuantizedCPU": quantized, "MkldnnCPU": lambda x: x.to_mkldnn()}
                for backend, f in backends.items():
                    text = f"Could not run 'kvcore::{self.schema(op)}' with arguments from the "
                    text += f"'{backend}' backend"
                    label = f"{name}-{backend}"
                    yield Spoiled(op, label, change(name, f), text, NotImplementedError, False)
                yield from self._on_meta(op, name)
                yield from self._strangers(op, name)

    def _on_meta(self, op: str, name: str) -> Iterator[Spoiled]:
        names = self.tensor_names(op)
        if name != names[0]:
            text = f"{name} must be on cpu like {names[0]}, got meta"
        elif name.endswith("[0]"):
            text = f"{name.removesuffix('[0]')}[1] must be on meta like {name}, got cpu"
        elif len(names) > 1:
            text = f"{names[1]} must be on meta like {name}, got cpu"
        else:
            return
        yield Spoiled(op, f"{name}-meta", change(name, lambda x: x.to("meta")), text)

    def _strangers(self, op: str, name: str) -> Iterator[Spoiled]:
        argument = name.removesuffix("[0]")
        strangers = [("text", "text"), ("number", 3), ("array", np.zeros(2, np.float32))]
        if argument == name:
            kind = "Optional[Tensor]" if name in self.optional else "Tensor"
            strangers.append(("list", [torch.zeros(2)]))
        else:
            kind = "List[Tensor]"
            strangers.append(("None", None))
        for label, value in strangers:
            found = type(value).__name__ if argument == name else "list"
            text = f"kvcore::{self.schema(op)}() Expected a value of type '{kind}' for "
            text += f"argument '{argument}' but instead found type '{found}'."
            spoil = change(name, lambda x, value=value: value)
            yield Spoiled(op, f"{name}-{label}", spoil, text, exact=False)

    def of_inputs(self) -> Iterator[Spoiled]:
        """Float inputs of a dtype, rank or head_dim that has no kernel."""
        for op, name in self.inputs.items():
            x = self.sample(op)[name]
            for dtype in WRONG_DTYPES:
                if dtype not in FLOAT_DTYPES:
                    text = f"{name} must be {FLOATS}, got {dtype_name(dtype)}"
                    spoil = change(name, lambda x, dtype=dtype: x.to(dtype))
                    yield Spoiled(op, f"{name}-{dtype_name(dtype)}", spoil, text)
            for label, f in (
                ("rank3", lambda x: x[0]),
                ("rank5", lambda x: x[None]),
                ("scalar", lambda x: x.sum()),
            ):
                text = f"{name} must be 4-dimensional, got {list(f(x).shape)}"
                yield Spoiled(op, f"{name}-{label}", change(name, f), text)
            text = f"{name} must be 4-dimensional, got None"
            yield Spoiled(op, f"{name}-None", put(name, None), text)
            for head_dim in (0, 1, 32, 63, 65, 192, 257, 512):
                text = f"head_dim must be one of 64, 96, 128, 256, got {head_dim}"
                spoil = change(name, resized(3, head_dim))
                yield Spoiled(op, f"{name}-dim3={head_dim}", spoil, text)

    def of_types(self) -> Iterator[Spoiled]:
        """Scalars of another Python type, which torch's schemas turn away by name."""
        for op, kinds in self.scalars.items():
            for name, kind in kinds.items():
                for i, value in enumerate(WRONG_VALUES[kind]):
                    text = f"kvcore::{self.schema(op)}() Expected a value of type '{kind}' for "
                    text += f"argument '{name}' but instead found type '{type(value).__name__}'."
                    label = f"{name}-{kind}-{i}"
                    yield Spoiled(op, label, put(name, value), text, exact=False)
            given = self.sample(op)
            schema = getattr(torch.ops.kvcore, self.schema(op)).default._schema
            text = "Unknown keyword argument 'mode' for operator"
            if len(given) == len(schema.arguments):
                text = f"expected at most {len(given)} argument(s) but received {len(given) + 1}"
            yield Spoiled(op, "unknown", put("mode", "fast"), text, exact=False)

    def of_shared_memory(self) -> Iterator[Spoiled]:
        """What an op writes, in the memory of anything else."""
        for op, (order, written) in self.memory.items():
            for a, b in itertools.combinations(order, 2):
                if not {a, b} & set(written):
                    continue
                first, other = (a, b) if a in written else (b, a)
                text = f"{first} must be in memory of its own, got that of {other}"
                yield Spoiled(op, f"{a}-in-{b}", shared(a, b), text)


# ---- Scalars that several families have


def softmax_scalars(op: str) -> Iterator[Spoiled]:
    for value, got in ((NAN, "nan"), (INF, "inf"), (-INF, "-inf"), (1e39, "1e+39")):
        text = f"scale must be finite in float32, got {got}"
        yield Spoiled(op, f"scale={got}", put("scale", value), text)
    for value in (0, -1, INT64_MIN):
        text = f"window must be at least 1 or None, got {value}"
        yield Spoiled(op, f"window={value}", together(window=value, causal=True), text)
    text = "window must be None without causal, got 5"
    yield Spoiled(op, "window-full", together(window=5, causal=False), text)
