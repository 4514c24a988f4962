"""Exact attention of transformers' models in kvcore: what runs there, and what stays with SDPA."""

import types

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kvcore.hf
from cases import BF16, F16, F32, normal
from compare import assert_bitwise_equal, relative_l2
from hf_models import needs_hybrids
from kvcore.demo import models
from kvcore.hf import dense, plug
from kvcore.hf.attention import kvcore_attention

DTYPES = frozenset({F32, F16, BF16})


@pytest.fixture
def calls(monkeypatch):
    """Every dtype is fast; calls of the op are counted."""
    found = []
    op = dense.dense_attention
    monkeypatch.setattr(dense, "fast_dtypes", lambda: DTYPES)
    monkeypatch.setattr(dense, "dense_attention", lambda *a, **k: found.append(a) or op(*a, **k))
    return found


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def make(q_len=140, kv_len=140, dtype=F32, head_dim=64):
    """q, k and v as models have them: heads of a token next to each other."""
    sizes = ((q_len, 4), (kv_len, 2), (kv_len, 2))
    return [
        normal(2, *size, head_dim, seed=i).to(dtype).transpose(1, 2) for i, size in enumerate(sizes)
    ]


def both(*tensors, mask=None, **options):
    ours, _ = kvcore_attention(Module(), *tensors, mask, **options)
    theirs, _ = sdpa_attention_forward(Module(), *tensors, mask, **options)
    return ours, theirs


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"scaling": 0.3}], ids=str)
def test_runs_in_kvcore(calls, dtype, options):
    ours, theirs = both(*make(dtype=dtype), **options)
    assert len(calls) == 1
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert relative_l2(ours, theirs) < {F32: 1e-6, F16: 1e-3, BF16: 5e-3}[dtype]


def test_the_rest_of_a_cache_of_fixed_capacity_is_empty(calls):
    q, k, v = make(130, 170)
    ours, theirs = both(q, k[:, :, :130], v[:, :, :130])
    assert_bitwise_equal(kvcore_attention(Module(), q, k, v, None)[0], ours)
    assert len(calls) == 2
    assert relative_l2(ours, theirs) < 1e-6
    ours, theirs = both(q, k, v, is_causal=False)
    assert relative_l2(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, F32, BF16), (BF16, BF16, F32)], ids=str)
def test_autocast(calls, dtypes):
    tensors = [x.to(dtype).requires_grad_() for x, dtype in zip(make(), dtypes, strict=True)]
    with torch.autocast("cpu", BF16):
        results = both(*tensors)
    assert len(calls) == 1
    grads = [torch.autograd.grad(out.float().square().sum(), tensors) for out in results]
    for a, e in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        assert a.dtype == e.dtype
        assert relative_l2(a, e) < 1e-2


def test_what_stays_with_sdpa(calls):
    mask = torch.ones(1, 1, 140, 140, dtype=torch.bool).tril()
    stays = [
        (make(), {"mask": mask}),
        ([x.double() for x in make()], {}),
        (make(head_dim=40), {}),
        (make(head_dim=272), {}),
        (make(1, 70), {}),
        (make(127, 127), {}),
        (make(140, 130), {}),  # aligned with the first keys
        (make(140, 0), {"is_causal": False}),
    ]
    for tensors, options in stays:
        assert_bitwise_equal(*both(*tensors, **options))
    meta = [x.to("meta") for x in make()]
    assert kvcore_attention(Module(), *meta, None)[0].device.type == "meta"
    kvcore_attention(Module(), *make(), None, dropout=0.5)
    q, k, v = make()
    with pytest.raises(RuntimeError):
        kvcore_attention(Module(), q, k, v.to(BF16), None)
    assert calls == []


def test_compiled_models_keep_torchs_op(calls):
    def attend(*tensors):
        return kvcore_attention(Module(), *tensors, None)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert relative_l2(compiled(*make()), attend(*make())) < 1e-6
    assert len(calls) == 1  # of the other one


@pytest.mark.parametrize(
    ("active", "supported", "expected"),
    [
        ("scalar", ["scalar"], set()),
        ("avx2", ["scalar", "avx2", "avx512_bf16"], DTYPES),
        ("avx512", ["scalar", "avx2", "avx512"], DTYPES),
        ("avx512_bf16", ["avx512", "avx512_bf16"], DTYPES),
        ("avx512_bf16", ["avx512", "avx512_bf16", "amx"], {F32}),
        ("amx", ["avx512_bf16", "amx"], set()),
    ],
)
def test_dtypes_that_are_fast(active, supported, expected, monkeypatch):
    isa = {"active": active, "supported": supported}
    monkeypatch.setattr(kvcore, "_C", types.SimpleNamespace(cpu_isa=lambda: isa), raising=False)
    assert dense.fast_dtypes.__wrapped__() == expected


def test_without_the_host_module_nothing_is_fast(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kvcore._C", None)
    monkeypatch.delattr(kvcore, "_C", raising=False)
    assert dense.fast_dtypes.__wrapped__() == set()


# ---- models


def build(name):
    torch.manual_seed(0)
    return models.build(name).train()


@needs_hybrids
@pytest.mark.parametrize("name", models.NAMES)
def test_gradients_of_models(calls, name):
    """Those of every parameter, next to SDPA's; in bf16 no further from fp32's than they are."""
    tokens = torch.randint(0, models.VOCAB_SIZE, (2, 150), generator=torch.manual_seed(1))
    plug.register()

    def gradients(implementation, autocast):
        model = build(name)
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", BF16, enabled=autocast):
            model(tokens, labels=tokens).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, theirs = gradients("sdpa", False), gradients("sdpa", True)
    assert calls == []
    assert relative_l2(gradients("kvcore", False), exact) < 2e-6
    layers = len(calls)
    assert layers == {"hybrid": 2, "control": build("control").config.num_hidden_layers}[name]
    ours = gradients("kvcore", True)
    assert len(calls) == 2 * layers
    assert relative_l2(ours, exact) < 1.1 * relative_l2(theirs, exact)
