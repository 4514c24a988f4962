"""Attention functions and layers that are not kvcore's: right, and named where they cost memory."""

import functools

import pytest
import torch
from transformers import FalconH1Config

import kvcore.hf
from cache_tools import each_layer, random_kv
from compare import relative_l2
from hf_models import (
    full_logits,
    lexico_cache,
    model,
    needs_hybrids,
    prompt,
    real,
    stepwise_logits,
    turbo_cache,
)
from kvcore.cache import TurboCache
from kvcore.cache.view import LazyKV

pytestmark = pytest.mark.usefixtures("restored_models")


def check(implementation, ids, mask, steps, make_cache=turbo_cache):
    net = kvcore.hf.enable(model("llama"))
    net.set_attn_implementation(implementation)
    cache = make_cache("llama")
    logits = stepwise_logits("llama", cache, ids, mask, steps)
    assert relative_l2(real(logits, mask), real(full_logits("llama", ids, mask), mask)) < 0.015
    assert kvcore.hf.fallback_reasons() == {}


@pytest.mark.parametrize(
    "make_cache",
    [turbo_cache, functools.partial(turbo_cache, max_cache_len=192), lexico_cache],
    ids=["dynamic", "static", "lexico"],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_enabled_model_may_attend_with_another_function(implementation, make_cache):
    ids, mask = prompt(2, 130, (0, 17))
    check(implementation, ids, mask, [100, 1, 29], make_cache)


@pytest.mark.slow
def test_an_enabled_model_may_attend_with_flex_attention():
    """It compiles itself, and takes no tensors but plain ones.

    One token a step and no padding: torch's kernel for CPUs does not compile with others.
    """
    ids, mask = prompt(2, 103)
    check("flex_attention", ids, mask, [100, 1, 1, 1])


@each_layer
def test_what_nobody_reads_is_not_rebuilt(make_layer, generator):
    """Plain tensors are for models that said that they read them."""
    layer = make_layer()
    for native, kind in ((None, LazyKV), (True, LazyKV), (False, torch.Tensor)):
        layer.update(*random_kv(generator, 1, 64))
        layer.tracker.native = native
        assert all(type(x) is kind for x in layer.update(*random_kv(generator, 1, 1)))


@needs_hybrids
def test_layers_that_cannot_be_compressed_are_named():
    config = FalconH1Config(
        vocab_size=96,
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.warns(RuntimeWarning, match="unsupported layer: a LinearAttentionAndFullAttention"):
        TurboCache(config)
    assert kvcore.hf.fallback_reasons() == {"unsupported layer": 2, "nothing to compress": 1}


@each_layer
@pytest.mark.parametrize("tokens", [20, 100])
def test_gradients_that_end_at_the_cache_are_said(make_layer, generator, tokens):
    layer = make_layer()
    k, v = random_kv(generator, 1, tokens)
    layer.update(k.requires_grad_(), v)
    assert kvcore.hf.fallback_reasons() == {}
    new, v = random_kv(generator, 1, 5)
    with pytest.warns(RuntimeWarning, match="reach the tokens of the current call only"):
        keys, _ = layer.update(new.requires_grad_(), v)
    keys.sum().backward()
    assert k.grad is None
    assert torch.equal(new.grad, torch.ones_like(new))
    assert kvcore.hf.fallback_reasons() == {"gradients": 1}
