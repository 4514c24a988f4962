"""What kvcore's attention leaves to exact attention: right, and named."""

import copy
import warnings

import pytest
import torch

import kvcore.hf
from cache_tools import Module, each_fine_layer, random_kv
from compare import relative_l2
from hf_models import (
    check_logits,
    each_cache,
    full_logits,
    model,
    prompt,
    real,
    stepwise_logits,
    stored_lens,
)
from kvcore.cache import TurboLayer
from kvcore.cache.view import LazyKV
from kvcore.hf.attention import exact_attention, kvcore_attention

pytestmark = pytest.mark.usefixtures("restored_models")


@each_cache
def test_a_mask_with_holes_falls_back(make_cache):
    name = "llama"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(3, 130, (0, 5, 9))
    mask[0, 50] = 0
    cache = make_cache(name)
    with pytest.warns(RuntimeWarning, match="mask: it hides more"):
        logits = stepwise_logits(name, cache, ids, mask, [100, 1, 1, 28])
    check_logits(name, logits, ids, mask)
    assert kvcore.hf.fallback_reasons() == {"mask": 3 * 2}


@each_cache
def test_right_padding_falls_back(make_cache):
    name = "qwen3"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 130)
    mask[1, 70:100] = 0
    cache = make_cache(name)
    with pytest.warns(RuntimeWarning, match="mask"):
        logits = stepwise_logits(name, cache, ids, mask, [100, 1, 29])
    check_logits(name, logits, ids, mask)


@each_cache
def test_a_mask_of_4_dimensions(make_cache):
    """Additive, boolean, with and without more than causality."""
    name = "llama"
    net = kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 120, (0, 20))
    shown = mask[:, None, None, :].bool() & torch.ones(120, 120, dtype=torch.bool).tril()
    additive = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for form in (shown, additive):
        cache = make_cache(name)
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
        assert stored_lens(cache) == [120, 100]
    assert kvcore.hf.fallback_reasons() == {}


@each_cache
def test_a_banded_mask_falls_back(make_cache):
    """A query sees its last 30 tokens: what it hides is not padding."""
    name = "llama"
    net = kvcore.hf.enable(model(name))
    ids, _ = prompt(2, 120)
    banded = torch.ones(2, 1, 120, 120, dtype=torch.bool).tril().triu(-30)
    cache = make_cache(name)
    with torch.no_grad():
        net(ids[:, :100], attention_mask=banded[:, :, :100, :100], past_key_values=cache)
        assert stored_lens(cache) == [100, 100]
        with pytest.warns(RuntimeWarning, match="mask"):
            out = net(ids[:, 100:], attention_mask=banded[:, :, 100:], past_key_values=cache)
        full = net(ids, attention_mask=banded).logits
    assert relative_l2(out.logits, full[:, 100:]) < 0.015


def attention_case(make_layer, q_len=1):
    generator = torch.Generator().manual_seed(5)
    layer = make_layer()
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


@each_fine_layer
@pytest.mark.parametrize("reason", SPECIAL)
def test_features_without_kernels_fall_back(make_layer, reason):
    _, query, keys, values = attention_case(make_layer, 3)
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


@each_fine_layer
def test_queries_that_need_gradients_fall_back(make_layer):
    _, query, keys, values = attention_case(make_layer)
    query.requires_grad_()
    with pytest.warns(RuntimeWarning, match="gradients"):
        out, _ = kvcore_attention(Module(), query, keys, values, None)
    out.sum().backward()
    assert query.grad.abs().sum() > 0
    with torch.no_grad():
        kvcore_attention(Module(), query, keys, values, None)
    assert kvcore.hf.fallback_reasons() == {"gradients": 1}


@each_fine_layer
def test_keys_of_an_older_state_fall_back(make_layer):
    layer, query, keys, values = attention_case(make_layer)
    old = (keys.clone(), values.clone())
    layer.update(*random_kv(torch.Generator().manual_seed(6), 2, 3))
    with pytest.warns(RuntimeWarning, match="foreign keys"):
        out, _ = kvcore_attention(Module(), query, keys, values, None)
    expected, _ = exact_attention(query, *old, None, scaling=None)
    assert relative_l2(out, expected) < 1e-5


@each_fine_layer
def test_warnings_come_once(make_layer):
    _, query, keys, values = attention_case(make_layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            kvcore_attention(Module(), query, keys, values, None, softcap=5.0)
    assert ["softcap" in str(warning.message) for warning in caught] == [True]
    assert kvcore.hf.fallback_reasons() == {"softcap": 3}


@each_cache
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_training_over_a_cache(make_cache, name):
    """Gradients reach the tokens of the call, and the loss is that of exact attention."""
    net = kvcore.hf.enable(model(name))
    ids, mask = prompt(1, 110)
    cache = make_cache(name)
    stepwise_logits(name, cache, ids[:, :100], mask, [100])
    with pytest.warns(RuntimeWarning, match="gradients"):
        out = net(ids[:, 100:], attention_mask=mask, past_key_values=cache, labels=ids[:, 100:])
    out.loss.backward()
    attention = net.model.layers[-1].self_attn
    for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        assert weight.grad.abs().sum() > 0
    net.zero_grad()
    check_logits(name, out.logits.detach(), ids, mask, begin=100)


@each_cache
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_cache, dtype):
    name = "qwen3"
    net = kvcore.hf.enable(copy.deepcopy(model(name)).to(dtype))
    ids, mask = prompt(2, 130, (0, 30))
    cache = make_cache(name)
    with torch.no_grad():
        net(ids[:, :100], attention_mask=mask[:, :100], past_key_values=cache)
        logits = net(ids[:, 100:], attention_mask=mask, past_key_values=cache).logits
    error = relative_l2(logits.float(), full_logits(name, ids, mask)[:, 100:])
    assert error < 0.04
    assert type(cache.layers[0].keys) is LazyKV
    assert cache.layers[0].keys.dtype == dtype


@each_cache
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(make_cache, enabled):
    """K comes in fp32 and V in bf16; both are kept in bf16, which attention would make of them."""
    name = "qwen3"
    net = copy.deepcopy(model(name))
    if enabled:
        kvcore.hf.enable(net)
    ids, mask = prompt(2, 130, (0, 30))
    cache = make_cache(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for begin, end in ((0, 100), (100, 129), (129, 130)):
            step = {"attention_mask": mask[:, :end], "past_key_values": cache}
            logits = net(ids[:, begin:end], **step).logits
    error = relative_l2(logits.float(), full_logits(name, ids, mask)[:, 129:])
    assert error < 0.04
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert type(cache.layers[0].keys) is LazyKV
    assert kvcore.hf.fallback_reasons() == {}


def test_autocast_over_a_cache_that_began_without(generator):
    """It keeps its dtype; what autocast leaves alone is refused as ever."""
    layer = TurboLayer()
    k, v = torch.randn(2, 1, 2, 70, 64, generator=generator)
    layer.update(k, v)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        views = layer.update(k[:, :, :1], v[:, :, :1].bfloat16())
        assert [view.dtype for view in views] == [torch.float32] * 2
        with pytest.raises(ValueError, match=r"key_states must have dtype torch\.float32, got"):
            layer.update(k[:, :, :1].double(), v[:, :, :1].double())
    assert layer.get_seq_length() == 71
