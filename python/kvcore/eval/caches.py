"""The caches that commands compare: how one is named, made, and attended with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from kvcore.cache.lexico_settings import LexicoSettings
from kvcore.cache.settings import TurboSettings

KINDS = ("full", "turbo", "lexico")
_TURBO = ("k_bits", "v_bits", "sink_pages", "low_bit_heads", "balance", "subtract_mean")
_LEXICO = (
    "k_sparsity",
    "v_sparsity",
    "k_tolerance",
    "v_tolerance",
    "buffer_tokens",
    "encode_tokens",
)


@functools.lru_cache(maxsize=4)
def load_dictionaries(path: str) -> Any:
    """Those of a file, or of the folder it is in; read once. ValueError if there are none."""
    from kvcore.cache import Dictionaries

    try:
        return Dictionaries.load(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"dictionaries: there are none in {path}; `kvcore train-dictionary` makes them"
        ) from error


@dataclasses.dataclass(frozen=True)
class CacheChoice:
    """A kind of cache and its settings: `kvcore.cache.TurboCache`'s or `LexicoCache`'s.

    A tuple of widths has one for each layer of the model. Raises ValueError as the caches do.
    """

    kind: str = "turbo"
    k_bits: int | tuple[int, ...] = 4
    v_bits: int | tuple[int, ...] = 4
    sink_pages: int = 1
    low_bit_heads: float = 0.0
    balance: bool = True
    subtract_mean: bool = True
    # Of the file or its folder; None: beside the model's weights.
    dictionaries: str | None = None
    k_sparsity: int | None = None  # None: that of the dictionaries' training
    v_sparsity: int | None = None
    k_tolerance: float = 0.0
    v_tolerance: float = 0.0
    buffer_tokens: int = 128
    encode_tokens: int = 32
    evicts = False  # every token is kept

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cache must be one of {list(KINDS)}, got {self.kind!r}")
        coded = self._settings(_LEXICO)
        for name in ("k_sparsity", "v_sparsity"):
            coded[name] = 1 if coded[name] is None else coded[name]
        LexicoSettings(**coded)
        settings = self._settings(_TURBO)
        for name in ("k_bits", "v_bits"):
            bits = settings[name]
            for width in bits if isinstance(bits, tuple) else (bits,):
                TurboSettings(**{**settings, "k_bits": 4, "v_bits": 4, name: width})

    def _settings(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    @property
    def label(self) -> str:
        """Short name for tables: ``full``, ``8 bit``, ``K4V2``, ``by layer``, ``12+6 atoms``."""
        if self.kind == "full":
            return "full"
        if self.kind == "lexico":
            if self.k_sparsity is None or self.v_sparsity is None:
                return "lexico"
            return f"{self.k_sparsity}+{self.v_sparsity} atoms"
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
        from kvcore.cache import LexicoCache, TurboCache

        if self.kind == "lexico":
            dictionaries = load_dictionaries(self.dictionaries or model.name_or_path)
            return LexicoCache(model.config, dictionaries, **self._settings(_LEXICO))
        return TurboCache(model.config, **self._settings(_TURBO))

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
    # Keys take more: errors of scores are multiplied by the exponential, those of values averaged.
    # Of about as many bytes as K4V2 and 2 bit, with a buffer to go with a context this short.
    CacheChoice("lexico", k_sparsity=11, v_sparsity=5, buffer_tokens=48, encode_tokens=16),
    CacheChoice("lexico", k_sparsity=7, v_sparsity=4, buffer_tokens=48, encode_tokens=16),
)
