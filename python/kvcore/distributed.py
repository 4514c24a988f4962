"""Attention over several processes: heads or context are spread over the ranks of a group.

Nothing here knows which cache a rank holds: every attention op of kvcore returns its ``lse``, and
that is all that a merge needs. With heads spread (tensor parallel) results are the same bits as in
one process. With the context spread the merge adds fp32 rounding, and ops that round probabilities
beside their running maximum (turbo's, to int8) round some of them otherwise.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kvcore.ops import merge_attention


def _check(function: str, condition: bool, argument: str, expected: object, actual: object) -> None:
    if not condition:
        raise ValueError(f"{function}: {argument} must be {expected}, got {actual}")


def _check_rank(function: str, rank: int, world_size: int) -> None:
    _check(function, world_size >= 1, "world_size", "at least 1", world_size)
    _check(function, 0 <= rank < world_size, "rank", f"in [0, {world_size})", rank)


def head_shard(q_heads: int, kv_heads: int, rank: int, world_size: int) -> tuple[slice, slice]:
    """The query and the kv heads of a rank, in order of rank: whole groups of heads.

    Args:
        q_heads: number of query heads, a multiple of kv_heads.
        kv_heads: number of kv heads, a multiple of world_size.
        rank: this process's number in the group.
        world_size: processes of the group.

    Returns:
        Slices of the dimensions of query heads and of kv heads.

    Raises:
        ValueError: ``head_shard: <argument> must be <expected>, got <actual>``.
    """
    _check_rank("head_shard", rank, world_size)
    whole = kv_heads >= 1 and kv_heads % world_size == 0
    _check("head_shard", whole, "kv_heads", f"a positive multiple of {world_size}", kv_heads)
    whole = q_heads >= 1 and q_heads % kv_heads == 0
    _check("head_shard", whole, "q_heads", f"a positive multiple of {kv_heads}", q_heads)
    return tuple(
        slice(rank * heads // world_size, (rank + 1) * heads // world_size)
        for heads in (q_heads, kv_heads)
    )


def context_shard(num_tokens: int, rank: int, world_size: int, multiple: int = 64) -> slice:
    """The tokens of a context that a rank holds: consecutive, in order of rank.

    Ranks get nearly equal numbers of whole pages. The last one has what is left over, and is the
    one that new tokens are appended to.

    Args:
        num_tokens: length of the context.
        rank: this process's number in the group.
        world_size: processes of the group.
        multiple: tokens of a page, where quantization begins anew: 64 in the turbo store.

    Returns:
        A slice of the tokens, empty for some ranks if there are fewer pages than ranks.

    Raises:
        ValueError: ``context_shard: <argument> must be <expected>, got <actual>``.
    """
    _check_rank("context_shard", rank, world_size)
    _check("context_shard", num_tokens >= 0, "num_tokens", "at least 0", num_tokens)
    _check("context_shard", multiple >= 1, "multiple", "at least 1", multiple)
    pages = num_tokens // multiple
    begin, end = (i * pages // world_size * multiple for i in (rank, rank + 1))
    return slice(begin, num_tokens if rank == world_size - 1 else end)


def _gathered(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return parts


def merge_context(
    out: Tensor, lse: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over a whole context from each rank's attention over its part of it.

    Every rank gets the same bits. All have the same queries; with new tokens in the last rank's
    part, that rank attends causally and the others see all of their part (``causal=False``).

    Args:
        out: ``[batch, q_heads, q_len, head_dim]`` of this rank, any dtype.
        lse: fp32 ``[batch, q_heads, q_len]``, natural log; -inf where this rank has no key.
        group: processes that share the context; the default group if None.

    Returns:
        ``out`` and ``lse`` over all parts, shapes and dtypes of the arguments. They are exchanged
        in fp32, ``4 (head_dim + 1)`` bytes a row and rank.
    """
    packed = torch.cat([out.float(), lse.unsqueeze(-1)], -1)
    parts = _gathered(packed, group)
    outs = [part[..., :-1] for part in parts]
    merged, merged_lse = merge_attention(outs, [part[..., -1] for part in parts])
    return merged.to(out.dtype), merged_lse


def gather_heads(out: Tensor, group: dist.ProcessGroup | None = None, dim: int = 1) -> Tensor:
    """The heads of all ranks, in order of rank.

    Args:
        out: this rank's heads, as many as every other's.
        group: processes that share the heads; the default group if None.
        dim: dimension of the heads; 1 in ``[batch, q_heads, q_len, head_dim]``.

    Returns:
        A tensor of ``world_size`` times as many heads, the same on every rank.
    """
    return torch.cat(_gathered(out, group), dim)
