"""Padded batches: what is counted, what fails as a whole, and keys that do not belong together."""

import contextlib

import numpy as np
import pytest
import torch

import kvcore.hf
from cache_tools import FailingAllocation, Module, each_fine_layer, each_layer, random_kv
from compare import relative_l2
from kvcore.cache import TurboSettings
from kvcore.cache.layer import CompressedLayer
from kvcore.cache.padding import PaddingTracker
from kvcore.cache.report import report
from kvcore.cache.static_layer import StaticTurboLayer
from kvcore.hf.attention import exact_attention, kvcore_attention

PADDING = [0, 10, 80]


@pytest.fixture(autouse=True)
def clean():
    kvcore.hf.clear_fallback_reasons()


def mask(tokens):
    return (torch.arange(tokens) >= torch.tensor(PADDING)[:, None]).long()


def padded(layer: CompressedLayer, tokens=100, seed=0) -> CompressedLayer:
    """The layer after a prompt whose sequences begin with padding."""
    layer.tracker.announce(mask(tokens), native=True)
    layer.update(*random_kv(torch.Generator().manual_seed(seed), 3, tokens))
    return layer


def static_layer():
    return StaticTurboLayer(TurboSettings(), PaddingTracker(), max_cache_len=192)


@each_layer
@pytest.mark.parametrize("tokens", [40, 100])
def test_padding_is_no_element(make_layer, tokens):
    layer = make_layer()
    layer.tracker.announce(mask(tokens), native=True)
    layer.update(*random_kv(torch.Generator().manual_seed(0), 3, tokens))
    found = report([layer])
    lens = np.maximum(tokens - np.array(PADDING), 0).tolist()
    assert found["layers"][0]["tokens"] == lens
    assert found["elements"] == 2 * sum(lens) * 2 * 64
    assert found["bits_per_element"] == 8 * found["kv_bytes"] / found["elements"]


def test_a_first_update_of_fixed_capacity_fails_as_a_whole():
    """Short sequences are stored after the long ones, so half of it may be done."""
    expected = [x.clone() for x in padded(static_layer()).tensors()["tail"]]
    fails_at = 0
    while True:
        layer = static_layer()
        layer.tracker.announce(mask(100), native=True)
        kv = random_kv(torch.Generator().manual_seed(0), 3, 100)
        with contextlib.suppress(torch.OutOfMemoryError), FailingAllocation(fails_at) as mode:
            layer.update(*kv)
        if mode.calls <= fails_at:
            break
        fails_at += 1
        assert int(layer.get_seq_length()) == 0
        if layer.store is not None:
            assert not layer.store.seq_lens.any()
            assert not layer.store.clamp_count.any()
        for tensor, want in zip(padded(layer).tensors()["tail"], expected, strict=True):
            assert torch.equal(tensor, want)
    assert fails_at > 10


@each_fine_layer
def test_a_padded_store_without_a_mask_falls_back(make_layer):
    """No mask shows every token; what the padding was, the store does not have: it reads as 0."""
    layer = padded(make_layer())
    generator = torch.Generator().manual_seed(1)
    keys, values = layer.update(*random_kv(generator, 3, 1))
    query = torch.randn(3, 4, 1, 64, generator=generator)
    with pytest.warns(RuntimeWarning, match="no mask: sequences are padded"):
        out, _ = kvcore_attention(Module(), query, keys, values, None)
    expected, _ = exact_attention(query, keys.clone(), values.clone(), None, scaling=None)
    assert relative_l2(out, expected) < 1e-5
    assert kvcore.hf.fallback_reasons() == {"no mask": 1}


@each_fine_layer
@pytest.mark.parametrize("lazy", [True, False])
def test_values_of_another_cache_are_read(make_layer, lazy):
    generator = torch.Generator().manual_seed(1)
    views = []
    for seed in range(2):
        layer = make_layer()
        layer.update(*random_kv(torch.Generator().manual_seed(seed), 2, 100))
        views.append(layer.update(*random_kv(generator, 2, 1)))
    keys, values = views[0][0], views[1][1]
    query = torch.randn(2, 4, 1, 64, generator=generator)
    with pytest.warns(RuntimeWarning, match="foreign keys"):
        out, _ = kvcore_attention(Module(), query, keys, values if lazy else values.clone(), None)
    expected, _ = exact_attention(query, keys.clone(), values.clone(), None, scaling=None)
    assert relative_l2(out, expected) < 1e-5
