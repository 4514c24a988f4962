"""Decoding over a quantized cache that two processes share: by heads, then by context.

    python examples/two_processes.py

Each process stores its part of K and V; neither ever sees the other's. The result is compared with
that of one process that holds everything. Gloo and CPUs here; with GPUs only the backend and the
device of the tensors change.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import kvcore
from kvcore.distributed import context_shard, gather_heads, head_shard, merge_context

PROCESSES = 2
BATCH, Q_HEADS, KV_HEADS, TOKENS, HEAD_DIM = 1, 8, 2, 1024, 64


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, Q_HEADS, 1, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, BATCH, KV_HEADS, TOKENS, HEAD_DIM, generator=generator)
    return q, k, v


def decode(q, k, v, calibration, causal=True, sink_pages=1):
    """Stores K and V at 4 bit and attends to them: the output and its logarithmic sum."""
    k_balance, k_mean = calibration
    *pools, table, tail, _, _, lens = kvcore.turbo_quantize(
        k, v, k_balance, k_mean, sink_pages=sink_pages
    )
    pool = [slab for slab in pools if slab.shape[0]]
    return kvcore.turbo_decode(q, pool, table, tail, lens, k_balance, k_mean, causal=causal)


def by_heads(q, k, v, calibration, rank):
    """Tensor parallel: this process has some of the heads, and the whole context of those."""
    q_slice, kv_slice = head_shard(Q_HEADS, KV_HEADS, rank, PROCESSES)
    mine = [x[:, kv_slice] for x in calibration]
    out, _ = decode(q[:, q_slice], k[:, kv_slice], v[:, kv_slice], mine)
    return gather_heads(out)


def by_context(q, k, v, calibration, rank):
    """Context parallel: this process has some of the tokens, of all heads."""
    tokens = context_shard(TOKENS, rank, PROCESSES)
    out, lse = decode(
        q,
        k[:, :, tokens],
        v[:, :, tokens],
        calibration,
        # The newest token is the last process's; to the others it is later than all they hold.
        causal=rank == PROCESSES - 1,
        # The first page of the context, which stays at 8 bit, is the first process's.
        sink_pages=int(rank == 0),
    )
    return merge_context(out, lse)[0]


def run(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    q, k, v = inputs()
    # Every part of K has the same calibration, so its codes are those that one process would have.
    calibration = kvcore.turbo_calibrate(k)
    expected, _ = decode(q, k, v, calibration)
    heads = by_heads(q, k, v, calibration, rank)
    context = by_context(q, k, v, calibration, rank)
    if rank == 0:
        print("by heads: the same bits" if heads.equal(expected) else "by heads: they DIFFER")
        error = ((context - expected).norm() / expected.norm()).item()
        print(f"by context: relative difference {error:.1e}")
        assert heads.equal(expected)
        # The merge is exact to fp32 rounding. Inside a part probabilities are rounded to int8
        # beside the part's own maximum, so some of them fall on the other side.
        assert error < 2e-3
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(os.path.join(folder, "store"),), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
