"""Adapter for worker.py: FlashInfer's attention over a dense cache in bf16 and fp8."""

from __future__ import annotations

from collections.abc import Callable

PAGE_TOKENS = 16
WORKSPACE_BYTES = 128 << 20


def _decode(q, k, v) -> dict[str, Callable]:
    """One token of each sequence over pages that lie in order; its plan is made beforehand."""
    import flashinfer
    import torch

    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if q_len != 1 or kv_len % PAGE_TOKENS:
        return {}
    pages = kv_len // PAGE_TOKENS
    rows = q[:, :, 0].bfloat16().contiguous()
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * pages
    indices = torch.arange(batch * pages, dtype=torch.int32, device=q.device)
    filled = torch.full((batch,), PAGE_TOKENS, dtype=torch.int32, device=q.device)

    def paged(x, dtype):
        x = x.view(batch, kv_heads, pages, PAGE_TOKENS, head_dim).transpose(1, 2)
        return x.reshape(batch * pages, kv_heads, PAGE_TOKENS, head_dim).to(dtype)

    variants = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True
        )
        wrapper.plan(
            starts,
            indices,
            filled,
            q_heads,
            kv_heads,
            head_dim,
            PAGE_TOKENS,
            q_data_type=torch.bfloat16,
            kv_data_type=dtype,
        )
        cache = paged(k, dtype), paged(v, dtype)

        def run(wrapper=wrapper, cache=cache):
            return wrapper.run(rows, cache)[:, :, None]

        variants[name] = run
    return variants


def _prefill(q, k, v) -> dict[str, Callable]:
    import flashinfer

    rows = [x[0].transpose(0, 1).bfloat16().contiguous() for x in (q, k, v)]

    def run():
        out = flashinfer.single_prefill_with_kv_cache(*rows, causal=True, kv_layout="NHD")
        return out.transpose(0, 1)[None]

    return {"bf16": run}


WORK = {"decode": _decode, "prefill": _prefill}


def load(arrays: dict, *, work: str, threads: int, device: str) -> dict[str, Callable]:
    """Its kernels are compiled on their first call, which is not timed."""
    import torch

    torch.set_grad_enabled(False)
    return WORK[work](*(torch.from_numpy(arrays[name]).to(device) for name in "qkv"))
