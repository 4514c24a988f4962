"""Hybrid models of transformers that run their gated delta rule in kvcore."""

import copy
import gc
import importlib
import itertools
import pathlib
import sys

import pytest
import torch
import transformers

import kvcore
from compare import relative_l2
from hf_models import needs_hybrids
from kvcore.hf import gdn, norms

pytestmark = needs_hybrids

_COMMON = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "initializer_range": 0.1,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
# Architecture -> configuration class, model class and what differs from _COMMON.
MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _EXPERTS),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _EXPERTS),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        {
            **_EXPERTS,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 4096,
            "indexer_compress_ratio": 4,
        },
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        {
            "linear_key_head_dim": 96,
            "linear_value_head_dim": 192,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_allow_neg_eigval": True,
        },
    ),
}


def known_architectures():
    """Names of the modelling files of this transformers that hold the gated delta rule."""
    models = pathlib.Path(transformers.__file__).parent / "models"
    files = models.glob("*/modeling_*.py")
    return sorted(f.parent.name for f in files if gdn._MARK in f.read_text())


def module_of(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def make_model(name, **changes):
    config_name, model_name, own = MODELS[name]
    try:
        config_class = getattr(transformers, config_name)
        model_class = getattr(module_of(name), model_name)
    except (AttributeError, ImportError):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = config_class(**{**_COMMON, **own, **changes})
    torch.manual_seed(0)
    return model_class(config).eval()


def ids_of(batch, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (batch, tokens), generator=generator)


@pytest.fixture(params=MODELS)
def pair(request):
    """A model as transformers runs it, and a copy that kvcore is enabled for."""
    plain = make_model(request.param)
    enabled = copy.deepcopy(plain)
    yield plain, enabled
    kvcore.hf.disable(enabled)


def with_kvcore(model, function):
    kvcore.hf.enable(model)
    try:
        return function(model)
    finally:
        kvcore.hf.disable(model)


def calls_of(monkeypatch):
    """Counts the calls of the ops."""
    counts = {}

    def count(name, function):
        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return counted

    for name in ("gdn_conv1d", "gdn_conv1d_update", "gdn_rms_norm"):
        monkeypatch.setattr(kvcore, name, count(name, getattr(kvcore, name)))
    fla = sys.modules["kvcore.ops.gdn_fla"]
    for name in ("gdn_chunk_scan", "gdn_recurrent_step"):
        monkeypatch.setattr(fla, name, count(name, getattr(fla, name)))
    return counts


def norms_run(model, function):
    """What the function returns, and how many modules that compute an RMSNorm of whole rows ran."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1

    routed = norms.classes_of(sys.modules[type(model).__module__])
    hooks = [
        layer.register_forward_hook(hook)
        for layer in model.modules()
        if type(layer) in routed and getattr(layer, "group_size", None) is None
    ]
    result = function()
    for handle in hooks:
        handle.remove()
    assert count >= 2 * len(model.model.layers)
    return result, count


def test_every_architecture_is_tested_or_routed():
    assert set(MODELS) <= set(known_architectures())
    for name in known_architectures():
        functions = vars(module_of(name))
        assert set(gdn._ROUTES) <= set(functions), name


@torch.no_grad()
def test_forward(pair, monkeypatch):
    plain, enabled = pair
    counts = calls_of(monkeypatch)
    ids = ids_of(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    expected, norm_calls = norms_run(plain, lambda: plain(ids, attention_mask=mask).logits)
    assert not counts
    actual = with_kvcore(enabled, lambda model: model(ids, attention_mask=mask).logits)
    assert counts == {"gdn_conv1d": 1, "gdn_chunk_scan": 1, "gdn_rms_norm": norm_calls}
    assert relative_l2(actual[mask.bool()], expected[mask.bool()]) < 1e-4


@torch.no_grad()
def test_generation(pair, monkeypatch):
    plain, enabled = pair
    ids = ids_of(2, 70)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
    }
    expected, norm_calls = norms_run(plain, lambda: plain.generate(ids, **options))
    counts = calls_of(monkeypatch)
    actual = with_kvcore(enabled, lambda model: model.generate(ids, **options))
    assert counts["gdn_rms_norm"] == norm_calls
    assert counts["gdn_recurrent_step"] == 7
    assert counts["gdn_conv1d_update"] == 7
    assert torch.equal(actual.sequences, expected.sequences)
    for a, e in zip(actual.logits, expected.logits, strict=True):
        assert relative_l2(a, e) < 1e-4


def test_training(pair):
    plain, enabled = pair
    ids = ids_of(2, 100)

    def loss_of(model):
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    expected = loss_of(plain)
    actual = with_kvcore(enabled, loss_of)
    assert abs(actual - expected) < 1e-5 * abs(expected)
    for (name, a), e in zip(enabled.named_parameters(), plain.parameters(), strict=True):
        if e.grad is not None and e.grad.norm() > 0:
            assert relative_l2(a.grad, e.grad) < 1e-3, name


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_bf16(name):
    # Every expert for every token: which ones are chosen is a jump that rounding decides.
    all_experts = {"num_experts_per_tok": 4} if "num_experts" in MODELS[name][2] else {}
    model = make_model(name, **all_experts)
    ids = ids_of(1, 100)
    expected = model(ids).logits
    model = model.to(torch.bfloat16)
    plain = model(ids).logits
    actual = with_kvcore(model, lambda model: model(ids).logits)
    # No farther from fp32 than transformers' own bf16, with room for chance.
    assert relative_l2(actual, expected) < 1.3 * relative_l2(plain, expected)


@torch.no_grad()
def test_packed_sequences():
    model = make_model("qwen3_next")
    states = torch.randn(1, 90, 64)
    layer = next(m for m in model.modules() if type(m).__name__.endswith("GatedDeltaNet"))
    bounds = [0, 30, 31, 90]
    parts = [layer(states[:, a:b]) for a, b in itertools.pairwise(bounds)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = with_kvcore(model, lambda _: layer(states, cu_seq_lens_q=cu_seqlens))
    assert relative_l2(packed, torch.cat(parts, 1)) < 1e-4


def functions_of(module):
    functions = {name: vars(module)[name] for name in gdn._ROUTES}
    return functions | {c.__name__: c.forward for c in norms.classes_of(module)}


def test_routes_are_counted_and_undone():
    module = module_of("qwen3_next")
    before = functions_of(module)
    first, second = make_model("qwen3_next"), make_model("qwen3_next")
    kvcore.hf.enable(first)
    kvcore.hf.enable(first)
    routed = functions_of(module)
    assert all(routed[name] is not before[name] for name in before)
    kvcore.hf.enable(second)
    assert functions_of(module) == routed
    kvcore.hf.disable(first)
    kvcore.hf.disable(first)
    assert functions_of(module) == routed
    del second
    gc.collect()
    assert functions_of(module) == before
    assert "transformers.models.qwen3_next.modeling_qwen3_next" not in gdn._routed


@torch.no_grad()
def test_unsupported_calls_go_where_they_went():
    model = make_model("qwen3_next", linear_key_head_dim=20, linear_value_head_dim=24)
    ids = ids_of(1, 30)
    expected = model(ids).logits
    actual = with_kvcore(model, lambda model: model(ids).logits)
    assert relative_l2(actual, expected) < 1e-5


@torch.no_grad()
def test_a_package_that_needs_a_gpu_is_not_called(monkeypatch):
    def no_gpu(*args, **kwargs):
        raise RuntimeError("0 active drivers")

    module = module_of("qwen3_next")
    for name in gdn._ROUTES:
        monkeypatch.setattr(module, name, no_gpu)
    model = make_model("qwen3_next")
    with pytest.raises(RuntimeError, match="0 active drivers"):
        model(ids_of(1, 10))
    logits = with_kvcore(model, lambda model: model(ids_of(1, 10)).logits)
    assert logits.isfinite().all()
    assert module.causal_conv1d_fn is no_gpu
