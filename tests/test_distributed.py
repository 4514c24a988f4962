"""Heads and context spread over processes."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kvcore.distributed import context_shard, gather_heads, head_shard, merge_context

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("q_heads", "kv_heads", "world_size"), [(32, 8, 4), (8, 8, 8), (6, 2, 1)])
def test_head_shards_are_whole_groups(q_heads, kv_heads, world_size):
    group = q_heads // kv_heads
    q_seen, kv_seen = [], []
    for rank in range(world_size):
        q, kv = head_shard(q_heads, kv_heads, rank, world_size)
        mine = range(q_heads)[q]
        assert {head // group for head in mine} == set(range(kv_heads)[kv])
        q_seen += mine
        kv_seen += range(kv_heads)[kv]
    assert q_seen == list(range(q_heads))
    assert kv_seen == list(range(kv_heads))


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_context_shards_are_whole_pages(num_tokens, world_size):
    shards = [context_shard(num_tokens, rank, world_size) for rank in range(world_size)]
    assert [i for s in shards for i in range(num_tokens)[s]] == list(range(num_tokens))
    assert all(s.start % 64 == 0 for s in shards)
    pages = [(s.stop - s.start) // 64 for s in shards]
    assert max(pages) - min(pages) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head_shard(8, 2, 2, 2), "head_shard: rank must be in [0, 2), got 2"),
        (lambda: head_shard(8, 2, 0, 0), "head_shard: world_size must be at least 1, got 0"),
        (
            lambda: head_shard(9, 3, 0, 2),
            "head_shard: kv_heads must be a positive multiple of 2, got 3",
        ),
        (
            lambda: head_shard(9, 2, 0, 2),
            "head_shard: q_heads must be a positive multiple of 2, got 9",
        ),
        (
            lambda: context_shard(-1, 0, 2),
            "context_shard: num_tokens must be at least 0, got -1",
        ),
        (lambda: context_shard(8, -1, 2), "context_shard: rank must be in [0, 2), got -1"),
        (
            lambda: context_shard(8, 0, 2, 0),
            "context_shard: multiple must be at least 1, got 0",
        ),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def _attention(q, k, v):
    scores = q.double() @ k.double().mT
    return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1).float()


def _run(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    torch.set_num_threads(1)
    q, k, v = torch.randn(3, 2, 4, 30, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        # The middle rank has no token: its rows are 0 and -inf.
        tokens = (slice(0, 20), slice(20, 20), slice(20, 30))[rank]
        out, lse = _attention(q.to(dtype), k[:, :, tokens], v[:, :, tokens])
        found[str(dtype)] = merge_context(out, lse)
    found["heads"] = gather_heads(q[:, rank : rank + 1])
    sub = dist.new_group([0, 2])  # not the default group
    if rank != 1:
        found["sub"] = merge_context(*_attention(q, k[:, :, :5], v[:, :, :5]), group=sub)
    torch.save(found, f"{results}/{rank}")
    dist.destroy_process_group()


def test_merging_over_three_processes(tmp_path):
    mp.spawn(_run, args=(tmp_path / "store", tmp_path), nprocs=3)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(3)]
    q, k, v = torch.randn(3, 2, 4, 30, 8, generator=torch.Generator().manual_seed(0))
    # In bf16 the parts, their merge and what it is compared with are rounded, by 2^-9 of at most 3.
    for dtype, rtol, atol in ((torch.float32, 1e-6, 1e-6), (torch.bfloat16, 0, 9 * 2**-9)):
        expected = _attention(q.to(dtype), k, v)
        for rank in ranks:
            out, lse = rank[str(dtype)]
            assert out.dtype == dtype
            torch.testing.assert_close(out, expected[0], rtol=rtol, atol=atol)
            torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)
            assert out.equal(ranks[0][str(dtype)][0])
    assert all(rank["heads"].equal(q[:, :3]) for rank in ranks)
    # Two equal parts of five tokens: the same output, twice the sum.
    out, lse = _attention(q, k[:, :, :5], v[:, :, :5])
    torch.testing.assert_close(ranks[2]["sub"][0], out)
    torch.testing.assert_close(ranks[2]["sub"][1], lse + torch.tensor(2.0).log())


def test_the_example_agrees_with_one_process():
    example = ROOT / "examples" / "two_processes.py"
    result = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    assert "by heads: the same bits" in result.stdout
    assert "by context: relative difference" in result.stdout
