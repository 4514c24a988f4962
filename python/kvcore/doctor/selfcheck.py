"""Does this build compute right? Each op on small inputs, compared with its reference."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kvcore
from kvcore.doctor import selfcheck_dense, selfcheck_gdn, selfcheck_lexico
from kvcore.doctor.mismatch import Mismatch, close, equal
from kvcore.reference import turbo as reference

_HEAD_DIMS = (64, 128)
_SHAPE = {"batch": 2, "q_heads": 4, "kv_heads": 2, "tokens": 150, "padding": 20}


@dataclasses.dataclass(frozen=True)
class Check:
    """What came of one op on one device: ``ok``, ``failed`` or ``missing`` (no kernel there)."""

    op: str
    device: str
    status: str
    detail: str
    seconds: float


class _Case:
    """Inputs of one head_dim, and the reference's calibration and store of them."""

    def __init__(self, head_dim: int, device: str) -> None:
        generator = torch.Generator().manual_seed(head_dim)
        batch, tokens = _SHAPE["batch"], _SHAPE["tokens"]

        def random(heads: int, length: int) -> Tensor:
            return torch.randn(batch, heads, length, head_dim, generator=generator)

        self.device = device
        self.q = random(_SHAPE["q_heads"], tokens)
        self.k, self.v = random(_SHAPE["kv_heads"], tokens), random(_SHAPE["kv_heads"], tokens)
        self.k[..., 3] = 8 * self.k[..., 3] + 20  # what the calibration is for
        self.padding = torch.tensor([0, _SHAPE["padding"]], dtype=torch.int32)
        self.calibration = reference.turbo_calibrate(self.k, self.padding)
        *pools, table, tail, tail_scale, clamped, lens = reference.turbo_quantize(
            self.k, self.v, *self.calibration, self.padding, k_bits=[4, 8], v_bits=[2, 4]
        )
        self.pool = [pool for pool in pools if len(pool)]
        self.table, self.tail, self.lens = table, tail, lens
        self.tail_scale, self.clamped = tail_scale, clamped

    def store(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Fresh copies of (pool, block_table, tail, seq_lens)."""
        pool = [slab.clone() for slab in self.pool]
        return pool, self.table.clone(), self.tail.clone(), self.lens.clone()

    def on(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.device) for tensor in tensors]

    def store_on(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        pool, *rest = self.store()
        return (self.on(*pool), *self.on(*rest))


def _attention(case: _Case) -> str:
    inputs = (case.q, case.k, case.v, *case.calibration)
    actual = kvcore.turbo_attention(*case.on(*inputs), causal=True)
    return f"cosine {close(actual, reference.turbo_attention(*inputs, causal=True)):.7f}"


def _calibrate(case: _Case) -> str:
    actual = kvcore.turbo_calibrate(*case.on(case.k, case.padding))
    for name, a, e in zip(("k_balance", "k_mean"), actual, case.calibration, strict=True):
        equal(a, e, name)
    return "bit-exact"


def _head_priority(case: _Case) -> str:
    actual = kvcore.turbo_head_priority(*case.on(case.k, case.padding)).cpu()
    expected = reference.turbo_head_priority(case.k, case.padding)
    worst = ((actual - expected) / expected).abs().max().item()
    if not worst <= 1e-5:
        raise Mismatch(f"priority is off by {worst:.1e} relative, more than 1e-5")
    return f"relative difference {worst:.0e}"


def _quantize(case: _Case) -> str:
    arguments = (case.k, case.v, *case.calibration, case.padding)
    bits = {"k_bits": [4, 8], "v_bits": [2, 4]}
    actual = kvcore.turbo_quantize(*case.on(*arguments), **bits)
    expected = reference.turbo_quantize(*arguments, **bits)
    names = ["pool8", "pool4", "pool2", "block_table"]
    names += ["tail", "tail_scale", "clamp_count", "seq_lens"]
    for name, a, e in zip(names, actual, expected, strict=True):
        equal(a, e, name)
    return "bit-exact"


def _append(case: _Case) -> str:
    new = (case.k[:, :, :30], case.v[:, :, :30])
    results = []
    for function, on_device in ((kvcore.turbo_append, True), (reference.turbo_append, False)):
        pool, table, tail, lens = case.store_on() if on_device else case.store()
        counts = (case.tail_scale.clone(), case.clamped.clone())
        # One more page of every head, filled by the new tokens, in a slab of its own.
        entries = torch.arange(table[..., 0].numel(), dtype=torch.int32).view(table.shape[:3])
        table = torch.cat([table.cpu(), entries[..., None] + (len(pool) << 21)], -1)
        pool.append(torch.zeros(entries.numel(), case.tail.shape[-1], dtype=torch.uint8))
        state = (tail, *counts, lens)
        extra = (*new, *case.calibration)
        if on_device:
            pool[-1], table = case.on(pool[-1], table)
            state, extra = case.on(*state), case.on(*extra)
        function(*extra[:2], pool, table, *state, *extra[2:])
        results.append((*pool, *state))
    for i, (a, e) in enumerate(zip(*results, strict=True)):
        slabs = len(case.pool) + 1
        names = ("tail", "tail_scale", "clamp_count", "seq_lens")
        equal(a, e, f"pool[{i}]" if i < slabs else names[i - slabs])
    return "bit-exact"


def _rewind(case: _Case) -> str:
    pool, table, tail, lens = case.store_on()
    new_lens = torch.tensor([100, 30], dtype=torch.int32)
    kvcore.turbo_rewind(pool, table, tail, lens, *case.on(new_lens))
    expected = case.store()
    reference.turbo_rewind(*expected, new_lens)
    equal(tail, expected[2], "tail")
    equal(lens, expected[3], "seq_lens")
    return "bit-exact"


def _dequantize(case: _Case) -> str:
    actual = kvcore.turbo_dequantize(*case.store_on(), *case.on(*case.calibration), kv_len=160)
    expected = reference.turbo_dequantize(*case.store(), *case.calibration, kv_len=160)
    worst = max((a.cpu() - e).abs().max().item() for a, e in zip(actual, expected, strict=True))
    if not worst <= 1e-4:
        raise Mismatch(f"values are off by {worst:.1e}, more than 1e-4")
    return f"difference {worst:.0e}"


def _decode(case: _Case) -> str:
    q = case.q[:, :, -5:]
    actual = kvcore.turbo_decode(*case.on(q), *case.store_on(), *case.on(*case.calibration))
    expected = reference.turbo_decode(q, *case.store(), *case.calibration)
    return f"cosine {close(actual, expected):.7f}"


@functools.cache
def _case(head_dim: int, device: str) -> _Case:
    # Checks copy what they change, and the reference takes longer than most ops.
    return _Case(head_dim, device)


CHECKS: dict[str, Callable[[_Case], str]] = {
    "turbo_attention": _attention,
    "turbo_calibrate": _calibrate,
    "turbo_head_priority": _head_priority,
    "turbo_quantize": _quantize,
    "turbo_append": _append,
    "turbo_rewind": _rewind,
    "turbo_dequantize": _dequantize,
    "turbo_decode": _decode,
    **{
        op: lambda case, check=check: check(case.q.shape[-1], case.device)
        for checks in (selfcheck_lexico.CHECKS, selfcheck_gdn.CHECKS, selfcheck_dense.CHECKS)
        for op, check in checks.items()
    },
}


def has_kernel(op: str, device: str) -> bool:
    """Whether op ``kvcore::<op>`` computes on tensors of this device type."""
    if torch.device(device).type != "cpu" and op in selfcheck_dense.CPU_ONLY:
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}[torch.device(device).type]
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kvcore::{op}", key)


def op_names() -> list[str]:
    """The public ops: the wrappers that `kvcore` exports and that have a schema."""
    return [
        name
        for name in kvcore.__all__
        if inspect.isfunction(getattr(kvcore, name)) and hasattr(torch.ops.kvcore, name)
    ]


def check_op(op: str, device: str) -> Check:
    """Compares one op with its reference on one device; never raises for what the op does."""
    if not has_kernel(op, device):
        return Check(op, device, "missing", f"no {device} kernel is registered", 0.0)
    if op not in CHECKS:
        return Check(op, device, "missing", "has no self-check", 0.0)
    start = time.perf_counter()
    try:
        details = [CHECKS[op](_case(head_dim, device)) for head_dim in _HEAD_DIMS]
        status, detail = "ok", details[-1]
    except Mismatch as error:
        status, detail = "failed", str(error)
    except Exception as error:  # a broken op may raise anything, and the other ops still matter
        status, detail = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    return Check(op, device, status, detail, time.perf_counter() - start)


def run(devices: tuple[str, ...]) -> Iterator[Check]:
    """Every op on every device, in turn."""
    for device in devices:
        for op in op_names():
            yield check_op(op, device)
