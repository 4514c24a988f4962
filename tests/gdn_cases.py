"""Inputs, oracles and shapes that the tests of the gated delta rule share."""

import dataclasses
import functools
import itertools

import torch
from torch import Tensor

from cases import BF16, F16, F32, normal
from compare import assert_same_nonfinite, relative_l2
from kvcore.reference import gdn as reference

# Relative L2 against fp64. fp32 inputs are computed in fp32 throughout; bf16 and fp16 inputs are
# exact, so that what differs is the output's own rounding and, for bf16, what is rounded for bf16
# products. Gradients are rounded to the dtype of their inputs.
MAX_ERROR = {F32: 1e-5, F16: 1.5e-3, BF16: 4e-3}
MAX_GRADIENT_ERROR = {F32: 2e-5, F16: 2e-3, BF16: 8e-3}


@dataclasses.dataclass(frozen=True)
class Scan:
    """Sizes and options of a scan."""

    num_tokens: int = 100
    k_dim: int = 64
    v_dim: int = 64
    k_heads: int = 1
    v_heads: int = 2
    batch: int = 1
    dtype: torch.dtype = F32
    lengths: tuple[int, ...] = ()  # of packed sequences
    in_op_gate: bool = False
    normaliser: float = 1.0  # log decays are divided by it
    beta_max: float = 1.0
    correlated: bool = False  # keys that point the same way
    initial: bool = True
    v_first: bool = False

    def __str__(self):
        fields = dataclasses.asdict(self)
        defaults = dataclasses.asdict(Scan())
        changed = {k: v for k, v in fields.items() if v != defaults[k]}
        return "-".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items()) or "-"

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.num_tokens

    @property
    def num_seqs(self) -> int:
        return len(self.lengths) if self.lengths else self.batch

    @property
    def macs(self) -> int:
        """Multiply-adds of the products with the state and within chunks."""
        per_token = 3 * self.k_dim * self.v_dim + 64 * (self.k_dim + self.v_dim)
        batch = 1 if self.lengths else self.batch
        return batch * self.tokens * self.v_heads * per_token

    @property
    def cu_seqlens(self) -> Tensor | None:
        if not self.lengths:
            return None
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    @property
    def options(self) -> dict[str, object]:
        return {
            "qk_l2norm": True,
            "beta_sigmoid": self.in_op_gate,
            "allow_neg_eigval": self.in_op_gate and self.beta_max > 1,
            "state_v_first": self.v_first,
        }


def make_scan(case: Scan, seed: int = 0) -> list[Tensor | None]:
    """q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, as the op takes them.

    Half of the log decays are 0, as where a gate is masked.
    """
    size = (case.batch, case.tokens)
    q = normal(*size, case.k_heads, case.k_dim, seed=seed)
    k = normal(*size, case.k_heads, case.k_dim, seed=seed + 1)
    if case.correlated:
        k = normal(1, 1, case.k_heads, case.k_dim, seed=seed + 2) + 0.2 * k
    v = normal(*size, case.v_heads, case.v_dim, seed=seed + 3)
    raw = normal(*size, case.v_heads, seed=seed + 4)
    beta = normal(*size, case.v_heads, seed=seed + 5)
    state = None
    if case.initial:
        dims = (case.v_dim, case.k_dim) if case.v_first else (case.k_dim, case.v_dim)
        state = normal(case.num_seqs, case.v_heads, *dims, seed=seed + 6)
    q, k, v = (x.to(case.dtype) for x in (q, k, v))
    if case.in_op_gate:
        A_log = normal(case.v_heads, seed=seed + 7).abs()
        dt_bias = normal(case.v_heads, seed=seed + 8)
        return [q, k, v, raw, beta.to(case.dtype), A_log, dt_bias, state, case.cu_seqlens]
    g = torch.nn.functional.logsigmoid(raw) / case.normaliser
    g = g * (normal(*g.shape, seed=seed + 9) > 0)
    beta = (case.beta_max * beta.sigmoid()).to(case.dtype)
    if case.correlated:
        g, beta = 0 * g, (case.beta_max * (1 - 0.2 * beta.sigmoid())).to(case.dtype)
    return [q, k, v, g, beta, None, None, state, case.cu_seqlens]


def doubles(tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


def recurrence(inputs, **options) -> tuple[Tensor, Tensor]:
    """Oracle: the recurrence in fp64, sequence by sequence."""
    q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens = doubles(inputs)
    v_first = options.pop("state_v_first", False)
    options.pop("save_residuals", None)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    num_seqs = q.shape[0] if bounds is None else len(bounds) - 1
    dims = (q.shape[3], v.shape[3])
    if state is None:
        state = torch.zeros(num_seqs, v.shape[2], *dims, dtype=torch.float64)
        state = state.mT.contiguous() if v_first else state
    step = functools.partial(reference.gdn_recurrent_step, state_v_first=v_first, **options)
    if bounds is None:
        return step(q, k, v, g, beta, state, A_log, dt_bias)
    outs, states = [], []
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        tokens = (x[:, a:b] for x in (q, k, v, g, beta))
        if a == b:
            states.append(state[i : i + 1])
            continue
        out, new = step(*tokens, state[i : i + 1], A_log, dt_bias)
        outs.append(out)
        states.append(new)
    return torch.cat([v[:, :0], *outs], 1), torch.cat(states)


def assert_near(actual: Tensor, expected: Tensor, bound: float, name: str) -> None:
    assert_same_nonfinite(actual, expected.to(actual.dtype), name)
    error = relative_l2(actual, expected)
    assert error <= bound, f"{name}: relative L2 must be <= {bound:g}, got {error:.2e}"


# What differs between kernels, one at a time: head dims, heads, types, lengths, layouts, gates.
SCANS = [
    *(Scan(n) for n in (1, 2, 15, 63, 64, 65, 127, 128, 129, 273)),
    *(Scan(70, d, d) for d in (16, 80, 96, 112, 128, 192, 256)),
    *(Scan(70, k, v) for k, v in ((64, 128), (96, 192), (128, 64), (256, 16), (48, 240))),
    *(Scan(100, 32, 32, k, v, 2) for k, v in ((1, 1), (2, 2), (2, 8), (3, 3), (16, 64))),
    *(Scan(130, 128, 128, 1, 2, dtype=t) for t in (F16, BF16)),
    *(Scan(70, 96, 192, 1, 2, dtype=t) for t in (F16, BF16)),
    *(Scan(70, 80, 112, 1, 1, dtype=t, v_first=True) for t in (F32, BF16)),
    *(Scan(150, normaliser=n) for n in (0.01, 0.1, 10.0)),
    *(Scan(150, beta_max=2.0, correlated=True, dtype=t) for t in (F32, BF16)),
    *(Scan(150, in_op_gate=True, beta_max=b, dtype=t) for b, t in ((1, F32), (2, BF16))),
    *(Scan(lengths=n) for n in ((0, 15), (15, 85, 1, 0, 64, 65), (0, 0), (200,))),
    Scan(lengths=(15, 85, 64), v_first=True, in_op_gate=True, dtype=BF16),
    Scan(150, initial=False),
    Scan(130, v_first=True, v_dim=48),
    Scan(0),
    Scan(10, batch=0),
]
# A selection for every ISA level and for the sanitizers.
ISA_SCANS = [
    Scan(1),
    Scan(65, 96, 192, 1, 2, in_op_gate=True, beta_max=2.0),
    Scan(100, 128, 80, 1, 2, dtype=BF16, v_first=True),
    Scan(70, 48, 16, 1, 1, dtype=BF16),
    Scan(30, 48, 16, 2, 2, 2, dtype=F16),
    Scan(lengths=(0, 3, 70), k_dim=256, v_dim=256, k_heads=1, v_heads=1),
]
# The same for the CUDA kernels' source on the host: their instances, packed and copied inputs.
SIMT_SCANS = [
    Scan(5, 16, 16, 1, 1),
    Scan(66, 16, 16, 1, 2, dtype=BF16, in_op_gate=True, beta_max=2.0),
    Scan(3, 144, 16, 1, 1),
    Scan(3, 144, 16, 1, 1, dtype=BF16, v_first=True),
    Scan(lengths=(0, 3, 65), k_dim=32, v_dim=16, k_heads=1, v_heads=1, dtype=F16),
]
