"""Whole models compiled, prompt included: what a graph cannot hold runs outside of it."""

import pytest
import torch

import hf_models
import kvcore.hf
from compare import relative_l2
from hf_models import full_logits, lexico_cache, model, prompt, real, stored_lens
from kvcore.cache import TurboCache

STEPS = (90, 1, 1, 1)


@pytest.fixture(autouse=True)
def enabled():
    kvcore.hf.clear_fallback_reasons()
    torch._dynamo.reset()
    kvcore.hf.enable(model("llama"))
    yield
    kvcore.hf.disable(model("llama"))


def turbo_cache(max_cache_len):
    config = hf_models.config("llama")
    return TurboCache(config, k_bits=8, v_bits=8, max_cache_len=max_cache_len)


@torch.no_grad()
def run(forward, cache, ids, mask, steps=STEPS):
    logits, begin = [], 0
    for step in steps:
        end = begin + step
        out = forward(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(out.logits)
        begin = end
    return torch.cat(logits, 1)


# Only a cache of fixed capacity is allocated early.
@pytest.mark.parametrize(("max_cache_len", "early"), [(None, False), (128, False), (128, True)])
def test_a_compiled_model_reads_what_an_eager_one_does(max_cache_len, early):
    """Left padding is dropped, and a cache that is used again calibrates again."""
    ids, mask = prompt(2, sum(STEPS), (0, 17))
    cache = turbo_cache(max_cache_len)
    if early:
        cache.early_initialization(2, 2, 64, torch.float32, torch.device("cpu"))
    forward = torch.compile(model("llama"), backend="eager", dynamic=False)
    expected = full_logits("llama", ids, mask)
    for _ in range(2):
        logits = run(forward, cache, ids, mask)
        assert relative_l2(real(logits, mask), real(expected, mask)) < 0.015
        store = cache.turbo_layers()[0].synced_store()
        assert store.lens().tolist() == [sum(STEPS), sum(STEPS) - 17]
        assert store.is_calibrated
        eager = run(model("llama"), turbo_cache(max_cache_len), ids, mask)
        assert relative_l2(real(logits, mask), real(eager, mask)) < 1e-3
        cache.reset()
        kvcore.hf.disable(model("llama"))
        kvcore.hf.enable(model("llama"))
    assert kvcore.hf.fallback_reasons() == {}


def test_a_compiled_model_codes_outside_of_its_graphs():
    """A LexicoCache is never inside: the graph breaks in every layer, and the rest is compiled."""
    ids, mask = prompt(2, sum(STEPS), (0, 17))
    cache = lexico_cache("llama")
    forward = torch.compile(model("llama"), backend="eager", dynamic=False)
    logits = run(forward, cache, ids, mask)
    eager = run(model("llama"), lexico_cache("llama"), ids, mask)
    assert relative_l2(real(logits, mask), real(eager, mask)) < 1e-4
    assert stored_lens(cache) == [sum(STEPS), sum(STEPS) - 17]
    assert cache.layers[0].store.codes.num_tokens == 66
    assert kvcore.hf.fallback_reasons() == {}


def test_a_graph_that_must_be_whole_says_what_it_cannot_hold():
    ids, mask = prompt(1, 90)
    forward = torch.compile(model("llama"), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run it eagerly"):
        run(forward, turbo_cache(128), ids, mask, [90])
