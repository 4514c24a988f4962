"""LexicoCache with dictionaries that grow with what they code."""

import copy
import functools

import pytest
import torch

import cache_tools
from cache_tools import Module, random_kv, stored
from compare import relative_l2
from hf_models import dictionaries
from kvcore.hf.attention import exact_attention, kvcore_attention

pytestmark = pytest.mark.usefixtures("restored_models")

BLOCK = 4096


lexico_layer = functools.partial(cache_tools.lexico_layer, k_sparsity=4, v_sparsity=6)


def adaptive_layer(room=40, **settings):
    sizes = {"k_sparsity": 2, "v_sparsity": 3, "k_tolerance": 0.5, "v_tolerance": 0.6}
    return lexico_layer(**{**sizes, "adaptive_bytes": 4 * 64 * room, **settings})


def test_vectors_that_no_code_comes_near_to_become_atoms(generator):
    layer, plain = adaptive_layer(400), adaptive_layer(0)
    k, v = random_kv(generator, 1, 150)
    errors = []
    for each in (layer, plain):
        each.update(k, v)
        held = stored(each)[:, :, :, :130]
        exact = torch.stack([k, v])[:, :, :, :130]
        errors.append(((held - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten(1).amax(1))
    # One pair, but for the rounding of its coefficient's scale.
    assert errors[0][0] < 0.51
    assert errors[0][1] < 0.61
    assert (errors[1] > 0.62).all()
    assert 96 < layer.report()["atoms"][0] <= 96 + 2 * 130
    assert plain.report()["atoms"] == [96, 80]
    # The model's own dictionaries are left alone.
    assert dictionaries("llama").atoms()[0] == (96, 80)
    assert layer.nbytes() - plain.nbytes() >= 2 * 4 * 64 * 400
    assert layer.report()["session"] == 4 * 64 * (96 + 80 + 800)


def test_growth_ends_at_the_limit(generator):
    layer = adaptive_layer(7, k_tolerance=0.0)
    size = None
    for _ in range(4):
        layer.update(*random_kv(generator, 1, 100))
        assert layer.report()["atoms"] == [96, 87]
        assert size in (None, layer.report()["session"])
        size = layer.report()["session"]


@pytest.mark.parametrize("tokens", [200, BLOCK + 100])
def test_attention_over_atoms_of_its_own(generator, tokens):
    """Some are added after a block was sealed, by steps, and after a crop."""
    layer = adaptive_layer(6000)
    layer.update(*random_kv(generator, 1, tokens, heads=1))
    before = layer.report()["atoms"]
    for step in (60, *[1] * 40):
        keys, values = layer.update(*random_kv(generator, 1, step, heads=1))
    layer.crop(-70)
    keys, values = layer.update(*random_kv(generator, 1, 1, heads=1))
    assert layer.report()["atoms"][0] > before[0]
    query = torch.randn(1, 2, 1, 64, generator=generator)
    out, _ = kvcore_attention(Module(), query, keys, values, None)
    expected, _ = exact_attention(query, keys.clone(), values.clone(), None, scaling=None)
    assert relative_l2(out, expected) < 1e-5


def test_copies_grow_apart(generator):
    layer = adaptive_layer(2000)
    layer.update(*random_kv(generator, 1, 100))
    twin = copy.deepcopy(layer)
    before = stored(twin)
    layer.update(*random_kv(generator, 1, 100))
    twin.update(*random_kv(generator, 1, 100))
    held = stored(layer)
    twin.update(*random_kv(generator, 1, 100))
    assert torch.equal(stored(layer), held)
    assert torch.equal(stored(twin)[:, :, :, :80], before[:, :, :, :80])


def test_copies_made_in_inference_mode_go_on_anywhere(generator):
    layer = adaptive_layer(900)
    layer.update(*random_kv(generator, 2, 100))
    with torch.inference_mode():
        twin = copy.deepcopy(layer)
        twin.update(*random_kv(torch.Generator().manual_seed(1), 2, 1))
        again = copy.deepcopy(twin)
    layer.update(*random_kv(torch.Generator().manual_seed(1), 2, 1))
    for step in (1, 60, 1):
        k, v = random_kv(generator, 2, step)
        for each in (layer, twin, again):
            each.update(k, v)
    assert torch.equal(stored(twin), stored(layer))
    assert torch.equal(stored(again), stored(layer))
