"""Hugging Face models that attend over kvcore's caches. transformers is imported on first use."""

from __future__ import annotations

from kvcore.cache.lazy import attributes

_HOMES = {
    "clear_fallback_reasons": "kvcore.cache.reasons",
    "disable": "kvcore.hf.plug",
    "enable": "kvcore.hf.plug",
    "fallback_reasons": "kvcore.cache.reasons",
    "is_enabled": "kvcore.hf.plug",
}
__all__ = ["clear_fallback_reasons", "disable", "enable", "fallback_reasons", "is_enabled"]

__getattr__, __dir__ = attributes(__name__, _HOMES)
