"""Cases of exact attention: forward and backward against torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kvcore
from cases import HEAD_DIM, KV_HEADS, Q_HEADS, Case, Planned, Variant, _checked, _relative_error

TORCH = "SDPA"
# Against torch's in fp32. Rounding a result to bf16 alone is 1.7e-3.
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
MAX_GRADIENT_ERROR = {torch.float32: 2e-5, torch.bfloat16: 4e-3}
# torch's in bf16 are off by 6e-3 with 2 query heads a key head, and by 1e-2 with 4.
TORCH_GRADIENT_ERROR = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
# Products of q_len x kv_len x head_dim, of which half is causal.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
# batch, query heads, kv heads, tokens and head_dim: a layer of the demo in training, and a larger.
DEMO, LARGE = (2, 4, 2, 2304, 64), (1, Q_HEADS, KV_HEADS, 4096, HEAD_DIM)


def _name(what: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    batch, heads, _, tokens, head_dim = shape
    kind = "bf16" if dtype is torch.bfloat16 else "fp32"
    return f"{what}, {batch} x {tokens} tokens, {heads} heads of {head_dim}, {kind}"


def _case(what: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    batch, q_heads, kv_heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        """As a model's projection leaves it: heads of a token next to each other."""
        x = torch.randn(batch, tokens, heads, head_dim, generator=generator)
        return x.to(dtype).transpose(1, 2)

    inputs, d_out = [normal(heads) for heads in (q_heads, kv_heads, kv_heads)], normal(q_heads)

    def of_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kvcore.dense_attention(q, k, v, causal=True)[0]

    backward = what == "backward"
    sizes = dict(
        zip(("batch", "q_heads", "kv_heads", "num_tokens", "head_dim"), shape, strict=True)
    )
    case = Case(_name(what, shape, dtype), sizes, {})

    def prepared(function: Callable, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """What is timed: the function, or the backward of what it returned."""
        if not backward:
            return lambda: [function(*tensors)]
        leaves = [x.detach().requires_grad_() for x in tensors]
        with torch.enable_grad():
            out = function(*leaves)
        gradient = d_out.to(out.dtype)
        return lambda: list(torch.autograd.grad(out, leaves, gradient, retain_graph=True))

    expected = prepared(of_torch, [x.float() for x in inputs])()
    bounds = {TORCH: TORCH_GRADIENT_ERROR, "kvcore": MAX_GRADIENT_ERROR} if backward else {}
    for name, function in ((TORCH, of_torch), ("kvcore", ours)):
        bound = bounds.get(name, MAX_ERROR)[dtype]
        run = prepared(function, inputs)
        error = max(_relative_error(a, e) for a, e in zip(run(), expected, strict=True))
        ceiling = "bf16 matmul" if dtype is torch.bfloat16 else "fp32 matmul"
        case.variants[name] = Variant(run, 0, _checked(name, error, bound), ceiling)
    products = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
    case.operations = products * batch * q_heads * tokens**2 * head_dim
    return case


def dense(quick: bool, device: torch.device) -> Iterator[Callable[[], Case]]:
    """Cases of the dense family, which is of CPUs."""
    if device.type != "cpu":
        return
    for shape in (DEMO,) if quick else (DEMO, LARGE):
        for dtype in (torch.bfloat16, torch.float32):
            for what in ("forward", "backward"):
                yield Planned(
                    _name(what, shape, dtype),
                    lambda what=what, shape=shape, dtype=dtype: _case(what, shape, dtype),
                )
