"""What the ops of turbo must reject inside tensors: indices, pools, memory, sizes."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

import cases
from hostile_calls import (
    INT_MAX,
    INT_MIN,
    NO_MEMORY,
    Arguments,
    Spoiled,
    element,
    huge,
    plain,
    put,
)
from hostile_turbo import BLOCK, PAGES, STORE_OPS, TURBO, D, H

ROWS = f"[*, {BLOCK}], [*, 2240] or [*, 1216]"
LONGEST = 64 * (PAGES + 1) - 1


def of_indices() -> Iterator[Spoiled]:
    """Lengths, paddings and table entries out of range, at every place that an op looks at."""
    for op, tokens in (("calibrate", 70), ("head_priority", 70), ("quantize", 70), ("append", 70)):
        for b, value in itertools.product(range(2), (-1, INT_MIN, tokens + 1, INT_MAX)):
            text = f"left_padding[{b}] must be in [0, {tokens}], got {value}"
            spoil = element("left_padding", (b,), value)
            yield Spoiled(op, f"left_padding[{b}]={value}", spoil, text)
    for op, b in itertools.product(STORE_OPS, range(2)):
        for value in (-1, INT_MIN, LONGEST + 1, INT_MAX):
            text = f"seq_lens[{b}] must be in [0, {LONGEST}], got {value}"
            yield Spoiled(op, f"seq_lens[{b}]={value}", element("seq_lens", (b,), value), text)
    for b, seq_len in enumerate((130, 70)):
        for value in (-1, INT_MIN, seq_len + 1, INT_MAX):
            text = f"new_lens[{b}] must be in [0, {seq_len}], got {value}"
            yield Spoiled(
                "rewind", f"new_lens[{b}]={value}", element("new_lens", (b,), value), text
            )

    # Pages that become full in the append (130 and 70 tokens become 200 and 137), that the rewinds
    # reopen, and that are read.
    looked_at = {
        "append": ((0, 2), (1, 1)),
        "rewind": ((0, 0),),
        "dequantize": ((0, 0), (0, 1), (1, 0)),
        "decode": ((0, 0), (0, 1), (1, 0)),
    }
    # pool[0] is of 8 bit, pool[1] of 4 bit; there is no pool[2].
    beyond = [len(slab) + (i << 21) for i, slab in enumerate(TURBO.sample("decode")["pool"])]
    for op, pages in looked_at.items():
        for (b, page), kv, head in itertools.product(pages, range(2), range(H)):
            for value in (-1, INT_MIN, *beyond, 2 << 21, INT_MAX):
                index = (b, kv, head, page)
                text = f"block_table{list(index)} must be the entry of a block of pool, got {value}"
                spoil = element("block_table", index, value)
                yield Spoiled(op, f"block_table{list(index)}={value}", spoil, text)
    pairs = (((0, 0, 0, 2), (0, 1, 0, 2)), ((0, 0, 0, 2), (1, 0, 1, 1)))
    for a, b in pairs:

        def twice(args: Arguments, a=a, b=b) -> None:
            args["block_table"][a] = args["block_table"][b]

        entry = int(TURBO.sample("append")["block_table"][b])
        text = "block_table must be distinct entries for the pages that become full, got "
        yield Spoiled("append", f"block_table-{a}=={b}", twice, f"{text}{entry} twice")

    for name, last, step in (("cu_seqlens_q", 5, 2), ("cu_seqlens_k", 70, 30)):
        for i, value, expected in (
            (0, 1, "0"),
            (0, INT_MIN, "0"),
            (1, -1, "at least 0"),
            (1, INT_MIN, "at least 0"),
            (2, step - 1, f"at least {step}"),
            (2, last - 1, str(last)),
            (2, last + 1, str(last)),
            (2, INT_MAX, str(last)),
        ):
            text = f"{name}[{i}] must be {expected}, got {value}"
            spoil = element(name, (i,), value)
            yield Spoiled("attention_packed", f"{name}[{i}]={value}", spoil, text)


def of_pools() -> Iterator[Spoiled]:
    u8 = torch.uint8
    slab = torch.zeros(9, BLOCK, dtype=u8)
    pools: tuple[tuple[str, list[Tensor], str], ...] = (
        ("dtype", [slab.to(torch.int8)], "pool[0] must be uint8, got int8"),
        ("float", [slab, slab.float()], "pool[1] must be uint8, got float32"),
        ("rank1", [slab[0]], f"pool[0] must be {ROWS}, got [{BLOCK}]"),
        ("rank3", [slab[None]], f"pool[0] must be {ROWS}, got [1, 9, {BLOCK}]"),
        ("scalar", [slab.sum().to(u8)], f"pool[0] must be {ROWS}, got []"),
        ("width-", [slab[:, 1:].clone()], f"pool[0] must be {ROWS}, got [9, {BLOCK - 1}]"),
        ("width0", [slab[:, :0].clone()], f"pool[0] must be {ROWS}, got [9, 0]"),
        ("of_96", [slab, slab.new_zeros(9, 6208)], f"pool[1] must be {ROWS}, got [9, 6208]"),
        (
            "columns",
            [slab.T.contiguous().T],
            "pool[0] must be contiguous, got strides [1, 9]",
        ),
        (
            "every_second",
            [slab, slab[::2]],
            f"pool[1] must be contiguous, got strides [{2 * BLOCK}, 1]",
        ),
        (
            "expanded",
            [slab[:1].expand(9, -1)],
            "pool[0] must be contiguous, got strides [0, 1]",
        ),
        (
            "blocks",
            [slab[:1].expand(2**21 + 1, -1)],
            "pool[0] must be at most 2097152 blocks, got 2097153",
        ),
        (
            "2**62_blocks",
            [slab[:1, :1].expand(2**50, BLOCK)],
            f"pool[0] must be at most 2097152 blocks, got {2**50}",
        ),
        ("slabs", [slab[:0]] * 1025, "pool must be at most 1024 slabs, got 1025"),
    )
    for op in STORE_OPS:
        for label, pool, text in pools:
            yield Spoiled(op, f"pool-{label}", put("pool", pool), text)
    for op, index in (("append", (0, 0, 0, 2)), ("decode", (0, 0, 0, 0)), ("rewind", (0, 0, 0, 0))):
        entry = int(TURBO.sample(op)["block_table"][index])
        text = f"block_table{list(index)} must be the entry of a block of pool, got {entry}"
        yield Spoiled(op, "pool-empty", put("pool", []), text)


# ---- Memory


def of_overlapping_memory() -> Iterator[Spoiled]:
    """Slabs that share a block, and the tail between two tokens of k."""

    def overlap(args: Arguments) -> None:
        rows = len(args["pool"][1])
        memory = torch.zeros((2 * rows - 1) * 2240, dtype=torch.uint8)
        args["pool"][1:] = [
            memory[: rows * 2240].view(rows, 2240),
            memory[-rows * 2240 :].view(rows, 2240),
        ]

    text = "pool must be slabs that do not overlap, got pool[1] and pool[2] in the same memory"
    yield Spoiled("append", "slabs-share-a-block", overlap, text)

    def twice(args: Arguments) -> None:
        args["pool"].append(args["pool"][0])

    text = "pool must be slabs that do not overlap, got pool[0] and pool[2] in the same memory"
    yield Spoiled("append", "slab-twice", twice, text)

    def between(args: Arguments) -> None:
        """The tail between two tokens of k."""
        k, tail = args["k"], args["tail"]
        gap = tail.nbytes // 4
        memory = torch.zeros(2, 2, 70, 64 + gap)
        args["k"] = memory[..., :64].copy_(k)
        args["tail"] = memory[0, 0, 3, 64:].view(torch.uint8).view(tail.shape).copy_(tail)

    text = "tail must be in memory of its own, got that of k"
    yield Spoiled("append", "tail-between-tokens", between, text)


# ---- Sizes that no memory holds


# An attention whose scratch memory, 2 * pages * 4160 bytes, is 2^64 and a little.
WRAPPING = 64 * -(-(2**64) // (2 * BLOCK))


def of_sizes() -> Iterator[Spoiled]:
    room = "must be small enough for the memory of cpu, got"
    # The address space ends at 2^47 bytes: these fail however generous the system is.
    long = huge(1, 1, 2**56, D)
    for op, tensors, text in (
        ("calibrate", {"k": huge(2**40, 1, 0, D)}, f"k_balance {room} float32 [{2**40}, 1, 64]"),
        ("head_priority", {"x": huge(2**46, 1, 0, D)}, f"priority {room} float32 [{2**46}, 1]"),
        (
            "quantize",
            {"k": huge(2**40, 1, 0, D), "v": huge(2**40, 1, 0, D)},
            f"tail {room} uint8 [{2**40}, 2, 1, 2, {BLOCK}]",
        ),
        (
            "quantize",
            {"k": huge(1, 2**50, 63, D), "v": huge(1, 2**50, 63, D)},
            f"tail {room} uint8 [1, 2, {2**50}, 2, {BLOCK}]",
        ),
        (
            "quantize",
            {"k": huge(2**24, 2, 2**31 - 1, D), "v": huge(2**24, 2, 2**31 - 1, D)},
            f"k must be of at most 2097152 pages of 8 bit, got {2**26}",
        ),
        (
            "quantize",
            {"k": long, "v": long},
            f"k must be at most {INT_MAX} tokens, got {2**56}",
        ),
        (
            "attention",
            {"q": huge(1, 2**50, 1, D), "k": huge(1, 1, 1, D), "v": huge(1, 1, 1, D)},
            f"out {room} float32 [1, {2**50}, 1, 64]",
        ),
    ):
        yield Spoiled(
            op, f"huge-{math.prod(next(iter(tensors.values())).shape)}", plain(**tensors), text
        )

    def long_output(args: Arguments) -> None:
        store = cases.empty_store(256, 1, D, 1)
        args.update(zip(("pool", "block_table", "tail", "seq_lens"), store.readable, strict=True))
        args.update(k_balance=None, k_mean=None, kv_len=INT_MAX)

    text = f"k {room} float32 [256, 1, {INT_MAX}, 64]"
    yield Spoiled("dequantize", "huge", long_output, text)
    # 2^63 - 1 stands for more than that.
    for op, tensors, scratch_bytes in (
        ("calibrate", {"k": long}, 2**50 * D * 8),
        ("head_priority", {"x": long}, 2**46 * D * 4),
        ("attention", {"q": torch.zeros(1, 1, 1, D), "k": long, "v": long}, 2**63 - 1),
        (
            "attention",
            dict(
                zip("qkv", (torch.zeros(1, 1, 1, D), *[huge(1, 1, WRAPPING, D)] * 2), strict=True)
            ),
            2**63 - 1,
        ),
    ):
        yield Spoiled(
            op,
            f"scratch-{next(reversed(tensors.values())).shape[2]}",
            plain(**tensors),
            f"no memory for {scratch_bytes} bytes of scratch",
            NO_MEMORY,
            exact=False,
        )
