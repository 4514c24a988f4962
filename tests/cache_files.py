"""What the tests of cache files share: caches to save, and files that were changed."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hf_models
import kvcore
import kvcore.hf
from cache_tools import random_kv
from hf_models import HYBRID_NAMES, NAMES, dictionaries, lexico_cache, model, prompt
from kvcore.cache import (
    CacheFileError,
    Dictionaries,
    DictionaryFileError,
    LexicoCache,
    TurboCache,
)
from kvcore.cache.safe_file import digest

SAVED = ("llama", *HYBRID_NAMES)


def filled(name="llama", tokens=200, seed=0, *, make=None, dtype=torch.float32, **arguments):
    """A cache with random content in every layer, its sequences of different lengths."""
    cache = make(name, **arguments) if make else TurboCache(hf_models.config(name), **arguments)
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(cache.layers):
        if type(layer).__name__ == "LinearAttentionLayer":
            cache.update_conv_state(torch.randn(3, 8, 4, generator=generator), i)
            cache.update_recurrent_state(torch.randn(3, 4, 16, 16, generator=generator), i)
            continue
        mask = torch.ones(3, tokens)
        mask[1, : tokens // 3] = 0
        cache.announce(mask)
        cache.update(*random_kv(generator, 3, tokens, dtype=dtype), i)
        cache.update(*random_kv(generator, 3, 9, dtype=dtype), i)
    return cache


def load(path, name="llama", **arguments):
    return TurboCache.load(path, hf_models.config(name), **arguments)


def load_lexico(path, name="llama"):
    return LexicoCache.load(path, hf_models.config(name), dictionaries(name))


def check_decoding_continues(path, name, tokens, cache, load):
    """Bitwise, after a cache was saved amid it; the loaded cache."""
    net = kvcore.hf.enable(model(name))
    ids, mask = prompt(3, tokens + 70, (0, 9, 33))
    steps = [(0, tokens), *((t, t + 1) for t in range(tokens, tokens + 70))]

    def step(cache, begin, end):
        return net(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits

    with torch.no_grad():
        for begin, end in steps[:30]:
            step(cache, begin, end)
        cache.save(path)
        other = load(path, name)
        for begin, end in steps[30:]:
            assert torch.equal(step(cache, begin, end), step(other, begin, end))
    kvcore.hf.disable(net)
    return other


def rewrite(source, target, change, *, sign=True, names=("model", "settings", "layers")):
    """Writes a changed copy of a file, by default with a digest that is right again.

    ``change`` gets the metadata, those of ``names`` as objects, which go back into it, and the
    tensors.
    """
    with safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    parts = {name: json.loads(metadata[name]) for name in names}
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


def save_all_lexico(folder):
    """The same of the other cache: `SAVED`, `exact`, of a type without kernels, and `long`."""
    for name in SAVED:
        filled(name, make=lexico_cache, k_sparsity=3, v_sparsity=4).save(folder / name)
    kvcore.hf.clear_fallback_reasons()
    with pytest.warns(RuntimeWarning, match="unsupported dtype"):
        filled(make=lexico_cache, tokens=20, dtype=torch.float64).save(folder / "exact")
    filled(make=lexico_cache, tokens=4200, k_sparsity=1, v_sparsity=2).save(folder / "long")
    return folder


def save_all_dictionaries(folder):
    """Dictionaries of every model."""
    for name in NAMES:
        dictionaries(name).save(folder / name)
    return folder


def load_dictionaries(path, name):
    return Dictionaries.load(path)


def use_cache(cache):
    """Every layer that holds tokens reads as many, and takes more."""
    for layer in cache.compressed_layers():
        if layer.keys is not None:
            assert layer.keys.clone().shape[2] == int(layer.get_seq_length())
            batch, dtype = layer.batch_size, layer.dtype
            more = torch.zeros(batch, 2, 70, 64, dtype=dtype)
            layer.update(more, more)


def use_dictionaries(loaded):
    for layer in loaded.layers:
        for atoms in loaded[layer]:
            x = torch.ones(1, 1, 3, loaded.head_dim)
            kvcore.lexico_encode(x, atoms, sparsity=loaded.sparsity)


@dataclasses.dataclass(frozen=True)
class FileFamily:
    """Files of one kind."""

    save_all: Callable  # into a folder
    load: Callable  # a file, of a model
    names: tuple[str, ...]  # of the files
    parts: tuple[str, ...]  # of the metadata
    error: type[Exception]
    use: Callable  # whatever a file gave


CACHE_PARTS = ("settings", "model", "layers")
FAMILIES = {
    "turbo": FileFamily(save_all, load, (*SAVED, "exact"), CACHE_PARTS, CacheFileError, use_cache),
    "lexico": FileFamily(
        save_all_lexico,
        load_lexico,
        (*SAVED, "exact", "long"),
        CACHE_PARTS,
        CacheFileError,
        use_cache,
    ),
    "dictionaries": FileFamily(
        save_all_dictionaries,
        load_dictionaries,
        NAMES,
        ("model", "dictionaries", "notes"),
        DictionaryFileError,
        use_dictionaries,
    ),
}


def model_of(file):
    """The model that a file of `save_all` is of."""
    return file if file in NAMES else "llama"


# ---- changes of a file, for `rewrite`


def row(i, **values):
    return lambda metadata, parts, tensors: parts["layers"][i].update(values)


def value(name, change):
    def go(metadata, parts, tensors):
        tensors[name] = change(tensors[name])

    return go


def put(name, index, item):
    def go(metadata, parts, tensors):
        tensors[name][index] = item

    return go


def text(name, content):
    def go(metadata, parts, tensors):
        metadata[name], parts[name] = content, None

    return go


def drop(name):
    return lambda metadata, parts, tensors: tensors.pop(name)
