"""kvcore.eval: scores through a cache equal one forward pass; figures match hand computation."""

import math

import pytest
import torch

import kvcore
from kvcore import eval as kv_eval
from kvcore.eval import stepwise

transformers = pytest.importorskip("transformers")

_SHAPE = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # sharp enough that a wrong cache shows
}


def _model(name, shape=_SHAPE):
    if name == "llama":
        config = transformers.LlamaConfig(**shape)
    else:
        config = transformers.Qwen3NextConfig(
            **shape,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            mlp_only_layers=[0, 1],
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def model(request):
    return _model(request.param)


def _tokens(batch=3, length=90):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(1))


def _dynamic(model):
    return lambda: transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_stepwise_matches_one_forward_pass(model, chunk):
    tokens = _tokens()
    with torch.no_grad():
        whole = torch.log_softmax(model(tokens, use_cache=False).logits, -1)
    scores = kv_eval.stepwise_scores(model, _dynamic(model), tokens, context_len=40, chunk=chunk)
    assert scores.shape == (3, 49, 40)
    torch.testing.assert_close(scores, whole[:, 40:-1], rtol=0, atol=2e-4)


def test_stepwise_without_a_context(model):
    """Every token but the first is predicted, and the first is fed alone."""
    tokens, steps = _tokens(batch=1), []
    with torch.no_grad():
        whole = torch.log_softmax(model(tokens, use_cache=False).logits, -1)
    scores = kv_eval.stepwise_scores(
        model, _dynamic(model), tokens, context_len=0, chunk=16, on_step=steps.append
    )
    torch.testing.assert_close(scores, whole[:, :-1], rtol=0, atol=2e-4)
    assert (steps[0], sum(steps)) == (1, 89)


@pytest.mark.parametrize("begin", [1, 40, 63, 64, 127])
@pytest.mark.parametrize("chunk", [1, 16, 63, 64, 200])
def test_steps(begin, chunk):
    """Every position once, in order, at most `chunk` together, and a page's last alone."""
    steps = list(stepwise._steps(begin, 300, chunk))
    assert [i for step in steps for i in range(*step)] == list(range(begin, 300))
    assert max(stop - start for start, stop in steps) <= min(chunk, 63)
    for start, stop in steps:
        if any(i % 64 == 63 for i in range(start, stop)):
            assert stop == start + 1


def test_stepwise_positions_and_callbacks(model):
    tokens, caches, steps = _tokens(), [], []
    scores = kv_eval.stepwise_scores(model, _dynamic(model), tokens, context_len=40, chunk=16)
    some = kv_eval.stepwise_scores(
        model,
        _dynamic(model),
        tokens,
        context_len=40,
        chunk=16,
        positions=torch.tensor([41, 55, 56, 88]),
        on_cache=caches.append,
        on_step=steps.append,
    )
    torch.testing.assert_close(some, scores[:, [1, 15, 16, 48]], rtol=0, atol=0)
    assert sum(steps) == 3 * 89
    assert caches[0].get_seq_length() == 89


def test_stepwise_reads_the_cache(model):
    """Scores change when what the cache returns does: with one forward pass they would not."""

    class Forgetful(transformers.DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return (k, v) if k.shape[2] == 40 else (k, v * 0)

    tokens = _tokens()
    exact = kv_eval.stepwise_scores(model, _dynamic(model), tokens, context_len=40, chunk=7)
    broken = kv_eval.stepwise_scores(
        model, lambda: Forgetful(config=model.config), tokens, context_len=40, chunk=7
    )
    assert kv_eval.kl_divergence(exact, broken).mean() > 0.01


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"context_len": -1}, r"context_len must lie in \[0, 88\] for 90 tokens, got -1"),
        ({"context_len": 89}, r"context_len must lie in \[0, 88\] for 90 tokens, got 89"),
        ({"context_len": 40, "chunk": 0}, "chunk must be at least 1, got 0"),
        (
            {"context_len": 40, "positions": torch.tensor([39])},
            r"positions must lie in \[40, 88\], got 39 to 39",
        ),
    ],
)
def test_stepwise_rejects(kwargs, message):
    with pytest.raises(ValueError, match=message):
        kv_eval.stepwise_scores(None, None, _tokens(), **kwargs)


def test_stepwise_rejects_shape():
    with pytest.raises(ValueError, match=r"tokens must have shape \[batch, length\], got \[5\]"):
        kv_eval.stepwise_scores(None, None, torch.arange(5), context_len=1)


def _uniform(batch, steps, vocab):
    return torch.full((batch, steps, vocab), -math.log(vocab))


def test_bits_per_byte():
    scores, targets = _uniform(2, 6, 16), torch.randint(0, 16, (2, 6))
    assert kv_eval.bits_per_byte(scores, targets).tolist() == pytest.approx([4.0, 4.0])
    by_bytes = kv_eval.bits_per_byte(scores, targets, torch.tensor([12, 24]))
    assert by_bytes.tolist() == pytest.approx([2.0, 1.0])
    # Half of the probability on each target: one bit.
    peaked = torch.log_softmax(torch.tensor([[[math.log(3), 0.0, 0.0, 0.0]]]), -1)
    bits = kv_eval.bits_per_byte(peaked, torch.tensor([[0]]))
    assert bits.item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match=r"targets must have shape \[2, 6\], got \[2, 5\]"):
        kv_eval.bits_per_byte(scores, targets[:, :5])


def test_kl_divergence():
    p, q = torch.tensor([[[0.5, 0.25, 0.25]]]), torch.tensor([[[0.25, 0.25, 0.5]]])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kv_eval.kl_divergence(p.log(), q.log()).item() == pytest.approx(expected, abs=1e-7)
    assert kv_eval.kl_divergence(p.log(), p.log()).item() == 0
    # Tokens that a model forbids have probability 0 in both; a NaN elsewhere is not hidden.
    banned = torch.tensor([[[0.5, 0.5, 0.0]]]).log()
    assert kv_eval.kl_divergence(banned, banned).item() == 0
    assert kv_eval.kl_divergence(banned, banned * math.nan).isnan().all()
    with pytest.raises(ValueError, match=r"got \[1, 1, 2\]"):
        kv_eval.kl_divergence(p, q[..., :2])


def test_agreement_and_accuracy():
    a = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    b = a.flip(-1).clone()
    b[0, 0] = a[0, 0]
    assert kv_eval.agreement(a, b).tolist() == [0.5, 0.0]
    assert kv_eval.accuracy(a, torch.tensor([[1, 1], [1, 1]])).tolist() == [0.5, 1.0]


def test_mean_interval():
    # n = 4: t(3) = 3.182, standard deviation 1.290994 / sqrt(4).
    interval = kv_eval.mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert interval.mean == 2.5
    assert interval.half_width == pytest.approx(3.182 * 1.2909944 / 2, rel=1e-6)
    assert (interval.low, interval.high) == (2.5 - interval.half_width, 2.5 + interval.half_width)
    assert f"{interval:.1f}" == "2.5 ± 2.1"
    assert f"{interval:+.1f}" == "+2.5 ± 2.1"
    one = kv_eval.mean_interval(torch.tensor([3.0]))
    assert math.isnan(one.half_width)
    assert f"{one:.1f}" == "3.0"
    with pytest.raises(ValueError, match="samples must not be empty"):
        kv_eval.mean_interval(torch.tensor([]))


@pytest.mark.parametrize(
    ("df", "t"), [(21, 2.0796), (30, 2.0423), (60, 2.0003), (120, 1.9799), (1000, 1.9623)]
)
def test_mean_interval_with_many_samples(df, t):
    samples = torch.linspace(-1, 1, df + 1)
    expected = t * samples.double().std().item() / math.sqrt(df + 1)
    assert kv_eval.mean_interval(samples).half_width == pytest.approx(expected, rel=1e-4)


def test_paired_ratio_interval_cancels_what_is_shared():
    generator = torch.Generator().manual_seed(0)
    reference = 1 + torch.rand(200, generator=generator)  # sequences differ by up to 2x
    noise = 0.001 * torch.randn(200, generator=generator)
    interval = kv_eval.paired_ratio_interval(reference * (1.01 + noise), reference)
    assert abs(interval.mean - 0.01) < 0.0005
    assert interval.half_width < 0.0005
    assert interval.low < 0.01 < interval.high
    with pytest.raises(ValueError, match=r"shape of reference, \[2\], got \[3\]"):
        kv_eval.paired_ratio_interval(torch.ones(3), torch.ones(2))


def test_cache_bytes(model):
    cache = transformers.DynamicCache(config=model.config)
    assert kv_eval.cache_bytes(cache) == kv_eval.CacheBytes(0, 0)
    with torch.no_grad():
        model(_tokens(), past_key_values=cache)
    sizes = kv_eval.cache_bytes(cache)
    attention = sum(t != "linear_attention" for t in getattr(model.config, "layer_types", [0, 0]))
    assert sizes.kv == attention * 2 * 3 * 90 * 32 * 4
    if attention == 2:
        assert sizes.state == 0
    else:  # recurrent [3, 2, 16, 16] in fp32 and a convolution window of 4 over 64 channels
        assert sizes.state == 3 * 2 * 16 * 16 * 4 + 3 * 64 * 4 * 4
    assert sizes.total == sizes.kv + sizes.state


@pytest.mark.parametrize("bits", [8, 2])
def test_prefilled_cache_is_what_the_prompt_leaves(model, bits):
    """A prompt run once serves every cache: bit by bit what each would get from its own run."""
    model = _model(model.config.model_type, dict(_SHAPE, head_dim=64))
    tokens = _tokens(length=200)
    for cache, enabled in (
        (lambda: transformers.DynamicCache(config=model.config), False),
        (lambda: kvcore.cache.TurboCache(model.config, k_bits=bits, v_bits=bits), True),
    ):
        if enabled:
            kvcore.hf.enable(model)
        # By the same functions: those of the gated delta rule differ in rounding.
        prefilled = kv_eval.prefill(model, tokens[:, :150])
        kwargs = {"context_len": 150, "chunk": 16}
        own = kv_eval.stepwise_scores(model, cache, tokens, **kwargs)
        for _ in range(2):  # what was prefilled is not used up
            shared = kv_eval.stepwise_scores(model, cache, tokens, prefilled=prefilled, **kwargs)
            assert torch.equal(own, shared)
    kvcore.hf.disable(model)
    with pytest.raises(ValueError, match="prefilled must hold context_len = 149 tokens, got 150"):
        kv_eval.stepwise_scores(model, cache, tokens, context_len=149, prefilled=prefilled)
