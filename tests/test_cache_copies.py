"""Caches that are copied to continue one prompt in several ways, and models in inference mode."""

import copy
import functools
import pickle

import pytest
import torch

import hf_models
import kvcore.hf
from hf_models import NAMES, each_cache, lexico_cache, model, prompt, stepwise_logits
from kvcore.cache import TurboCache

TOKENS = 260


@pytest.fixture(autouse=True)
def enabled():
    kvcore.hf.clear_fallback_reasons()
    for name in NAMES:
        kvcore.hf.enable(model(name))
    yield
    for name in NAMES:
        kvcore.hf.disable(model(name))


def default_cache(name, **arguments):
    return TurboCache(hf_models.config(name), **arguments)


def continue_from(cache, ids, mask, begin):
    """Logits of the rest, token by token."""
    with torch.no_grad():
        steps = [
            model("llama")(
                ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache
            ).logits
            for i in range(begin, ids.shape[1])
        ]
    return torch.cat(steps, 1)


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    "make_cache",
    [default_cache, functools.partial(default_cache, max_cache_len=320), lexico_cache],
    ids=["dynamic", "static", "lexico"],
)
def test_copies_continue_alike_and_apart(copied, make_cache):
    ids, mask = prompt(2, TOKENS, (0, 10))
    cache = make_cache("llama")
    # Past the first page that fills step by step: the block table has spare columns by then.
    stepwise_logits("llama", cache, ids[:, :140], mask, [100, *[1] * 40])
    twin, untouched = copied(cache), copied(cache)
    before = [torch.stack([x.clone() for x in pair]) for pair in read(untouched)]
    for each in (cache, twin):
        each.crop(-20)
    expected = continue_from(cache, ids, mask, 120)
    assert torch.equal(continue_from(twin, ids, mask, 120), expected)
    assert kvcore.hf.fallback_reasons() == {}
    for pair, was in zip(read(untouched), before, strict=True):
        assert torch.equal(torch.stack([x.clone() for x in pair]), was)
    continue_from(untouched, ids, mask, 140)


def read(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("make_cache", [default_cache, lexico_cache], ids=["turbo", "lexico"])
@pytest.mark.parametrize("name", NAMES)
def test_inference_mode(name, make_cache):
    ids, mask = prompt(2, TOKENS, (0, 10))
    steps = [100, 30, *[1] * 10, 120]
    expected = stepwise_logits(name, make_cache(name), ids, mask, steps)
    with torch.inference_mode():
        cache = make_cache(name)
        assert torch.equal(stepwise_logits(name, cache, ids, mask, steps), expected)
        generated = model(name).generate(
            ids[:, :100],
            attention_mask=mask[:, :100],
            past_key_values=make_cache(name),
            max_new_tokens=70,
            do_sample=False,
        )
    assert generated.shape == (2, 170)
    assert kvcore.hf.fallback_reasons() == {}


@each_cache
def test_a_mask_that_changes_in_inference_mode_is_looked_at_again(make_cache):
    """Such tensors do not count their changes, so an answer about one holds for one pass."""
    ids, _ = prompt(1, 141)
    with torch.inference_mode():
        cache = make_cache("llama")
        model("llama")(ids[:, :140], past_key_values=cache)
        mask = torch.ones(1, 1, 1, 141, dtype=torch.bool)
        for hidden in (0, 20):
            mask[..., 20 : 20 + hidden] = False
            net = copy.deepcopy(cache)
            out = model("llama")(ids[:, 140:], attention_mask=mask, past_key_values=net).logits
            assert kvcore.hf.fallback_reasons().get("mask", 0) == (2 if hidden else 0)
    assert out.shape == (1, 1, hf_models.VOCAB)
