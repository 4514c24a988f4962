"""kvcore: attention over a compressed KV cache, as PyTorch ops.

Importing loads the native libraries and registers the ops; it never compiles, downloads or warns.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

from kvcore import _native

_native.load()

_SUBMODULES = ("cache", "demo", "eval", "hf", "ops", "reference")


def _wrappers() -> dict[str, object]:
    try:
        ops = importlib.import_module("kvcore.ops")
    except ModuleNotFoundError as error:
        if error.name != "kvcore.ops":
            raise
        return {}
    return {name: getattr(ops, name) for name in ops.__all__}


globals().update(_wrappers())
__all__ = ["__version__", *_wrappers()]


def __getattr__(name: str):
    # cache, hf, eval and demo may import transformers: only on first use.
    if name in _SUBMODULES:
        return importlib.import_module(f"kvcore.{name}")
    raise AttributeError(f"module 'kvcore' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
