"""Valid calls of every op of lexico, and what can be spoiled in them."""

import functools
import itertools
from collections.abc import Iterator

import torch

import cases
import kvcore
from hostile_calls import (
    INF,
    INT64_MIN,
    INT_MAX,
    INT_MIN,
    NAN,
    WRONG_DTYPES,
    Arguments,
    Family,
    Form,
    Spoiled,
    change,
    dtype_name,
    element,
    huge,
    put,
    resized,
    softmax_scalars,
    with_gaps,
)
from lexico_cases import make_dictionary, make_problem, random_codes

# Sizes of the valid calls: [batch, kv_heads], pairs of K's and V's codes, atoms, bytes of a tile.
B, H, Q_HEADS, D = 2, 2, 4, 64
K_SPARSITY, V_SPARSITY, K_ATOMS, V_ATOMS = 5, 6, 70, 90
K_TILE, V_TILE = 544, 640
CODES = ("k_indices", "k_coefficients", "k_scale", "v_indices", "v_coefficients", "v_scale")
SIZES = {"k_sparsity": K_SPARSITY, "v_sparsity": V_SPARSITY, "v_atoms": V_ATOMS}


@functools.cache
def _store():
    """70 tokens in the tails behind a block, and the block's tails."""
    shape = cases.Shape(D, 70, 3, H, Q_HEADS // H, B)
    lens = {"tail_lens": (70, 40), "buffer_lens": (6, 2), "left_padding": (3, 0)}
    problem = make_problem(
        shape, blocks=1, buffer=6, k_sparsity=K_SPARSITY, v_sparsity=V_SPARSITY, **lens
    )
    full = kvcore.lexico_unseal(problem.k_blocks[0], problem.v_blocks[0], **SIZES)
    return problem, full


def valid(op: str) -> Arguments:
    """Arguments of a call that works, every optional tensor given."""
    dictionary = make_dictionary(20, D)
    if op == "encode":
        x = cases.normal(B, H, 5, D, seed=1)
        return {"x": x, "dictionary": dictionary, "gram": dictionary @ dictionary.T, "sparsity": 4}
    if op == "reconstruct":
        codes = random_codes(B, H, 5, 3, 20, seed=1)
        names = ("indices", "coefficients", "scale")
        return {**dict(zip(names, codes, strict=True)), "dictionary": dictionary}
    problem, full = _store()
    if op == "attention":
        tensors = {
            name: [x.clone() for x in value] if isinstance(value, list) else value.clone()
            for name, value in vars(problem).items()
        }
        return tensors
    tails = {name: getattr(problem, name).clone() for name in ("k_tail", "v_tail", "tail_lens")}
    if op == "append":
        k = random_codes(B, H, 4, K_SPARSITY, K_ATOMS, seed=2)
        v = random_codes(B, H, 4, V_SPARSITY, V_ATOMS, seed=3)
        return {**dict(zip(CODES, (*k, *v), strict=True)), **tails}
    if op == "unpack":
        return {"tail": tails["k_tail"], "kv_len": 70}
    if op == "seal":
        return {"k_tail": full[0].clone(), "v_tail": full[1].clone(), "v_atoms": V_ATOMS}
    return {
        "k_block": problem.k_blocks[0].clone(),
        "v_block": problem.v_blocks[0].clone(),
        **SIZES,
    }


F32, F16, I16, I32 = torch.float32, torch.float16, torch.int16, torch.int32
U8, I8 = torch.uint8, torch.int8
LENS = Form((B,), I32)
ATOMS = Form(("*", D), F32)
FORMS = {
    "encode": {"dictionary": ATOMS, "gram": Form((20, 20), F32)},
    "reconstruct": {
        "indices": Form(("*", "*", "*", "*"), I16),
        "coefficients": Form((B, H, 5, 3), I8, (F32, torch.float8_e4m3fn)),
        "scale": Form((B, H, 5), F16),
        "dictionary": Form(("*", "*"), F32),
    },
    "append": {
        "k_indices": Form((B, H, 4, K_SPARSITY), I16),
        "k_coefficients": Form((B, H, 4, K_SPARSITY), I8),
        "k_scale": Form((B, H, 4), F16),
        "v_indices": Form((B, H, 4, V_SPARSITY), I16),
        "v_coefficients": Form((B, H, 4, V_SPARSITY), I8),
        "v_scale": Form((B, H, 4), F16),
        "k_tail": Form(("*", "*", "*", "*"), U8),
        "v_tail": Form((B, H, "*", V_TILE), U8),
        "tail_lens": LENS,
    },
    "seal": {
        "k_tail": Form(("*", "*", 128, K_TILE), U8),
        "v_tail": Form((B, H, 128, V_TILE), U8),
    },
    "unseal": {"k_block": Form(("*", "*", "*"), U8), "v_block": Form((B, H, "*"), U8)},
    "unpack": {"tail": Form(("*", "*", "*", "*"), U8)},
    "attention": {
        "k_tail": Form((B, "*", "*", K_TILE), U8),
        "v_tail": Form((B, H, "*", V_TILE), U8),
        "tail_lens": LENS,
        "k_dictionary": ATOMS,
        "v_dictionary": ATOMS,
        "buffer_lens": LENS,
        "left_padding": LENS,
    },
}
TAILS = "[batch, kv_heads, tiles, bytes] with bytes 64 + 96 * sparsity, sparsity 1 to 64"
OF_RANK = ("rank-", "rank+", "scalar", "None")


def other_words(op: str, name: str, label: str) -> str | None:
    if name in ("k_tail", "v_tail", "tail") and label in (
        *OF_RANK,
        "dim3=0",
        "dim3=545",
        "dim3=641",
    ):
        return f"{name} must be {TAILS}, got {{got}}"
    ranks = {"indices": 4, "k_indices": 4, "k_block": 3}
    if op == "reconstruct":
        ranks["dictionary"] = 2
    if name in ranks and label in OF_RANK:
        return f"{name} must be {ranks[name]}-dimensional, got {{got}}"
    if name == "k_indices" and label.startswith("dim2"):
        return f"k_coefficients must be [2, 2, {label[-1]}, 5], got [2, 2, 4, 5]"
    # What reads any type of coefficient says which.
    if (op, name) == ("reconstruct", "coefficients") and label in map(dtype_name, WRONG_DTYPES):
        return f"coefficients must be int8, float8_e4m3fn or float32, got {label}"
    return None


SCALARS = {
    "encode": {"sparsity": "int", "tolerance": "float", "check_values": "bool"},
    "reconstruct": {"check_values": "bool"},
    "append": {"check_values": "bool"},
    "seal": {"v_atoms": "int"},
    "unseal": {"k_sparsity": "int", "v_sparsity": "int", "v_atoms": "int"},
    "unpack": {"kv_len": "int"},
    "attention": {
        "causal": "bool",
        "scale": "Optional[float]",
        "window": "Optional[int]",
        "check_values": "bool",
    },
}
WRITTEN = ("k_tail", "v_tail", "tail_lens")

LEXICO = Family(
    name="lexico",
    ops=tuple(FORMS),
    valid=valid,
    forms=FORMS,
    optional=("gram", "k_buffer", "v_buffer", "buffer_lens", "left_padding"),
    inputs={"encode": "x", "attention": "q"},
    scalars=SCALARS,
    memory={"append": ((*WRITTEN, *CODES), WRITTEN)},
    other_words=other_words,
)


def of_other_sizes() -> Iterator[Spoiled]:
    """Tensors that do not fit each other, and lists of blocks."""
    for op in ("append", "seal"):
        tiles, of_seal = (4, "*") if op == "append" else (128, 128)
        text = f"v_tail must be [3, 2, {of_seal}, {V_TILE}], got [2, 2, {tiles}, {V_TILE}]"
        yield Spoiled(op, "k_tail-dim0=3", change("k_tail", resized(0)), text)
    spoil = change("k_tail", resized(1, 0))
    yield Spoiled("attention", "k_tail-dim1=0", spoil, "k_tail must be of at least 1 head, got 0")
    text = "q must be of a multiple of 3 heads, got 4"
    yield Spoiled("attention", "k_tail-dim1=3", change("k_tail", resized(1)), text)
    text = f"k_tail must be [3, *, *, {K_TILE}], got [2, 2, 4, {K_TILE}]"
    yield Spoiled("attention", "q-batch", change("q", resized(0)), text)
    text = "q must be of a multiple of 2 heads, got 5"
    yield Spoiled("attention", "q-heads", change("q", resized(1)), text)
    text = f"k_dictionary must be [*, 96], got [{K_ATOMS}, 64]"
    yield Spoiled("attention", "q-head_dim", change("q", resized(3, 96)), text)
    for size, text in (
        ((3, H, 5, 3), "coefficients must be [3, 2, 5, 3], got [2, 2, 5, 3]"),
        ((B, H, 5, 0), "indices must be of 1 to 64 atoms a vector, got 0"),
        ((B, H, 5, 65), "indices must be of 1 to 64 atoms a vector, got 65"),
    ):
        spoil = put("indices", torch.zeros(size, dtype=I16))
        yield Spoiled("reconstruct", f"indices-{list(size)}", spoil, text)
    for atoms in (0, 32769):
        for op, name in (
            ("encode", "dictionary"),
            ("reconstruct", "dictionary"),
            ("attention", "k_dictionary"),
            ("attention", "v_dictionary"),
        ):
            text = f"{name} must be of 1 to 32768 atoms, got {atoms}"
            yield Spoiled(op, f"{name}-atoms={atoms}", put(name, torch.zeros(atoms, D)), text)
    yield from _of_buffers()
    for kv in "kv":
        yield from _of_blocks(kv)


def _of_buffers() -> Iterator[Spoiled]:
    for kv, shape in (("k", "[2, 2, *, 64]"), ("v", "[2, 2, 6, 64]")):
        name = f"{kv}_buffer"
        spoilers = [
            ("rank-", lambda x: x[0]),
            ("rank+", lambda x: x[None]),
            ("scalar", lambda x: x.sum()),
            *((f"dim{i}=0", resized(i, 0)) for i in (0, 1, 3)),
            *((f"dim{i}+1", resized(i)) for i in (0, 1, 3)),
        ]
        for label, f in spoilers:
            got = list(f(LEXICO.sample("attention")[name]).shape)
            text = f"{name} must be {shape}, got {got}"
            yield Spoiled("attention", f"{name}-{label}", change(name, f), text)
        for dtype in WRONG_DTYPES[1:]:
            text = f"{name} must be float32 like q, got {dtype_name(dtype)}"
            spoil = change(name, lambda x, dtype=dtype: x.to(dtype))
            yield Spoiled("attention", f"{name}-{dtype_name(dtype)}", spoil, text)
    text = "v_buffer must be [2, 2, 7, 64], got [2, 2, 6, 64]"
    yield Spoiled("attention", "k_buffer-dim2=7", change("k_buffer", resized(2)), text)
    text = "v_buffer must be None, as k_buffer is, got a tensor"
    yield Spoiled("attention", "k_buffer-None", put("k_buffer", None), text)
    text = "v_buffer must be given, as k_buffer is, got None"
    yield Spoiled("attention", "v_buffer-None", put("v_buffer", None), text)


def _of_blocks(kv: str) -> Iterator[Spoiled]:
    """Of attention's lists, and unseal's arguments."""
    least = 128 if kv == "k" else 8192 + 2 * V_ATOMS + 12
    for op, name in (("attention", f"{kv}_blocks[0]"), ("unseal", f"{kv}_block")):
        label = name.removesuffix("[0]")
        block = _store()[0].k_blocks[0] if kv == "k" else _store()[0].v_blocks[0]
        for size in (0, least - 64, least + 1):
            text = f"{name} must be of a multiple of 64 bytes a head, at least {least}, got {size}"
            spoil = change(name, resized(2, size))
            yield Spoiled(op, f"{label}-bytes={size}", spoil, text)
        if op == "unseal":
            continue
        for note, f in (
            ("dim0=3", resized(0)),
            ("dim1=3", resized(1)),
            ("rank-", lambda x: x[0]),
            ("rank+", lambda x: x[None]),
        ):
            text = f"{name} must be [2, 2, *], got {list(f(block).shape)}"
            yield Spoiled(op, f"{label}-{note}", change(name, f), text)
        text = f"{name} must be uint8, got int8"
        yield Spoiled(op, f"{label}-int8", change(name, lambda x: x.to(I8)), text)
        text = f"{name} must be contiguous, got strides {list(with_gaps(block).stride())}"
        yield Spoiled(op, f"{label}-gaps", change(name, with_gaps), text)
    for count in (0, 2):
        spoil = change("v_blocks", lambda x, count=count: x * count)
        text = f"v_blocks must be as many blocks as k_blocks, 1, got {count}"
        if kv == "v":
            yield Spoiled("attention", f"v_blocks-{count}", spoil, text)


def of_scalars() -> Iterator[Spoiled]:
    yield from softmax_scalars("attention")
    for value in (0, -1, 21, 2**62, INT64_MIN):
        text = f"sparsity must be in [1, 20], got {value}"
        yield Spoiled("encode", f"sparsity={value}", put("sparsity", value), text)
    for value, got in ((-1e-9, "-1e-09"), (1.0, "1"), (NAN, "nan"), (INF, "inf"), (-INF, "-inf")):
        text = f"tolerance must be in [0, 1), got {got}"
        yield Spoiled("encode", f"tolerance={got}", put("tolerance", value), text)
    for value in (0, -1, 32769, 2**62, INT64_MIN):
        text = f"v_atoms must be in [1, 32768], got {value}"
        for op in ("seal", "unseal"):
            yield Spoiled(op, f"v_atoms={value}", put("v_atoms", value), text)
    for name, value in itertools.product(("k_sparsity", "v_sparsity"), (0, -1, 65, 2**62)):
        text = f"{name} must be in [1, 64], got {value}"
        yield Spoiled("unseal", f"{name}={value}", put(name, value), text)
    for value in (-1, 129, 2**62, INT64_MIN):
        text = f"kv_len must be in [0, 128], got {value}"
        yield Spoiled("unpack", f"kv_len={value}", put("kv_len", value), text)
    for op, accepted in (
        ("encode", "int8, float8_e4m3fn or float32"),
        ("reconstruct", "float32, float16 or bfloat16"),
    ):
        for dtype in (torch.float64, torch.int16, torch.bool, torch.complex64, torch.float8_e5m2):
            text = f"dtype must be {accepted}, got {dtype_name(dtype)}"
            yield Spoiled(op, f"dtype={dtype_name(dtype)}", put("dtype", dtype), text)


def of_values() -> Iterator[Spoiled]:
    """Lengths and indices out of range at every place, atoms of another norm, spoiled codes."""
    limits = {"tail_lens": 128, "buffer_lens": 6, "left_padding": 4096 + 128 + 6}
    for op, name in (("append", "tail_lens"), *(("attention", name) for name in limits)):
        for b, value in itertools.product(range(B), (-1, INT_MIN, limits[name] + 1, INT_MAX)):
            text = f"{name}[{b}] must be in [0, {limits[name]}], got {value}"
            yield Spoiled(op, f"{name}[{b}]={value}", element(name, (b,), value), text)
    for b in range(B):
        text = f"k_indices must be of at most 3 new tokens for sequence {b}, got 4"
        yield Spoiled("append", f"tail_lens[{b}]=125", element("tail_lens", (b,), 125), text)
    for index in itertools.product((0, B - 1), (0, H - 1), (0, 4), (0, 2)):
        for value in (-1, 20, 32767, -32768):
            text = f"indices{list(index)} must be in [0, 20), got {value}"
            spoil = element("indices", index, value)
            yield Spoiled("reconstruct", f"indices{list(index)}={value}", spoil, text)
    for row, value, got in ((0, 0, "0"), (7, NAN, "nan"), (19, INF, "inf"), (5, 3e38, "inf")):
        text = f"dictionary[{row}] must be an atom of norm 1, got {got}"
        spoil = element("dictionary", (row,), value)
        yield Spoiled("encode", f"dictionary[{row}]={got}", spoil, text)
    for factor, norm in ((1.001, "1.001"), (0.999, "0.999"), (1e-30, "0")):
        spoil = change("dictionary", lambda x, factor=factor: x * factor)
        text = f"dictionary[0] must be an atom of norm 1, got {norm}"
        yield Spoiled("encode", f"dictionary*{factor}", spoil, text)


def of_codes() -> Iterator[Spoiled]:
    """Bytes of a store that no append and no seal wrote."""
    # The last index of the tail's first tile: behind its scales, and in the order of pairs.
    places = {"k_tail": (K_SPARSITY, K_ATOMS), "v_tail": (V_SPARSITY, V_ATOMS)}
    for name, (sparsity, atoms) in places.items():
        low = 64 + 2 * 32 * sparsity - 2
        for b, head, tile in itertools.product(range(B), range(H), (0, 1)):
            text = f"{name} must be codes over {atoms} atoms, got others"
            for place, value in ((low, atoms), (low + 1, 128), (low + 1, 255)):
                if b == 1 and tile == 1:  # whose last tokens are not there
                    place -= 2 * 31
                index = (b, head, tile, place)
                yield Spoiled(
                    "attention", f"{name}{index}={value}", element(name, index, value), text
                )
    changes = {
        "k": ((0, 65), (127, 64), (slice(0, 128), 60), (128 + 64 + 1, 255)),
        "v": ((8192 + 1, 255), (8192 + 2 * V_ATOMS + 1, 16), (8192 + 2 * V_ATOMS - 1, 255)),
    }
    sizes = {"k": f"{K_SPARSITY}", "v": f"{V_SPARSITY} over {V_ATOMS} atoms"}
    for kv, atoms in (("k", K_ATOMS), ("v", V_ATOMS)):
        for (place, value), b, head in itertools.product(changes[kv], range(B), range(H)):
            label = f"{kv}_block[{b}, {head}, {place}]={value}"

            def spoil(
                args: Arguments, name=f"{kv}_block", at=(b, head, place), value=value
            ) -> None:
                block = args[name] if name in args else args[name + "s"][0]
                block[at] = value

            text = f"{kv}_blocks[0] must be codes over {atoms} atoms, got others"
            yield Spoiled("attention", label, spoil, text)
            if (kv, place) == ("k", 128 + 64 + 1):
                continue  # unseal knows nothing of K's atoms
            text = f"{kv}_block must be codes of sparsity {sizes[kv]} as lexico_seal made them, "
            yield Spoiled("unseal", label, spoil, text + "got others")
    for value in (V_ATOMS, 32767, 65535):
        # Little-endian; its coefficient is not 0.
        low = 64

        def spoil(args: Arguments, value=value, low=low) -> None:
            tile = args["v_tail"][1, 0, 100]
            tile[low : low + 2] = torch.tensor([value & 255, value >> 8])
            tile[64 + 64 * V_SPARSITY] = 1

        text = f"v_tail must be codes over {V_ATOMS} atoms, got the index {value}"
        yield Spoiled("seal", f"v_tail-index={value}", spoil, text)
    for v_atoms in (1, V_ATOMS - 1):
        last = int(kvcore.lexico_unpack(_store()[1][1], kv_len=4096)[0].max())
        text = f"v_tail must be codes over {v_atoms} atoms, got the index {last}"
        yield Spoiled("seal", f"v_atoms={v_atoms}", put("v_atoms", v_atoms), text)


def of_sizes() -> Iterator[Spoiled]:
    """Sizes that no memory holds."""
    room = "must be small enough for the memory of cpu, got"
    for tokens in (2**46, 2**56):
        x = huge(1, 1, tokens, D)
        text = f"indices {room} int16 [1, 1, {tokens}, 4]"
        yield Spoiled("encode", f"huge-{tokens}", put("x", x), text)
    q = huge(B, 2**46, 1, D)
    text = f"out {room} float32 [2, {2**46}, 1, 64]"
    yield Spoiled("attention", "huge-q", put("q", q), text)
