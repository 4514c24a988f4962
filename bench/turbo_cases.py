"""Cases of quantized attention: decode, int8 prefill, append."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peers import turbo as peers
from torch import Tensor

import kvcore
from cases import (
    HEAD_DIM,
    KV_HEADS,
    Q_HEADS,
    Case,
    Planned,
    Task,
    Variant,
    _checked,
    _num_bytes,
    _relative_error,
)

# Room for those of all rounds in a cache of fixed capacity.
APPENDED_TOKENS = 1024
WIDTHS = {"8 bit": (8, 8), "4 bit": (4, 4), "K4V2": (4, 2), "2 bit": (2, 2)}
# What the formats lose on Gaussian data, with room for the spread of one seed: a kernel that
# computes something else is not timed. At most 0.020, 0.131, 0.43 and 0.59 were measured, the last
# two at 128k tokens, where V at 2 bit drifts a little. Codes of 4 bit that are not centred in their
# range lose 0.176.
MAX_ERROR = {"8 bit": 0.022, "4 bit": 0.148, "K4V2": 0.47, "2 bit": 0.65}


def _inputs(
    batch: int,
    q_len: int,
    kv_len: int,
    device: torch.device,
    head_dim: int = HEAD_DIM,
    kv_heads: int = KV_HEADS,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kv_len + q_len)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, head_dim, generator=generator).to(device)

    return normal(Q_HEADS, q_len), normal(kv_heads, kv_len), normal(kv_heads, kv_len)


def _shape(
    batch: int, q_len: int, kv_len: int, head_dim: int = HEAD_DIM, kv_heads: int = KV_HEADS
) -> dict[str, int]:
    sizes = {"batch": batch, "q_len": q_len, "kv_len": kv_len}
    return {**sizes, "q_heads": Q_HEADS, "kv_heads": kv_heads, "head_dim": head_dim}


def _store(k: Tensor, v: Tensor, k_bits: int, v_bits: int):
    balance, mean = kvcore.turbo_calibrate(k)
    p8, p4, p2, table, tail, tail_scale, clamps, lens = kvcore.turbo_quantize(
        k, v, balance, mean, k_bits=[k_bits], v_bits=[v_bits]
    )
    pool = [p for p in (p8, p4, p2) if p.shape[0]]
    return pool, table, tail, tail_scale, clamps, lens, balance, mean


def _add_backends(
    case: Case, q: Tensor, k: Tensor, v: Tensor, expected: Tensor, num_bytes: int, ceiling: str
) -> None:
    """torch's kernels by name; one that refuses the shape is absent, with its reason."""
    for name, run in peers.sdpa_backends(q, k, v).items():
        try:
            out = run()
        except RuntimeError as error:
            case.absent[name] = f"failed: {str(error).splitlines()[0]}"
            continue
        error = _checked(name, _relative_error(out, expected), 0.01)
        case.variants[name] = Variant(run, num_bytes, error, ceiling)


def _decode(
    batch: int,
    q_len: int,
    kv_len: int,
    device: torch.device,
    head_dim: int = HEAD_DIM,
    kv_heads: int = KV_HEADS,
) -> Planned:
    name = f"decode, {kv_len} tokens, batch {batch}, q_len {q_len}"
    name += "" if head_dim == HEAD_DIM else f", head_dim {head_dim}"
    name += "" if kv_heads == KV_HEADS else f", {kv_heads} kv heads"
    shape = _shape(batch, q_len, kv_len, head_dim, kv_heads)
    return Planned(name, lambda: _build_decode(Case(name, shape, {}), device, **shape))


def _build_decode(
    case: Case,
    device: torch.device,
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
) -> Case:
    q, k, v = _inputs(batch, q_len, kv_len, device, head_dim, kv_heads)
    dense = peers.sdpa_decode(q, k, v)
    expected = dense["SDPA fp32, enable_gqa"]()
    for name, run in dense.items():
        size = 2 if "bf16" in name else 4
        error = _checked(name, _relative_error(run(), expected), 0.01)
        case.variants[name] = Variant(run, 2 * k.numel() * size, error)
    _add_backends(case, q, k, v, expected, 4 * k.numel(), "read")
    q16 = q.bfloat16()
    for name, (k_bits, v_bits) in WIDTHS.items():
        pool, table, tail, _, _, lens, balance, mean = _store(k, v, k_bits, v_bits)

        def run(pool=pool, table=table, tail=tail, lens=lens, balance=balance, mean=mean):
            return kvcore.turbo_decode(q16, pool, table, tail, lens, balance, mean)[0]

        error = _checked(name, _relative_error(run(), expected), MAX_ERROR[name])
        case.variants[f"kvcore {name}"] = Variant(run, _num_bytes(*pool, table), error)
    case.task = Task("decode", {"q": q, "k": k, "v": v}, expected)
    case.operations = 4 * batch * q_heads * q_len * kv_len * head_dim
    return case


def _prefill(tokens: int, device: torch.device) -> Planned:
    name = f"causal prefill, {tokens} tokens"
    return Planned(name, lambda: _build_prefill(name, tokens, device))


def _build_prefill(name: str, tokens: int, device: torch.device) -> Case:
    q, k, v = _inputs(1, tokens, tokens, device)
    case = Case(name, _shape(1, tokens, tokens), {}, cold=False)
    dense = peers.sdpa_prefill(q, k, v)
    expected = dense["SDPA fp32"]()
    for name, run in dense.items():
        error = _checked(name, _relative_error(run(), expected), 0.01)
        case.variants[name] = Variant(run, 0, error, f"{name[-4:]} matmul")
    _add_backends(case, q, k, v, expected, 0, "bf16 matmul")
    q16, k16, v16 = (x.bfloat16() for x in (q, k, v))

    def run():
        return kvcore.turbo_attention(q16, k16, v16, causal=True)[0]

    error = _checked("int8", _relative_error(run(), expected), MAX_ERROR["8 bit"])
    case.variants["kvcore int8"] = Variant(run, 0, error, "int8 matmul")
    case.task = Task("prefill", {"q": q, "k": k, "v": v}, expected)
    case.operations = 2 * Q_HEADS * tokens * tokens * HEAD_DIM  # half of 4: causal
    return case


def _append(kv_len: int, layers: int, device: torch.device) -> Planned:
    count = "1 layer" if layers == 1 else f"{layers} layers"
    name = f"append one token to {count} at {kv_len} tokens"
    return Planned(name, lambda: _build_append(name, kv_len, layers, device))


def _build_append(name: str, kv_len: int, layers: int, device: torch.device) -> Case:
    """One token's K and V joins the cache of each layer.

    With a single layer and a cold cache torch's and Python's code is as cold as the data. In a step
    of several layers only the first one pays for that.
    """
    from transformers import LlamaConfig

    from kvcore.cache import TurboCache

    _, k, v = _inputs(1, 1, kv_len, device)
    k, v = k.bfloat16(), v.bfloat16()
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        hidden_size=Q_HEADS * HEAD_DIM,
    )
    new = k[:, :, -1:].clone(), v[:, :, -1:].clone()
    caches = {
        "DynamicCache": peers.dynamic_cache(),
        "StaticCache": peers.static_cache(config, kv_len + APPENDED_TOKENS),
        "kvcore TurboCache": TurboCache(config),
    }
    if layers == 1:  # 0.4 s a layer
        caches["QuantizedCache fp8"] = peers.quantized_cache(config)
    case = Case(name, _shape(1, 1, kv_len), {})
    case.shape["layers"] = layers
    for name, cache in caches.items():
        for layer in range(layers):
            cache.update(k, v, layer)

        def run(cache=cache):
            for layer in range(layers):
                cache.update(*new, layer)

        case.variants[name] = Variant(run)
    return case


def turbo(quick: bool, device: torch.device) -> Iterator[Planned]:
    """Cases of the turbo family, each built only when its turn comes."""
    for kv_len in (4096,) if quick else (1024, 4096, 16384, 32768, 131072):
        yield _decode(1, 1, kv_len, device)
    yield _prefill(1024, device)
    yield _append(4096 if quick else 32768, 1, device)
    if quick:
        return
    yield _prefill(4096, device)
    yield _append(32768, 16, device)
    yield _decode(8, 1, 4096, device)
    yield _decode(1, 4, 32768, device)
    for head_dim in (64, 256):
        yield _decode(1, 1, 32768, device, head_dim)
    for kv_heads in (2, 32):
        yield _decode(1, 1, 4096, device, kv_heads=kv_heads)
