"""Shapes, types, strides and backends that the op tests share."""

import dataclasses
import itertools
import os
import pathlib
import types

import pytest
import torch
from torch import Tensor

import kvcore
from kvcore.reference import turbo as turbo_reference

HEAD_DIMS = (64, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# How far K and V can be from contiguous; `with_layout` makes each of them.
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "misaligned", "strided")

# The SIMT shim runs a kernel's threads one after the other: larger cases take minutes there. The
# check for races, which is slower still, sets a lower limit.
SIMT_MAX_MACS = int(os.environ.get("KVCORE_SIMT_MAX_MACS", 50_000_000))


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    ``ops.turbo_decode`` and its siblings take tensors on ``device``.
    """

    name: str
    device: torch.device
    namespace: str = "kvcore"

    @property
    def ops(self) -> types.ModuleType:
        if self.namespace == "reference":
            return turbo_reference
        return getattr(torch.ops, self.namespace)

    def runs(self, macs: int) -> bool:
        """Whether a case with so many multiply-adds is small enough here."""
        return self.name != "simt" or macs <= SIMT_MAX_MACS


REFERENCE = Backend("reference", torch.device("cpu"), "reference")
CPU = Backend("cpu", torch.device("cpu"))
SIMT = Backend("simt", torch.device("cpu"), "kvcore_simt")
CUDA = Backend("cuda", torch.device("cuda"))

BACKENDS = [pytest.param(CPU, id="cpu")]
_simt_library = pathlib.Path(kvcore.__file__).parent / "kvcore_simt.so"
_simt_named = os.environ.get(
    "KVCORE_SIMT_LIBRARY"
)  # a build beside the package, say a sanitized one
if _simt_named or _simt_library.exists():
    torch.ops.load_library(_simt_named or _simt_library)
    BACKENDS.append(pytest.param(SIMT, id="simt", marks=pytest.mark.simt))
BACKENDS.append(pytest.param(CUDA, id="cuda", marks=pytest.mark.cuda))

# The one place that says on which implementations an op test runs: decorate it with this.
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of an attention problem, with the dtype and strides of its inputs."""

    head_dim: int = 64
    kv_len: int = 64
    q_len: int = 1
    kv_heads: int = 1
    group: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def macs(self) -> int:
        return 2 * self.batch * self.q_heads * self.q_len * self.kv_len * self.head_dim

    def __str__(self) -> str:
        """Identifies the case in the names of tests."""
        text = f"D{self.head_dim}-kv{self.kv_len}-q{self.q_len}-b{self.batch}"
        text += f"-h{self.q_heads}x{self.kv_heads}-{str(self.dtype).removeprefix('torch.')}"
        return text if self.layout == "contiguous" else f"{text}-{self.layout}"


F32, F16, BF16 = DTYPES

# Every head_dim with every dtype, then one thing at a time: page edges, heads, strides.
SHAPES = [
    *(Shape(d, 130, 3, 2, 2, dtype=t) for d, t in itertools.product(HEAD_DIMS, DTYPES)),
    *(Shape(64, kv_len, 1, 2) for kv_len in (1, 63, 64, 65, 127, 128, 129)),
    *(Shape(64, 200, q_len, 1, 2) for q_len in (2, 7, 63, 64, 65, 200)),
    Shape(64, 5, 9),  # the first queries precede every key
    *(Shape(128, 100, 2, 2, group) for group in (3, 4, 7, 8, 16)),
    Shape(96, 257, 5, 3, 5, batch=3, dtype=BF16),
    *(Shape(64, 150, 70, 2, 2, 2, BF16, layout) for layout in LAYOUTS),
    *(Shape(96, 70, 3, 2, 2, 2, F32, layout) for layout in LAYOUTS),
]
# A long context: many pages and, in decode, several splits.
LONG_SHAPES = [
    Shape(128, 4100, 1, 2, 4, dtype=BF16),
    Shape(64, 2500, 3, 2, 2, batch=2),
    Shape(256, 1030, 65, 1, 2, dtype=F16),
]
# Tokens of the first call, then of each append: open, fill exactly, cross and skip page edges.
APPENDS = [
    (0, 1),
    (0, 64),
    (1, 1, 1),
    (63, 1, 1),
    (64, 64, 1),
    (65, 63, 2),
    (70, 58),
    (10, 200),
    (130, 0, 190, 1),
    (200, 300, 5),
]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_append = pytest.mark.parametrize("lens", APPENDS, ids=lambda lens: "+".join(map(str, lens)))


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator).to(dtype)


def make_qkv(shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    """Random q, k and v as the attention ops take them, on a device.

    Channels of K differ in size and centre, so that its calibration has something to do.
    """
    q = 1.5 * normal(shape.batch, shape.q_heads, shape.q_len, shape.head_dim, seed=3 * seed)
    size = (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    spread = normal(shape.kv_heads, 1, shape.head_dim, seed=1_000_003 + seed).mul(0.5).exp()
    centre = 2 * normal(shape.kv_heads, 1, shape.head_dim, seed=1_000_033 + seed)
    k = normal(*size, seed=3 * seed + 1) * spread + centre
    v = normal(*size, seed=3 * seed + 2)
    return [with_layout(x.to(device, shape.dtype), shape.layout) for x in (q, k, v)]


def with_layout(x: Tensor, layout: str) -> Tensor:
    """The values of a 4-d tensor behind other strides; memory between them is NaN.

    `expanded` repeats the first batch entry and head, so its values differ from those of x.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:1, :1].expand_as(x)
    batch, heads, tokens, channels = x.shape
    if layout == "sliced":
        view = x.new_full((batch, heads + 1, tokens + 5, channels + 8), torch.nan)
        view = view[:, 1:, 2 : 2 + tokens, 4 : 4 + channels]
    elif layout == "misaligned":
        view = x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape)
    elif layout == "strided":
        view = x.new_full((batch, heads, tokens, 2 * channels), torch.nan)[..., ::2]
    else:
        raise ValueError(f"layout: must be one of {LAYOUTS}, got {layout!r}")
    return view.copy_(x)


@dataclasses.dataclass
class Store:
    """Tensors of a store, in the order in which the ops take them."""

    pool: list[Tensor]
    block_table: Tensor
    tail: Tensor
    tail_scale: Tensor
    clamp_count: Tensor
    seq_lens: Tensor

    @property
    def readable(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """What decode, dequantize and rewind take."""
        return self.pool, self.block_table, self.tail, self.seq_lens

    @property
    def writable(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What append takes."""
        return (
            self.pool,
            self.block_table,
            self.tail,
            self.tail_scale,
            self.clamp_count,
            self.seq_lens,
        )

    def named(self) -> dict[str, Tensor]:
        """Every tensor by name, for comparisons."""
        names = ("block_table", "tail", "tail_scale", "clamp_count", "seq_lens")
        slabs = {f"pool[{i}]": slab for i, slab in enumerate(self.pool)}
        return slabs | {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> "Store":
        """A copy on a device."""
        copy = [x.clone().to(device) for x in self.writable[1:]]
        return Store([slab.clone().to(device) for slab in self.pool], *copy)


def store_of(results: tuple[Tensor, ...]) -> Store:
    """The store that turbo_quantize returned; its table numbers the slabs that are not empty."""
    return Store([slab for slab in results[:3] if len(slab)], *results[3:])


def empty_store(
    batch: int,
    kv_heads: int,
    head_dim: int,
    max_pages: int,
    *,
    k_bits: int = 4,
    v_bits: int = 4,
    sink_pages: int = 1,
    device: torch.device | str = "cpu",
) -> Store:
    """A store with room for ``max_pages`` pages of each sequence, blocks in shuffled places."""
    blocks = turbo_reference.blocks
    widths = torch.tensor([k_bits, v_bits]).view(1, 2, 1, 1)
    widths = widths.repeat(batch, 1, kv_heads, max_pages)
    widths[..., :sink_pages] = 8
    block_table = torch.full(widths.shape, -1, dtype=torch.int32)
    pool = []
    generator = torch.Generator().manual_seed(0)
    for bits in blocks.WIDTHS:
        mask = widths == bits
        rows = int(mask.sum())
        if rows:
            # One row more than needed: row 0 must never be written.
            order = torch.randperm(rows, generator=generator).int() + 1
            block_table[mask] = order + (len(pool) << blocks.SLAB_INDEX_BITS)
            slab_shape = (rows + 1, blocks.block_bytes(bits, head_dim))
            pool.append(torch.zeros(slab_shape, dtype=torch.uint8))
    tail_bytes = blocks.block_bytes(8, head_dim)
    tail = torch.zeros(batch, 2, kv_heads, blocks.TAIL_SLOTS, tail_bytes, dtype=torch.uint8)
    tail[..., 4:8] = 255
    store = Store(
        pool,
        block_table,
        tail,
        torch.zeros(batch, 2, kv_heads),
        torch.zeros(batch, 2, kv_heads, dtype=torch.int64),
        torch.zeros(batch, dtype=torch.int32),
    )
    return store.to(device)
