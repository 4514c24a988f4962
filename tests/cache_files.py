"""What the tests of cache files share: caches to save, and files that were changed."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hf_models
from cache_tools import random_kv
from hf_models import HYBRID_NAMES
from kvcore.cache import TurboCache
from kvcore.cache.safe_file import digest

SAVED = ("llama", *HYBRID_NAMES)


def filled(name="llama", tokens=200, seed=0, **arguments):
    """A cache with random content in every layer, its sequences of different lengths."""
    cache = TurboCache(hf_models.config(name), **arguments)
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(cache.layers):
        if type(layer).__name__ == "LinearAttentionLayer":
            cache.update_conv_state(torch.randn(3, 8, 4, generator=generator), i)
            cache.update_recurrent_state(torch.randn(3, 4, 16, 16, generator=generator), i)
            continue
        mask = torch.ones(3, tokens)
        mask[1, : tokens // 3] = 0
        cache.announce(mask)
        cache.update(*random_kv(generator, 3, tokens), i)
        cache.update(*random_kv(generator, 3, 9), i)
    return cache


def load(path, name="llama", **arguments):
    return TurboCache.load(path, hf_models.config(name), **arguments)


def rewrite(source, target, change, *, sign=True):
    """Writes a changed copy of a file, by default with a digest that is right again."""
    with safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    parts = {name: json.loads(metadata[name]) for name in ("model", "settings", "layers")}
    change(metadata, parts, tensors)
    for name, part in parts.items():
        if name in metadata and part is not None:
            metadata[name] = json.dumps(part)
    if sign:
        metadata["digest"] = digest(metadata, tensors)
    save_file(tensors, target, metadata=metadata)


def save_all(folder):
    """Saves a cache of each kind into a folder: `SAVED`, and `exact`, of too few tokens."""
    filled().save(folder / "llama")
    for name in HYBRID_NAMES:
        filled(name, low_bit_heads=0.5).save(folder / name)
    filled(tokens=20).save(folder / "exact")
    return folder
