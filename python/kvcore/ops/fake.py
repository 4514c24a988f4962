"""Shapes and dtypes of every op for tracing, and backwards that refuse by name."""

import torch
from torch import Tensor

TAIL_SLOTS, PAGE_TOKENS, HEADER_BYTES = 2, 64, 64
TILE_TOKENS, BLOCK_TILES = 32, 128
_INPUTS = ("q", "k", "v", "x")


def block_bytes(bits: int, head_dim: int) -> int:
    """Bytes of a 64-token block of one head, as ``csrc/turbo/layout.h`` defines them."""
    side = 0 if bits == 8 else 2 * head_dim
    return HEADER_BYTES + side + PAGE_TOKENS * head_dim * bits // 8


def _check(name: str, argument: str, x: Tensor, first: str, like: Tensor, dims: int | None) -> None:
    if dims is not None and argument in _INPUTS and x.dim() != dims:
        raise RuntimeError(f"{name}: {argument} must be {dims}-dimensional, got {list(x.shape)}")
    if x.device != like.device:
        # Any meta tensor brings a call here, whatever the others are: unchecked, the call would
        # return memory that nothing wrote.
        raise RuntimeError(
            f"{name}: {argument} must be on {like.device} like {first}, got {x.device}"
        )


def register_fake(name: str, dims: int | None = 4):
    """Registers a function of the op's arguments, behind the checks that tracing can make.

    ``dims``: dimensions of the inputs called q, k, v or x; None: any.
    """
    names = [a.name for a in getattr(torch.ops.kvcore, name).default._schema.arguments]

    def register(function):
        def fake(*args, **kwargs):
            tensors = []
            for argument, value in zip(names, args, strict=False):
                if isinstance(value, Tensor):
                    tensors.append((argument, value))
                elif isinstance(value, list | tuple):
                    tensors += [(f"{argument}[{i}]", x) for i, x in enumerate(value)]
            for argument, value in tensors:
                _check(name, argument, value, *tensors[0], dims)
            return function(*args, **kwargs)

        torch.library.register_fake(f"kvcore::{name}")(fake)

    return register


@torch.library.register_fake("kvcore::raise_errors")
def _(like):
    return None


@register_fake("turbo_attention")
def _(q, k, v, *args, **kwargs):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_fake("turbo_decode")
def _(q, pool, *args, **kwargs):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_fake("turbo_calibrate")
def _(k, left_padding=None, **kwargs):
    shape = (k.shape[0], k.shape[1], k.shape[3])
    return k.new_empty(shape, dtype=torch.float32), k.new_empty(shape, dtype=torch.float32)


@register_fake("turbo_head_priority")
def _(x, left_padding=None, **kwargs):
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@register_fake("turbo_quantize")
def _(
    k,
    v,
    k_balance=None,
    k_mean=None,
    left_padding=None,
    *,
    k_bits=(4,),
    v_bits=(4,),
    sink_pages=1,
    tail_margin=1.25,
    check_values=False,
):
    batch, kv_heads, kv_len, head_dim = k.shape
    pages = kv_len // PAGE_TOKENS
    widths = [b for bits in (k_bits, v_bits) for b in (bits * kv_heads if len(bits) == 1 else bits)]
    if left_padding is None:
        sinks = min(sink_pages, pages)
        blocks = {b: batch * (pages - sinks) * widths.count(b) for b in (8, 4, 2)}
        blocks[8] += batch * sinks * 2 * kv_heads
    else:  # how many pages each sequence fills depends on the values of left_padding
        blocks = {b: torch.library.get_ctx().new_dynamic_size() for b in (8, 4, 2)}
    pools = [k.new_empty((blocks[b], block_bytes(b, head_dim)), dtype=torch.uint8) for b in blocks]
    per_head = (batch, 2, kv_heads)
    return (
        *pools,
        k.new_empty((*per_head, pages), dtype=torch.int32),
        k.new_empty((*per_head, TAIL_SLOTS, block_bytes(8, head_dim)), dtype=torch.uint8),
        k.new_empty(per_head, dtype=torch.float32),
        k.new_empty(per_head, dtype=torch.int64),
        k.new_empty((batch,), dtype=torch.int32),
    )


@register_fake("turbo_append")
def _(*args, **kwargs):
    return None


@register_fake("turbo_rewind")
def _(*args, **kwargs):
    return None


@register_fake("turbo_dequantize")
def _(
    pool,
    block_table,
    tail,
    seq_lens,
    k_balance=None,
    k_mean=None,
    *,
    kv_len,
    right_align=False,
    dtype=torch.float32,
    check_values=False,
):
    batch, _, kv_heads = block_table.shape[:3]
    head_dim = (tail.shape[-1] - HEADER_BYTES) // PAGE_TOKENS
    shape = (batch, kv_heads, kv_len, head_dim)
    return tail.new_empty(shape, dtype=dtype), tail.new_empty(shape, dtype=dtype)


@register_fake("lexico_encode")
def _(x, dictionary, gram=None, *, sparsity, tolerance=0.0, dtype=torch.int8, check_values=False):
    shape = x.shape[:3]
    return (
        x.new_empty((*shape, sparsity), dtype=torch.int16),
        x.new_empty((*shape, sparsity), dtype=dtype),
        x.new_empty(shape, dtype=torch.float16),
        x.new_empty(shape, dtype=torch.float32),
    )


@register_fake("lexico_reconstruct")
def _(indices, coefficients, scale, dictionary, *, dtype=torch.float32, check_values=False):
    return dictionary.new_empty((*indices.shape[:3], dictionary.shape[1]), dtype=dtype)


@register_fake("lexico_append")
def _(*args, **kwargs):
    return None


@register_fake("lexico_seal")
def _(k_tail, v_tail, *, v_atoms):
    # How many pairs are not zero depends on the values.
    sizes = [torch.library.get_ctx().new_dynamic_size() for _ in range(2)]
    return tuple(k_tail.new_empty((*k_tail.shape[:2], size)) for size in sizes)


@register_fake("lexico_unseal")
def _(k_block, v_block, *, k_sparsity, v_sparsity, v_atoms):
    return tuple(
        k_block.new_empty((*k_block.shape[:2], BLOCK_TILES, TILE_TOKENS * (3 * sparsity + 2)))
        for sparsity in (k_sparsity, v_sparsity)
    )


@register_fake("lexico_unpack")
def _(tail, *, kv_len):
    sparsity = (tail.shape[3] // TILE_TOKENS - 2) // 3
    shape = (*tail.shape[:2], kv_len)
    return (
        tail.new_empty((*shape, sparsity), dtype=torch.int16),
        tail.new_empty((*shape, sparsity), dtype=torch.int8),
        tail.new_empty(shape, dtype=torch.float16),
    )


@register_fake("lexico_attention")
def _(q, *args, **kwargs):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def refuse_backward(name: str, instead: str | None = None) -> None:
    """Makes the op's backward an error that names what to train with instead, if there is."""
    advice = "call it under torch.no_grad()"
    advice += "" if instead is None else f" or use {instead} for training"

    def backward(ctx, *grads: Tensor):
        raise RuntimeError(f"{name}: has no backward; {advice}")

    torch.library.register_autograd(f"kvcore::{name}", backward)


for _name in ("turbo_attention", "turbo_decode", "lexico_attention"):
    refuse_backward(_name, "torch.nn.functional.scaled_dot_product_attention")
for _name in (
    "turbo_calibrate",
    "turbo_head_priority",
    "turbo_quantize",
    "turbo_dequantize",
    "lexico_encode",
    "lexico_reconstruct",
):
    refuse_backward(_name)
