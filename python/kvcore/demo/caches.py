"""The caches that commands compare: how one is named, made, and attended with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from kvcore.cache.settings import TurboSettings

KINDS = ("full", "turbo")


@dataclasses.dataclass(frozen=True)
class CacheChoice:
    """A kind of cache and its settings; those of ``turbo`` are `kvcore.cache.TurboCache`'s.

    A tuple of widths has one for each layer of the model. Raises ValueError as TurboCache does.
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
        settings = dataclasses.asdict(self)
        del settings["kind"]
        for name in ("k_bits", "v_bits"):
            bits = settings[name]
            for width in bits if isinstance(bits, tuple) else (bits,):
                TurboSettings(**{**settings, "k_bits": 4, "v_bits": 4, name: width})

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
