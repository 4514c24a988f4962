"""Hugging Face caches that keep K and V compressed. transformers is imported on first use."""

from __future__ import annotations

from kvcore.cache.lazy import attributes

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

__getattr__, __dir__ = attributes(__name__, _HOMES)
