"""Models of transformers over compressed caches, against the same models without a cache."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hf_models
import kvcore.hf
from compare import relative_l2
from hf_models import (
    HYBRID_NAMES,
    NAMES,
    PADDING,
    check_logits,
    each_cache,
    full_logits,
    lexico_cache,
    model,
    prompt,
    real,
    stepwise_logits,
    stored_lens,
    turbo_cache,
)

pytestmark = pytest.mark.usefixtures("restored_models")


# ---- forward


@pytest.mark.parametrize(
    ("make_cache", "bits"),
    [(turbo_cache, 8), (functools.partial(turbo_cache, bits=4), 4), (lexico_cache, 8)],
    ids=["turbo-8", "turbo-4", "lexico"],
)
@pytest.mark.parametrize("implementation", ["kvcore", "sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_batch_step_by_step(name, implementation, make_cache, bits):
    """A prompt, single tokens and chunks, some of them across pages."""
    kvcore.hf.enable(model(name)).set_attn_implementation(implementation)
    ids, mask = prompt(3, 300, PADDING)
    cache = make_cache(name)
    logits = stepwise_logits(name, cache, ids, mask, [100, 1, 1, 30, 1, 80, *[1] * 17, 70])
    check_logits(name, logits, ids, mask, bits)
    assert kvcore.hf.fallback_reasons() == {}
    assert cache.get_seq_length() == 300
    assert stored_lens(cache) == [300 - padding for padding in PADDING]


@pytest.mark.parametrize("steps", [[20, 20, 20, 20, 20, 40], [95, 45], [1] * 80 + [60], [139, 1]])
@pytest.mark.parametrize("name", NAMES)
@each_cache
def test_chunked_prompt_with_padding_longer_than_a_chunk(make_cache, name, steps):
    kvcore.hf.enable(model(name))
    ids, mask = prompt(3, 140, PADDING)
    logits = stepwise_logits(name, make_cache(name), ids, mask, steps)
    check_logits(name, logits, ids, mask)
    assert kvcore.hf.fallback_reasons() == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("make_cache", "bound"),
    [(functools.partial(turbo_cache, bits=4, sas_threshold=None), 0.01),
     (functools.partial(lexico_cache, k_sparsity=5, v_sparsity=6), 1e-5)],
    ids=["turbo", "lexico"],
)  # fmt: skip
def test_implementations_agree_on_the_same_cache(name, make_cache, bound):
    """What is left between them is the int8 of turbo's queries and probabilities."""
    kvcore.hf.enable(model(name))
    ids, mask = prompt(3, 200, PADDING)
    cache = make_cache(name)
    stepwise_logits(name, cache, ids[:, :199], mask, [150, 49])
    logits = {}
    for implementation in ("kvcore", "sdpa", "eager"):
        model(name).set_attn_implementation(implementation)
        mine = copy.deepcopy(cache)
        with torch.no_grad():
            out = model(name)(ids[:, 199:], attention_mask=mask, past_key_values=mine)
        logits[implementation] = out.logits
    assert relative_l2(logits["eager"], logits["sdpa"]) < 1e-5
    assert relative_l2(logits["kvcore"], logits["sdpa"]) < bound
    assert not torch.equal(logits["kvcore"], logits["sdpa"])


@pytest.mark.parametrize("name", NAMES)
def test_without_a_cache_and_with_another_one_nothing_changes(name):
    ids, mask = prompt(2, 80, (0, 9))
    with torch.no_grad():
        plain = model(name)(ids, attention_mask=mask).logits
        expected = stepwise_logits(name, DynamicCache(config=model(name).config), ids, mask,
                                   [60, 1, 19])  # fmt: skip
        kvcore.hf.enable(model(name))
        # The delta rule of hybrid models is summed in another order.
        bound = 1e-4 if name in HYBRID_NAMES else 0
        actual = model(name)(ids, attention_mask=mask).logits
        assert relative_l2(real(actual, mask), real(plain, mask)) <= bound
        cache = DynamicCache(config=model(name).config)
        actual = stepwise_logits(name, cache, ids, mask, [60, 1, 19])
        assert relative_l2(real(actual, mask), real(expected, mask)) <= bound


@pytest.mark.parametrize("name", NAMES)
@each_cache
def test_a_model_that_is_not_enabled_is_slow_but_right(make_cache, name):
    """The cache is not told about padding: it stores it, and the mask hides it."""
    ids, mask = prompt(3, 150, PADDING)
    cache = make_cache(name)
    check_logits(name, stepwise_logits(name, cache, ids, mask, [100, 1, 1, 48]), ids, mask)
    assert stored_lens(cache) == [150] * 3


@pytest.mark.parametrize("bits", [8, 4])
def test_head_widths_and_sinks(bits):
    name = "llama"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 200)
    cache = turbo_cache(name, bits, sink_pages=0)
    check_logits(name, stepwise_logits(name, cache, ids, mask, [150, 50]), ids, mask, bits)
    low = turbo_cache(name, bits, low_bit_heads=0.5)
    logits = stepwise_logits(name, low, ids, mask, [150, 50])
    assert relative_l2(logits, full_logits(name, ids, mask)) < 0.3
    assert (low.layers[0].store.head_bits == 2).sum() == 2
    assert low.nbytes() < cache.nbytes()


# ---- enable and disable


@pytest.mark.parametrize("name", NAMES)
def test_enable_and_disable(name):
    net = model(name)
    net.set_attn_implementation("eager")
    assert not kvcore.hf.is_enabled(net)
    assert kvcore.hf.disable(net) is net
    hooks = [len(module._forward_pre_hooks) for module in net.modules()]
    assert kvcore.hf.enable(net) is net
    once = [len(module._forward_pre_hooks) for module in net.modules()]
    assert kvcore.hf.enable(net) is net
    assert [len(module._forward_pre_hooks) for module in net.modules()] == once != hooks
    assert net.config._attn_implementation == "kvcore"
    assert kvcore.hf.is_enabled(net)
    net.set_attn_implementation("sdpa")
    kvcore.hf.enable(net)
    assert net.config._attn_implementation == "kvcore"
    kvcore.hf.disable(net)
    assert net.config._attn_implementation == "eager"
    assert [len(module._forward_pre_hooks) for module in net.modules()] == hooks
    assert not kvcore.hf.is_enabled(net)


def test_enable_does_not_keep_a_model_alive():
    net = AutoModelForCausalLM.from_config(hf_models.config("llama", num_hidden_layers=1))
    kvcore.hf.enable(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_enable_rejects():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        kvcore.hf.enable(torch.nn.Linear(1, 1))


@each_cache
def test_inner_models_and_positional_arguments(make_cache):
    name = "llama"
    net = kvcore.hf.enable(model(name))
    ids, mask = prompt(3, 120, PADDING)
    cache = make_cache(name)
    with torch.no_grad():
        net.model(ids[:, :100], mask[:, :100], None, cache)
        hidden = net.model(ids[:, 100:], mask, None, cache).last_hidden_state
    check_logits(name, net.lm_head(hidden), ids, mask, begin=100)
    assert stored_lens(cache) == [120 - padding for padding in PADDING]
