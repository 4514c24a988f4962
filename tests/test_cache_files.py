"""TurboCache.save and load: what was saved comes back, to the bit."""

import functools

import pytest
import torch
from transformers import MistralConfig

import hf_models
from cache_files import check_decoding_continues, filled, load
from cache_tools import FailingAllocation, random_kv
from hf_models import NAMES
from kvcore.cache import TurboCache


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("tokens", [40, 150])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_continues_bitwise(tmp_path, name, tokens, static):
    arguments = {"low_bit_heads": 0.5, "k_bits": [8, 4], "v_bits": 2}
    arguments |= {"max_cache_len": 300} if static else {}
    cache = TurboCache(hf_models.config(name), **arguments)
    again = functools.partial(load, max_cache_len=arguments.get("max_cache_len"))
    other = check_decoding_continues(tmp_path / "cache", name, tokens, cache, again)
    assert type(other.turbo_layers()[0]) is type(cache.turbo_layers()[0])
    assert other.memory_report()["clamped"] == cache.memory_report()["clamped"]


def test_beams_stay_shared_and_spare_room_is_left_out(tmp_path, generator):
    cache = filled(tokens=400)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 0, 2, 2, 4, 4]))
    for i in range(2):
        cache.update(*random_kv(generator, 6, 70), i)
    cache.save(tmp_path / "cache")
    other = load(tmp_path / "cache")
    for old, new in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(old.keys.clone(), new.keys.clone())
        assert torch.equal(old.values.clone(), new.values.clone())
        old.store.collect()
        for bits in (8, 4, 2):
            assert new.store.pool.num_used(bits) == old.store.pool.num_used(bits)
            assert new.store.pool.num_free(bits) == 0
    k, v = random_kv(generator, 6, 200)
    for each in (cache, other):
        each.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
        each.crop(-100)
        each.update(k, v, 0)
    assert torch.equal(cache.layers[0].keys.clone(), other.layers[0].keys.clone())


@pytest.mark.parametrize("tokens", [0, 5])
def test_empty_and_exact_layers(tmp_path, generator, tokens):
    name = NAMES[-1]
    cache = TurboCache(hf_models.config(name))
    if tokens:
        cache.update(*random_kv(generator, 2, tokens, dtype=torch.bfloat16), 1)
    cache.save(tmp_path / "cache")
    other = load(tmp_path / "cache", name)
    assert other.get_seq_length(1) == tokens
    k, v = random_kv(generator, 2, 80, dtype=torch.bfloat16)
    for each in (cache, other):
        each.update(k, v, 1)
        each.update(k, v, 1)
    assert torch.equal(cache.layers[1].keys.clone(), other.layers[1].keys.clone())


def test_a_cache_that_was_cropped_to_nothing_keeps_its_calibration(tmp_path, generator):
    cache = filled()
    cache.crop(-1000)
    cache.save(tmp_path / "cache")
    other = load(tmp_path / "cache")
    k, v = random_kv(generator, 3, 20)
    for each in (cache, other):
        each.update(k, v, 0)
    assert torch.equal(cache.layers[0].keys.clone(), other.layers[0].keys.clone())
    assert torch.equal(cache.layers[0].store.k_mean, other.layers[0].store.k_mean)


def test_sliding_and_unsupported_layers(tmp_path, generator):
    config = MistralConfig(num_hidden_layers=1, head_dim=64, sliding_window=16)
    cache = TurboCache(config)
    cache.update(*random_kv(generator, 2, 40), 0)
    cache.save(tmp_path / "sliding")
    other = TurboCache.load(tmp_path / "sliding", config)
    assert other.get_seq_length() == 40
    k, v = random_kv(generator, 2, 1)
    keys = [each.update(k, v, 0)[0] for each in (cache, other)]
    assert torch.equal(*keys)
    with pytest.warns(RuntimeWarning, match="head_dim"):
        cache = TurboCache(hf_models.config("llama", head_dim=32))
    cache.update(*random_kv(generator, 2, 100, head_dim=32), 0)
    cache.save(tmp_path / "plain")
    other = TurboCache.load(tmp_path / "plain", hf_models.config("llama", head_dim=32))
    assert torch.equal(other.layers[0].keys, cache.layers[0].keys)


def test_saving_fails_as_a_whole(tmp_path):
    cache = filled()
    (tmp_path / "cache").write_bytes(b"what was there")
    with pytest.raises(torch.OutOfMemoryError), FailingAllocation(3):
        cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(OSError, match="cannot be written"):
        cache.save(tmp_path / "none" / "cache")
