"""Caches of a model with a sliding window in some layers: those stay what they are, the others are
compressed."""

import pytest
import torch

import hf_models
import kvcore.hf
from cache_tools import held_storages
from hf_models import SLIDING, WINDOW, check_logits, each_cache, model, prompt, stepwise_logits

pytestmark = pytest.mark.usefixtures("restored_models")

KINDS = {"TurboCache": "TurboLayer", "LexicoCache": "LexicoLayer"}


@each_cache
@pytest.mark.parametrize("implementation", ["kvcore", "sdpa"])
@pytest.mark.parametrize("steps", [[100, 1, 1, 30, 18], [20, *[1] * 40, 90]])
def test_steps_over_a_window(make_cache, implementation, steps):
    kvcore.hf.enable(model(SLIDING)).set_attn_implementation(implementation)
    cache = make_cache(SLIDING)
    compressed = KINDS[type(cache).__name__]
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", compressed]
    ids, mask = prompt(2, 150, (0, 17))
    check_logits(SLIDING, stepwise_logits(SLIDING, cache, ids, mask, steps), ids, mask)
    assert kvcore.hf.fallback_reasons() == {}
    assert cache.layers[0].keys.shape[2] == WINDOW - 1
    report = cache.memory_report()
    shared = report.get("dictionary_bytes", 0)
    # Its window is a view of the keys that attention was given.
    window_bytes = sum(x.untyped_storage().nbytes() for x in (
        cache.layers[0].keys, cache.layers[0].values))  # fmt: skip
    assert report["layers"][0]["nbytes"] == window_bytes
    assert abs(report["nbytes"] - (held_storages(cache) - shared)) <= 0.01 * report["nbytes"]


@each_cache
def test_sequences_are_chosen_in_both_kinds_of_layers(make_cache):
    kvcore.hf.enable(model(SLIDING))
    ids, mask = prompt(2, 90, (0, 5))
    cache = make_cache(SLIDING)
    stepwise_logits(SLIDING, cache, ids, mask, [90])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    cache.reorder_cache(torch.tensor([0, 2, 1]))
    rows = [1, 0, 0]
    more, _ = prompt(3, 20, seed=3)
    ids, mask = torch.cat([ids[rows], more], 1), torch.cat([mask[rows], torch.ones_like(more)], 1)
    with torch.no_grad():
        logits = model(SLIDING)(more, attention_mask=mask, past_key_values=cache).logits
    check_logits(SLIDING, logits, ids, mask, begin=90)


@each_cache
def test_files_have_both_kinds_of_layers(make_cache, tmp_path):
    net = kvcore.hf.enable(model(SLIDING))
    ids, mask = prompt(2, 110, (0, 5))
    cache = make_cache(SLIDING)
    stepwise_logits(SLIDING, cache, ids[:, :90], mask, [90])
    cache.save(tmp_path / "cache")
    config = hf_models.config(SLIDING)
    more = (hf_models.dictionaries(SLIDING),) if "Lexico" in type(cache).__name__ else ()
    other = type(cache).load(tmp_path / "cache", config, *more)
    with torch.no_grad():
        for begin, end in ((90, 91), (91, 110)):
            arguments = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
            expected = net(**arguments, past_key_values=cache).logits
            assert torch.equal(net(**arguments, past_key_values=other).logits, expected)


@each_cache
def test_generation(make_cache):
    net = kvcore.hf.enable(model(SLIDING))
    ids, mask = prompt(2, 60, (0, 5))
    arguments = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    out = net.generate(ids, attention_mask=mask, past_key_values=make_cache(SLIDING), **arguments)
    full = torch.cat([mask, mask.new_ones(2, 20)], 1)
    logits = hf_models.full_logits(SLIDING, out, full)[:, 59:-1]
    chosen = logits.gather(2, out[:, 60:, None])[..., 0]
    # Between two logits that err by at most 0.084, as in test_hf_generate.
    assert (logits.amax(-1) - chosen).max() < 0.17
    assert kvcore.hf.fallback_reasons() == {}
