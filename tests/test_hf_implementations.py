"""Attention functions and layers that are not kvcore's: right, and named where they cost memory."""

import pytest
import torch
from transformers import FalconH1Config

import hf_models
import kvcore.hf
from cache_tools import random_kv, turbo_layer
from compare import relative_l2
from hf_models import full_logits, model, needs_hybrids, prompt, real, stepwise_logits
from kvcore.cache import TurboCache
from kvcore.cache.view import LazyKV

pytestmark = pytest.mark.usefixtures("restored_models")


def check(implementation, ids, mask, steps, max_cache_len=None):
    net = kvcore.hf.enable(model("llama"))
    net.set_attn_implementation(implementation)
    config = hf_models.config("llama")
    cache = TurboCache(config, k_bits=8, v_bits=8, max_cache_len=max_cache_len)
    logits = stepwise_logits("llama", cache, ids, mask, steps)
    assert relative_l2(real(logits, mask), real(full_logits("llama", ids, mask), mask)) < 0.015
    assert kvcore.hf.fallback_reasons() == {}


@pytest.mark.parametrize("max_cache_len", [None, 192])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_enabled_model_may_attend_with_another_function(implementation, max_cache_len):
    ids, mask = prompt(2, 130, (0, 17))
    check(implementation, ids, mask, [100, 1, 29], max_cache_len)


@pytest.mark.slow
def test_an_enabled_model_may_attend_with_flex_attention():
    """It compiles itself, and takes no tensors but plain ones.

    One token a step and no padding: torch's kernel for CPUs does not compile with others.
    """
    ids, mask = prompt(2, 103)
    check("flex_attention", ids, mask, [100, 1, 1, 1])


def test_what_nobody_reads_is_not_rebuilt(generator):
    """Plain tensors are for models that said that they read them."""
    layer = turbo_layer()
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
    assert kvcore.hf.fallback_reasons() == {"unsupported layer": 2}


@pytest.mark.parametrize("tokens", [20, 100])
def test_gradients_that_end_at_the_cache_are_said(generator, tokens):
    layer = turbo_layer()
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
