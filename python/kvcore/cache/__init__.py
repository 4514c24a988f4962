"""Hugging Face caches that keep K and V compressed. transformers is imported on first use."""

from __future__ import annotations

import importlib

_HOMES = {
    "CacheFileError": "kvcore.cache.file_format",
    "Dictionaries": "kvcore.cache.dictionaries",
    "DictionaryFileError": "kvcore.cache.dictionaries",
    "CompressedCache": "kvcore.cache.compressed_cache",
    "LexicoCache": "kvcore.cache.lexico_cache",
    "LexicoLayer": "kvcore.cache.lexico_layer",
    "LexicoSettings": "kvcore.cache.lexico_settings",
    "LexicoStore": "kvcore.cache.lexico_store",
    "TurboCache": "kvcore.cache.turbo_cache",
    "TurboLayer": "kvcore.cache.turbo_layer",
    "TurboSettings": "kvcore.cache.settings",
    "TurboStore": "kvcore.cache.store",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kvcore.cache' has no attribute '{name}'")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            f"kvcore.cache.{name} needs transformers >= 5.0, which is not installed; "
            "run `pip install 'transformers>=5.0'`"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
