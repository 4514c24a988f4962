"""The caches that commands compare: how one is named, made, and attended with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

KINDS = ("full", "turbo")


@dataclasses.dataclass(frozen=True)
class CacheChoice:
    """A kind of cache and its settings; those of ``turbo`` are `kvcore.cache.TurboCache`'s.

    A tuple of widths has one for each layer of the model.
    """

    kind: str = "turbo"
    k_bits: int | tuple[int, ...] = 4
    v_bits: int | tuple[int, ...] = 4
    sink_pages: int = 1
    low_bit_heads: float = 0.0
    balance: bool = True
    subtract_mean: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cache must be one of {list(KINDS)}, got {self.kind!r}")
        for name in ("k_bits", "v_bits"):
            bits = getattr(self, name)
            if any(b not in (8, 4, 2) for b in (bits if isinstance(bits, tuple) else (bits,))):
                raise ValueError(f"{name} must be 8, 4 or 2, got {bits}")
        if self.sink_pages < 0:
            raise ValueError(f"sink_pages must be at least 0, got {self.sink_pages}")
        if not 0 <= self.low_bit_heads <= 1:
            raise ValueError(f"low_bit_heads must lie in [0, 1], got {self.low_bit_heads}")

    @property
    def label(self) -> str:
        """Short name for tables: ``full``, ``8 bit``, ``K4V2``, or ``by layer``."""
        if self.kind == "full":
            return "full"
        if isinstance(self.k_bits, tuple) or isinstance(self.v_bits, tuple):
            return "by layer"
        if self.k_bits == self.v_bits:
            return f"{self.k_bits} bit"
        return f"K{self.k_bits}V{self.v_bits}"

    def make(self, model: Any) -> Any:
        """A new empty cache for `model`."""
        if self.kind == "full":
            from transformers import DynamicCache

            return DynamicCache(config=model.config)
        from kvcore.cache import TurboCache

        settings = dataclasses.asdict(self)
        del settings["kind"]
        return TurboCache(model.config, **settings)

    @contextlib.contextmanager
    def attention(self, model: Any) -> Iterator[None]:
        """Within it, `model` attends with what this cache needs: kvcore's functions, or its own."""
        if self.kind == "full":
            yield
            return
        from kvcore import hf

        hf.enable(model)
        try:
            yield
        finally:
            hf.disable(model)


FULL = CacheChoice("full")
COMPARED = (
    FULL,
    CacheChoice(k_bits=8, v_bits=8),
    CacheChoice(k_bits=4, v_bits=4),
    CacheChoice(k_bits=4, v_bits=2),
    CacheChoice(k_bits=2, v_bits=2),
)
