"""Models of transformers over a TurboCache, against the same models without a cache."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hf_models
import kvcore.hf
from cache_tools import random_kv, turbo_layer
from compare import relative_l2
from hf_models import (
    HYBRID_NAMES,
    NAMES,
    full_logits,
    model,
    needs_hybrids,
    prompt,
    real,
    stepwise_logits,
)
from kvcore.cache import TurboCache
from kvcore.cache.view import LazyKV
from kvcore.hf.attention import exact_attention, kvcore_attention

PADDING = (0, 17, 90)
# Relative L2 error of the logits of these models against no cache at all. The largest found, over
# four ways to cut 300 tokens into steps: 1.3 % at 8 bits and 4.9 % at 4 bits, both of qwen3.
TOLERANCE = {8: 0.015, 4: 0.06}


@pytest.fixture(autouse=True)
def clean():
    kvcore.hf.clear_fallback_reasons()
    yield
    for name in NAMES:
        kvcore.hf.disable(model(name))
        model(name).set_attn_implementation("sdpa")


def turbo_cache(name, bits=8, **arguments):
    return TurboCache(hf_models.config(name), k_bits=bits, v_bits=bits, **arguments)


def check(name, logits, ids, mask, bits=8, begin=0):
    expected = full_logits(name, ids, mask)
    error = relative_l2(real(logits, mask[:, begin:]), real(expected[:, begin:], mask[:, begin:]))
    assert error < TOLERANCE[bits]


# ---- forward


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("implementation", ["kvcore", "sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_batch_step_by_step(name, implementation, bits):
    """A prompt, single tokens and chunks, some of them across pages."""
    kvcore.hf.enable(model(name)).set_attn_implementation(implementation)
    ids, mask = prompt(3, 300, PADDING)
    cache = turbo_cache(name, bits)
    logits = stepwise_logits(name, cache, ids, mask, [100, 1, 1, 30, 1, 80, *[1] * 17, 70])
    check(name, logits, ids, mask, bits)
    assert kvcore.hf.fallback_reasons() == {}
    assert cache.get_seq_length() == 300
    for layer in cache.turbo_layers():
        assert layer.store.seq_lens.tolist() == [300 - padding for padding in PADDING]


@pytest.mark.parametrize("steps", [[20, 20, 20, 20, 20, 40], [95, 45], [1] * 80 + [60], [139, 1]])
@pytest.mark.parametrize("name", NAMES)
def test_chunked_prompt_with_padding_longer_than_a_chunk(name, steps):
    kvcore.hf.enable(model(name))
    ids, mask = prompt(3, 140, PADDING)
    logits = stepwise_logits(name, turbo_cache(name), ids, mask, steps)
    check(name, logits, ids, mask)
    assert kvcore.hf.fallback_reasons() == {}


@pytest.mark.parametrize("name", NAMES)
def test_implementations_agree_on_the_same_cache(name):
    """What is left between them is the int8 of queries and probabilities."""
    kvcore.hf.enable(model(name))
    ids, mask = prompt(3, 200, PADDING)
    cache = turbo_cache(name, 4, sas_threshold=None)
    stepwise_logits(name, cache, ids[:, :199], mask, [150, 49])
    logits = {}
    for implementation in ("kvcore", "sdpa", "eager"):
        model(name).set_attn_implementation(implementation)
        mine = copy.deepcopy(cache)
        with torch.no_grad():
            out = model(name)(ids[:, 199:], attention_mask=mask, past_key_values=mine)
        logits[implementation] = out.logits
    assert relative_l2(logits["eager"], logits["sdpa"]) < 1e-5
    assert relative_l2(logits["kvcore"], logits["sdpa"]) < 0.01
    assert not torch.equal(logits["kvcore"], logits["sdpa"])


@pytest.mark.parametrize("name", NAMES)
def test_without_a_cache_and_with_another_one_nothing_changes(name):
    ids, mask = prompt(2, 80, (0, 9))
    with torch.no_grad():
        plain = model(name)(ids, attention_mask=mask).logits
        expected = stepwise_logits(name, DynamicCache(config=model(name).config), ids, mask,
                                   [60, 1, 19])  # fmt: skip
        kvcore.hf.enable(model(name))
        assert torch.equal(model(name)(ids, attention_mask=mask).logits, plain)
        cache = DynamicCache(config=model(name).config)
        assert torch.equal(stepwise_logits(name, cache, ids, mask, [60, 1, 19]), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_not_enabled_is_slow_but_right(name):
    """The cache is not told about padding: it stores it, and the mask hides it."""
    ids, mask = prompt(3, 150, PADDING)
    cache = turbo_cache(name)
    check(name, stepwise_logits(name, cache, ids, mask, [100, 1, 1, 48]), ids, mask)
    assert cache.turbo_layers()[0].store.seq_lens.tolist() == [150] * 3


@pytest.mark.parametrize("bits", [8, 4])
def test_head_widths_and_sinks(bits):
    name = "llama"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 200)
    cache = turbo_cache(name, bits, sink_pages=0)
    check(name, stepwise_logits(name, cache, ids, mask, [150, 50]), ids, mask, bits)
    low = turbo_cache(name, bits, low_bit_heads=0.5)
    logits = stepwise_logits(name, low, ids, mask, [150, 50])
    assert relative_l2(logits, full_logits(name, ids, mask)) < 0.3
    assert (low.layers[0].store.head_bits == 2).sum() == 2
    assert low.nbytes() < cache.nbytes()


# ---- generate


def best_choices(name, sequences, mask, begin):
    """By how much each generated token's full-precision logit misses the best one."""
    full = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])], 1)
    logits = full_logits(name, sequences, full)[:, begin - 1 : -1]
    chosen = logits.gather(2, sequences[:, begin:, None])[..., 0]
    return logits.amax(-1) - chosen


# Between two logits that err by at most 0.084, the largest found with 8 bits.
LOGIT_ERROR = 0.17


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [40, 100])
def test_greedy_generation(name, tokens):
    kvcore.hf.enable(model(name))
    ids, mask = prompt(3, tokens, (0, 17, 33))
    cache = turbo_cache(name)
    out = model(name).generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False,
                               max_new_tokens=40, eos_token_id=None)  # fmt: skip
    assert out.shape == (3, tokens + 40)
    assert best_choices(name, out, mask, tokens).max() < LOGIT_ERROR
    assert kvcore.hf.fallback_reasons() == {}
    assert cache.get_seq_length() == tokens + 39
    for layer in cache.turbo_layers():
        assert layer.store.seq_lens.tolist() == [tokens + 39 - padding for padding in (0, 17, 33)]


@pytest.mark.parametrize("name", NAMES)
def test_beam_search(name):
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 150, (0, 17))
    arguments = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 20,
        "num_beams": 4,
        "eos_token_id": None,
        "length_penalty": 0.0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    cache = turbo_cache(name)
    out = model(name).generate(ids, past_key_values=cache, **arguments)
    full = torch.cat([mask, mask.new_ones(2, 20)], 1)
    logits = full_logits(name, out.sequences, full)[:, 149:-1].log_softmax(-1)
    scores = logits.gather(2, out.sequences[:, 150:, None]).sum((1, 2))
    # Twenty log probabilities, each within the error of a logit.
    assert (scores - out.sequences_scores).abs().max() < 20 * LOGIT_ERROR / 2
    best = model(name).generate(ids, past_key_values=DynamicCache(config=model(name).config),
                                **arguments)  # fmt: skip
    assert (best.sequences_scores - scores).max() < 20 * LOGIT_ERROR / 2
    assert kvcore.hf.fallback_reasons() == {}
    # Eight beams of 169 tokens hold less than two times what two sequences do.
    store = cache.turbo_layers()[0].store
    assert store.batch == 8
    store.collect()
    assert sum(store.pool.num_used(bits) for bits in (8, 4, 2)) <= 2 * 2 * 2 * 2 * 2


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_prompt_lookup_crops(name):
    kvcore.hf.enable(model(name))
    ids, _ = prompt(1, 30)
    ids = ids.repeat(1, 4)  # so that there is something to look up
    mask = torch.ones_like(ids)
    cache = turbo_cache(name)
    cropped = []
    crop = type(cache).crop
    cache.crop = lambda count: (cropped.append(count), crop(cache, count))
    out = model(name).generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False,
                               max_new_tokens=30, prompt_lookup_num_tokens=4,
                               eos_token_id=hf_models.VOCAB)  # fmt: skip
    assert best_choices(name, out, mask, 120).max() < LOGIT_ERROR
    assert any(cropped)
    assert kvcore.hf.fallback_reasons() == {}


@needs_hybrids
def test_assisted_decoding_is_refused_for_hybrids():
    name = "qwen3_next"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(1, 80)
    with pytest.raises(ValueError, match=r"crop|stateful|cache"):
        model(name).generate(ids, attention_mask=mask, past_key_values=turbo_cache(name),
                             max_new_tokens=4, prompt_lookup_num_tokens=4)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_turns_and_reset(name):
    kvcore.hf.enable(model(name))
    ids, mask = prompt(1, 90)
    cache = turbo_cache(name)
    arguments = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    for turn in range(3):
        more, _ = prompt(1, 25, seed=turn + 1)
        ids = torch.cat([ids, more], 1)
        mask = torch.ones_like(ids)
        begin = ids.shape[1]
        ids = model(name).generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
        assert best_choices(name, ids, mask, begin).max() < LOGIT_ERROR
        assert cache.get_seq_length() == ids.shape[1] - 1
    assert kvcore.hf.fallback_reasons() == {}
    cache.reset()
    assert cache.get_seq_length() == 0
    other, mask = prompt(1, 100, seed=9)
    again = model(name).generate(other, attention_mask=mask, past_key_values=cache, **arguments)
    fresh = model(name).generate(other, attention_mask=mask, past_key_values=turbo_cache(name),
                                 **arguments)  # fmt: skip
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("name", ["llama", *HYBRID_NAMES])
def test_several_answers_to_one_prompt(name):
    """The prompt is read once and repeated; answers share its pages."""
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 140, (0, 40))
    cache = turbo_cache(name)
    stepwise_logits(name, cache, ids, mask, [140])
    pool = sum(slab.shape[0] for slab in cache.turbo_layers()[0].store.pool.slabs)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2, 3, 5]))
    assert sum(slab.shape[0] for slab in cache.turbo_layers()[0].store.pool.slabs) == pool
    rows = [0, 0, 1, 1]
    more, _ = prompt(4, 30, seed=3)
    ids, mask = torch.cat([ids[rows], more], 1), torch.cat([mask[rows], torch.ones_like(more)], 1)
    with torch.no_grad():
        logits = model(name)(more, attention_mask=mask, past_key_values=cache).logits
    check(name, logits, ids, mask, begin=140)


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


def test_inner_models_and_positional_arguments():
    name = "llama"
    net = kvcore.hf.enable(model(name))
    ids, mask = prompt(3, 120, PADDING)
    cache = turbo_cache(name)
    with torch.no_grad():
        net.model(ids[:, :100], mask[:, :100], None, cache)
        hidden = net.model(ids[:, 100:], mask, None, cache).last_hidden_state
    check(name, net.lm_head(hidden), ids, mask, begin=100)
    assert cache.layers[0].store.seq_lens.tolist() == [120 - padding for padding in PADDING]


# ---- what falls back


def test_a_mask_with_holes_falls_back():
    name = "llama"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(3, 130, (0, 5, 9))
    mask[0, 50] = 0
    cache = turbo_cache(name)
    with pytest.warns(RuntimeWarning, match="mask: it hides more"):
        logits = stepwise_logits(name, cache, ids, mask, [100, 1, 1, 28])
    check(name, logits, ids, mask)
    assert kvcore.hf.fallback_reasons() == {"mask": 3 * 2}


def test_right_padding_falls_back():
    name = "qwen3"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 130)
    mask[1, 70:100] = 0
    cache = turbo_cache(name)
    with pytest.warns(RuntimeWarning, match="mask"):
        logits = stepwise_logits(name, cache, ids, mask, [100, 1, 29])
    check(name, logits, ids, mask)


def test_a_mask_of_4_dimensions():
    """Additive, boolean, with and without more than causality."""
    name = "llama"
    net = kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 120, (0, 20))
    shown = mask[:, None, None, :].bool() & torch.ones(120, 120, dtype=torch.bool).tril()
    additive = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for form in (shown, additive):
        cache = turbo_cache(name)
        with torch.no_grad():
            for begin, end in ((0, 100), (100, 101), (101, 120)):
                logits = net(
                    ids[:, begin:end],
                    attention_mask=form[:, :, begin:end, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                ).logits
                full = net(ids, attention_mask=shown, position_ids=positions).logits
                now = mask[:, begin:end]
                assert relative_l2(real(logits, now), real(full[:, begin:end], now)) < 0.015
        assert cache.layers[0].store.seq_lens.tolist() == [120, 100]
    assert kvcore.hf.fallback_reasons() == {}


def test_a_banded_mask_falls_back():
    """A query sees its last 30 tokens: what it hides is not padding."""
    name = "llama"
    net = kvcore.hf.enable(model(name))
    ids, _ = prompt(2, 120)
    banded = torch.ones(2, 1, 120, 120, dtype=torch.bool).tril().triu(-30)
    cache = turbo_cache(name)
    with torch.no_grad():
        net(ids[:, :100], attention_mask=banded[:, :, :100, :100], past_key_values=cache)
        assert cache.layers[0].store.seq_lens.tolist() == [100, 100]
        with pytest.warns(RuntimeWarning, match="mask"):
            out = net(ids[:, 100:], attention_mask=banded[:, :, 100:], past_key_values=cache)
        full = net(ids, attention_mask=banded).logits
    assert relative_l2(out.logits, full[:, 100:]) < 0.015


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def attention_case(q_len=1):
    generator = torch.Generator().manual_seed(5)
    layer = turbo_layer(k_bits=8, v_bits=8)
    layer.update(*random_kv(generator, 2, 100))
    keys, values = layer.update(*random_kv(generator, 2, q_len))
    query = torch.randn(2, 4, q_len, 64, generator=generator)
    return layer, query, keys, values


SPECIAL = {
    "softcap": {"softcap": 20.0},
    "s_aux": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "position_bias": {"position_bias": torch.randn(1, 4, 3, 103)},
    "output_attentions": {"output_attentions": True},
    "sliding_window": {"sliding_window": 50},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("reason", SPECIAL)
def test_features_without_kernels_fall_back(reason):
    _, query, keys, values = attention_case(3)
    module = Module().eval()
    with pytest.warns(RuntimeWarning, match=reason):
        out, weights = kvcore_attention(module, query, keys, values, None, **SPECIAL[reason])
    assert kvcore.hf.fallback_reasons() == {reason: 1}
    assert out.shape == (2, 3, 4, 64)
    assert (weights is not None) == (reason == "output_attentions")
    k, v = (x.clone().repeat_interleave(2, 1).double() for x in (keys, values))
    scores = query.double() @ k.transpose(2, 3) / 8
    if reason == "softcap":
        scores = 20 * torch.tanh(scores / 20)
    if reason == "position_bias":
        scores = scores + SPECIAL[reason]["position_bias"]
    scores = scores.masked_fill(~torch.ones(3, 103, dtype=torch.bool).tril(100), -torch.inf)
    sums = scores.exp().sum(-1, keepdim=True)
    if reason == "s_aux":
        sums = sums + SPECIAL[reason]["s_aux"].double()[:, None, None].exp()
    if reason != "dropout":  # whose result is random
        expected = (scores.exp() / sums @ v).transpose(1, 2)
        assert relative_l2(out, expected) < 1e-5


def test_queries_that_need_gradients_fall_back():
    _, query, keys, values = attention_case()
    query.requires_grad_()
    with pytest.warns(RuntimeWarning, match="gradients"):
        out, _ = kvcore_attention(Module(), query, keys, values, None)
    out.sum().backward()
    assert query.grad.abs().sum() > 0
    with torch.no_grad():
        kvcore_attention(Module(), query, keys, values, None)
    assert kvcore.hf.fallback_reasons() == {"gradients": 1}


def test_keys_of_an_older_state_fall_back():
    layer, query, keys, values = attention_case()
    old = (keys.clone(), values.clone())
    layer.update(*random_kv(torch.Generator().manual_seed(6), 2, 3))
    with pytest.warns(RuntimeWarning, match="foreign keys"):
        out, _ = kvcore_attention(Module(), query, keys, values, None)
    expected, _ = exact_attention(query, *old, None, scaling=None)
    assert relative_l2(out, expected) < 1e-5


def test_warnings_come_once():
    _, query, keys, values = attention_case()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            kvcore_attention(Module(), query, keys, values, None, softcap=5.0)
    assert ["softcap" in str(warning.message) for warning in caught] == [True]
    assert kvcore.hf.fallback_reasons() == {"softcap": 3}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_training_over_a_cache(name):
    """Gradients reach the tokens of the call, and the loss is that of exact attention."""
    net = kvcore.hf.enable(model(name))
    ids, mask = prompt(1, 110)
    cache = turbo_cache(name)
    stepwise_logits(name, cache, ids[:, :100], mask, [100])
    with pytest.warns(RuntimeWarning, match="gradients"):
        out = net(ids[:, 100:], attention_mask=mask, past_key_values=cache, labels=ids[:, 100:])
    out.loss.backward()
    attention = net.model.layers[-1].self_attn
    for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        assert weight.grad.abs().sum() > 0
    net.zero_grad()
    check(name, out.logits.detach(), ids, mask, begin=100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    name = "qwen3"
    net = kvcore.hf.enable(copy.deepcopy(model(name)).to(dtype))
    ids, mask = prompt(2, 130, (0, 30))
    cache = turbo_cache(name)
    with torch.no_grad():
        net(ids[:, :100], attention_mask=mask[:, :100], past_key_values=cache)
        logits = net(ids[:, 100:], attention_mask=mask, past_key_values=cache).logits
    error = relative_l2(logits.float(), full_logits(name, ids, mask)[:, 100:])
    assert error < 0.04
    assert type(cache.layers[0].keys) is LazyKV
    assert cache.layers[0].keys.dtype == dtype
