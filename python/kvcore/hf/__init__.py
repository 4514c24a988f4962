"""Hugging Face models that attend over kvcore's caches. transformers is imported on first use."""

from __future__ import annotations

import importlib

_HOMES = {
    "clear_fallback_reasons": "kvcore.cache.reasons",
    "disable": "kvcore.hf.plug",
    "enable": "kvcore.hf.plug",
    "fallback_reasons": "kvcore.cache.reasons",
    "is_enabled": "kvcore.hf.plug",
}
__all__ = ["clear_fallback_reasons", "disable", "enable", "fallback_reasons", "is_enabled"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kvcore.hf' has no attribute '{name}'")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            f"kvcore.hf.{name} needs transformers >= 5.0, which is not installed; "
            "run `pip install 'transformers>=5.0'`"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
