"""What a benchmark case is, and how its variants are checked before they are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

# Of one attention layer: all families are shown on the same.
KV_HEADS, Q_HEADS, HEAD_DIM = 8, 32, 128


@dataclasses.dataclass
class Variant:
    """One thing to time.

    ``bytes_read``: of K and V, of the store, or of the states. ``error``: relative L2 against fp32,
    where there is one. ``ceiling``: the machine's limit that it is held against, by default "read"
    if it reads bytes. ``run`` may have a method ``timed`` that does the same and returns seconds:
    what runs in another process times itself.
    """

    run: Callable[[], object]
    bytes_read: int = 0
    error: float | None = None
    ceiling: str | None = None
    units: float = 1.0  # of the case's work in one call; times are divided by it


@dataclasses.dataclass
class Task:
    """What peers in other processes are asked to do.

    ``work`` is a key of ``peers.registry.Peer.offers``, ``arrays`` its inputs by the names that
    adapters know, ``expected`` the result in fp32. ``state_bytes``: of states that are read.
    ``units``: of the case's work, as a variant's. ``threads``: those of torch if None.
    """

    work: str
    arrays: Mapping[str, Tensor]
    expected: Tensor
    state_bytes: int = 0
    units: float = 1.0
    threads: int | None = None


@dataclasses.dataclass
class Case:
    """Variants that do the same work; names that begin with ``kvcore`` are ours.

    ``absent``: variants that could not be timed, and why.
    """

    name: str
    shape: dict[str, int]
    variants: dict[str, Variant]
    operations: int = 0  # of the matrix products, 2 per multiply-add
    cold: bool = True
    task: Task | None = None
    absent: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Planned:
    """A case before it is built, with the name that it will have."""

    name: str
    build: Callable[[], Case]

    def __call__(self) -> Case:
        return self.build()


def _relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.float() - expected).norm() / expected.norm()).item()


def _checked(name: str, error: float, bound: float) -> float:
    if not error <= bound:
        raise SystemExit(f"{name}: relative error {error:.4f} exceeds {bound}; nothing is timed")
    return error


def _num_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
