"""The norms of transformers' hybrid models in kvcore: which are routed, and what they compute."""

import types

import pytest
import torch
from torch import nn

import kvcore
from cases import BF16, F32, normal
from compare import assert_bitwise_equal, relative_l2
from hf_models import needs_hybrids
from kvcore.hf import gdn, norms
from kvcore.hf.norms import Norm
from test_gdn_hf import MODELS, make_model, module_of, with_kvcore

pytestmark = needs_hybrids

# Offset of the weight in each architecture's plain norm.
OFFSETS = {name: 0.0 if name == "olmo_hybrid" else 1.0 for name in MODELS}


def classes(name):
    """The plain and the gated norm of an architecture."""
    module = make_model(name) and module_of(name)  # skips where there is none
    found = norms.classes_of(module)
    gated = [c for c, norm in found.items() if norm.gated]
    plain = [c for c, norm in found.items() if not norm.gated]
    assert len(gated) == len(plain) == 1
    return plain[0], gated[0]


@pytest.fixture(params=MODELS)
def architecture(request):
    return request.param


@pytest.fixture
def routed(architecture):
    """The module's norms are in kvcore while the test lasts."""
    name = module_of(architecture).__name__
    kinds = classes(architecture)
    gdn.route([name])
    yield kinds
    gdn.restore([name])


def test_what_is_known(architecture):
    plain, gated = classes(architecture)
    assert norms.norm_of(plain).weight_offset == OFFSETS[architecture]
    assert norms.norm_of(gated).weight_offset == 0.0
    assert [norms.norm_of(kind).gated for kind in (plain, gated)] == [False, True]


def make(kind, gated, dtype, channels=64, weight_dtype=None):
    norm = kind(channels, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(normal(channels, seed=5))
    norm = norm.to(weight_dtype or dtype)
    inputs = [normal(2, 7, channels, seed=i).to(dtype).requires_grad_() for i in range(1 + gated)]
    return norm, inputs


def results(norm, inputs, d_out):
    out = norm(*inputs)
    return [out, *torch.autograd.grad(out, [*inputs, norm.weight], d_out.to(out.dtype))]


@pytest.mark.parametrize("weight_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_forward_and_backward(routed, architecture, dtype, weight_dtype, monkeypatch):
    d_out = normal(2, 7, 64, seed=9)
    calls = []
    op = kvcore.gdn_rms_norm
    monkeypatch.setattr(kvcore, "gdn_rms_norm", lambda *a, **k: calls.append(a) or op(*a, **k))
    for gated, kind in enumerate(routed):
        norm, inputs = make(kind, gated, dtype, weight_dtype=weight_dtype)
        ours = results(norm, inputs, d_out)
        assert len(calls) == gated + 1
        theirs_forward = kind.forward.__wrapped__
        norm.forward = types.MethodType(theirs_forward, norm)
        theirs = results(norm, inputs, d_out)
        assert len(calls) == gated + 1
        # In fp32: both round every input to what the other one gets.
        wide, wide_inputs = make(kind, gated, dtype, weight_dtype=weight_dtype)
        wide = wide.float()
        wide_inputs = [x.detach().float().requires_grad_() for x in wide_inputs]
        wide.forward = types.MethodType(theirs_forward, wide)
        exact = results(wide, wide_inputs, d_out.to(ours[0].dtype).float())
        for a, b, e in zip(ours, theirs, exact, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert relative_l2(a, e) < max(1.2 * relative_l2(b, e), 1e-6)


def test_autocast(routed):
    for gated, kind in enumerate(routed):
        for dtype in (F32, BF16):
            norm, inputs = make(kind, gated, dtype, weight_dtype=F32)
            with torch.autocast("cpu", BF16):
                ours = norm(*inputs)
                theirs = kind.forward.__wrapped__(norm, *inputs)
            assert ours.dtype == theirs.dtype
            assert relative_l2(ours, theirs) < (1e-6 if dtype == F32 else 5e-3)


class OwnTensor(torch.Tensor):
    """One whose functions may mean something else."""


def test_what_the_op_does_not_compute_goes_where_it_went(routed, monkeypatch):
    def no_op(*args, **kwargs):
        raise AssertionError("the op was called")

    monkeypatch.setattr(kvcore, "gdn_rms_norm", no_op)
    for gated, kind in enumerate(routed):
        theirs = kind.forward.__wrapped__
        norm, inputs = make(kind, gated, F32)
        norm = norm.double()
        doubles = [x.double() for x in inputs]
        assert_bitwise_equal(norm(*doubles), theirs(norm, *doubles))
        norm, inputs = make(kind, gated, F32)
        with torch.device("meta"):
            assert norm.to("meta")(*(x.to("meta") for x in inputs)).device.type == "meta"
        norm, inputs = make(kind, gated, F32)
        names = list(theirs.__code__.co_varnames[1 : 2 + gated])
        named = dict(zip(names, inputs, strict=True))
        assert_bitwise_equal(norm(**named), theirs(norm, *inputs))
        heir, inputs = make(types.new_class("Heir", (kind,)), gated, F32)
        assert_bitwise_equal(heir(*inputs), theirs(heir, *inputs))
        wide, inputs = make(kind, gated, F32, channels=norms.MAX_CHANNELS + 1)
        assert_bitwise_equal(wide(*inputs), theirs(wide, *inputs))
        one, _ = make(kind, gated, F32, channels=1)
        inputs = [normal(2, 7, 64, seed=i) for i in range(1 + gated)]
        assert_bitwise_equal(one(*inputs), theirs(one, *inputs))
        inputs[0] = inputs[0].as_subclass(OwnTensor)
        assert type(norm(*inputs)) is OwnTensor
    norm, (x, gate) = make(routed[1], True, F32)
    for other in (gate.to(BF16), gate[:1, :1]):
        assert_bitwise_equal(norm(x, other), routed[1].forward.__wrapped__(norm, x, other))
    norm.activation = "sigmoid"
    assert_bitwise_equal(norm(x, gate), routed[1].forward.__wrapped__(norm, x, gate))


@torch.no_grad()
def test_groups_of_channels_stay_with_transformers():
    make_model("qwen4_exp")
    kind = module_of("qwen4_exp").Qwen4ExpTextRMSNorm
    norm = kind(64, group_size=16)
    x = normal(3, 64, seed=0)
    expected = norm(x)
    model = make_model("qwen4_exp")
    assert_bitwise_equal(with_kvcore(model, lambda _: norm(x)), expected)


class RMSNormBase(nn.Module):
    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def normed(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class GoodRMSNorm(RMSNormBase):
    def forward(self, x):
        return (self.weight * self.normed(x.float())).type_as(x)


class CenteredRMSNorm(RMSNormBase):
    def forward(self, x):
        return self.weight * self.normed(x - x.mean(-1, keepdim=True))


class HalfOffsetRMSNorm(RMSNormBase):
    def forward(self, x):
        return (self.weight + 0.5) * self.normed(x)


class OtherEpsRMSNorm(RMSNormBase):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class GateFirstRMSNorm(RMSNormBase):
    def forward(self, x, gate):
        return self.weight * self.normed(x * nn.functional.silu(gate))


class SigmoidGateRMSNorm(RMSNormBase):
    def forward(self, x, gate):
        return self.weight * self.normed(x) * gate.sigmoid()


class WideRMSNorm(RMSNormBase):
    def forward(self, x):
        return self.weight.float() * self.normed(x.float())


class OptionRMSNorm(RMSNormBase):
    def __init__(self, channels, eps=1e-6):
        super().__init__(channels, eps)
        self.scale_up = False

    def forward(self, x):
        y = self.weight * self.normed(x)
        return 2 * y if self.scale_up else y


class BiasRMSNorm(RMSNormBase):
    def __init__(self, channels, eps=1e-6):
        super().__init__(channels, eps)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return self.weight * self.normed(x) + self.bias


class NeedsMoreRMSNorm(RMSNormBase):
    def __init__(self, channels, heads, eps=1e-6):
        super().__init__(channels, eps)

    def forward(self, x):
        return self.weight * self.normed(x)


UNKNOWN = [
    CenteredRMSNorm,
    HalfOffsetRMSNorm,
    OtherEpsRMSNorm,
    GateFirstRMSNorm,
    SigmoidGateRMSNorm,
    WideRMSNorm,
    OptionRMSNorm,
    BiasRMSNorm,
    NeedsMoreRMSNorm,
]


def test_classes_are_known_by_what_they_compute(monkeypatch):
    state = torch.get_rng_state()
    assert norms.norm_of(GoodRMSNorm) == Norm("eps", 0.0, False)
    for kind in UNKNOWN:
        assert norms.norm_of(kind) is None, kind
    assert_bitwise_equal(torch.get_rng_state(), state)
    module = types.ModuleType(__name__)
    for kind in (GoodRMSNorm, RMSNormBase, nn.RMSNorm, *UNKNOWN):
        setattr(module, kind.__name__, kind)
    assert list(norms.classes_of(module)) == [GoodRMSNorm]


@torch.no_grad()
def test_an_unknown_norm_in_a_known_module(monkeypatch):
    module = module_of("qwen3_next")

    class Qwen3NextRMSNorm(module.Qwen3NextRMSNorm):
        def forward(self, x):
            return super().forward(x) * 1.5

    Qwen3NextRMSNorm.__module__ = module.__name__
    monkeypatch.setattr(module, "Qwen3NextRMSNorm", Qwen3NextRMSNorm)
    model = make_model("qwen3_next")
    ids = torch.arange(3, 33)[None]
    expected = model(ids).logits
    actual = with_kvcore(model, lambda model: model(ids).logits)
    assert relative_l2(actual, expected) < 1e-5
