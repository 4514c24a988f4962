"""Problems of exact attention, and what is expected of them in fp64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cases import BF16, F16, F32, normal, with_layout
from compare import assert_same_form, relative_l2
from kvcore.reference import dense as reference

# Relative L2 errors: of fp32 arithmetic; of a result rounded to fp16; of one rounded to bf16, to
# which weights are rounded too where products take bf16.
MAX_ERROR = {F32: 1e-6, F16: 4e-4, BF16: 3e-3}
MAX_GRADIENT_ERROR = {F32: 3e-6, F16: 5e-4, BF16: 4e-3}
LSE_ATOL = 4e-6
NAMES = ("dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Problem:
    q_len: int
    kv_len: int
    head_dim: int = 64
    kv_heads: int = 1
    group: int = 1
    batch: int = 1
    dtype: torch.dtype = F32
    causal: bool = True
    layout: str = "contiguous"

    def __str__(self) -> str:
        text = f"q{self.q_len}-kv{self.kv_len}-D{self.head_dim}-b{self.batch}"
        text += f"-h{self.kv_heads * self.group}x{self.kv_heads}"
        text += f"-{str(self.dtype).removeprefix('torch.')}"
        text += "" if self.causal else "-full"
        return text if self.layout == "contiguous" else f"{text}-{self.layout}"

    def make(self) -> list[Tensor]:
        """q, k, v and d_out."""
        q_heads = self.kv_heads * self.group
        sizes = [(q_heads, self.q_len), *[(self.kv_heads, self.kv_len)] * 2, (q_heads, self.q_len)]
        return [
            with_layout(
                normal(self.batch, *size, self.head_dim, seed=seed).to(self.dtype), self.layout
            )
            for seed, size in enumerate(sizes)
        ]


# Tiles of 64 queries and blocks of 128 keys: edges of both, one at a time; then every width of a
# row, grouped heads, and both masks.
EDGES = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 257]
SMALL = [
    Problem(1, 1),
    Problem(17, 33, 16, 1, 2),
    Problem(70, 130, 48, 2, 2, 2),
    Problem(70, 70, 80, dtype=BF16),
    Problem(33, 33, 32, 1, 2, dtype=F16),
    Problem(20, 5, dtype=BF16),  # the first queries see no key
    Problem(65, 140, 144, 1, 1, 1, BF16, False),
]
PROBLEMS = [
    *SMALL,
    *(Problem(n, n) for n in EDGES),
    *(Problem(n, n, dtype=BF16) for n in EDGES),
    # Whole groups of queries and keys, of which the first query misses the last key or none.
    *(Problem(16, n) for n in (142, 143)),
    *(Problem(n, 150, 32, 1, 2, dtype=BF16) for n in (1, 63, 64, 65, 149)),
    *(Problem(150, n, 32, 1, 2) for n in (1, 63, 64, 65, 129, 149)),
    *(Problem(40, 150, dim, dtype=t) for dim in range(16, 257, 16) for t in (F32, BF16)),
    *(Problem(130, 150, 128, 2, group, 2, BF16) for group in (1, 3, 4)),
    *(Problem(100, 300, 96, 1, 2, dtype=t, causal=False) for t in (F32, F16, BF16)),
]


def doubles(tensors):
    return [x if x is None else x.double() for x in tensors]


def expected_of(q, k, v, d_out, **scalars) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the reference, in fp64."""
    q, k, v, d_out = doubles((q, k, v, d_out))
    results = reference.dense_attention(q, k, v, **scalars)
    grads = reference.dense_attention_backward(d_out, q, k, v, *results, **scalars)
    return list(results), list(grads)


def assert_near(actual: Tensor, expected: Tensor, bound: float, name: str) -> None:
    assert_same_form(actual.double(), expected, name)
    assert actual.isfinite().all(), f"{name} is not finite"
    error = relative_l2(actual, expected)
    assert error <= bound, f"{name}: relative L2 error {error:.2e}, above {bound:.0e}"
