"""kvcore doctor: its self-checks catch wrong ops, and its probe finds what was planted."""

import json
import math

import pytest
import torch

import kvcore
from kvcore import doctor
from kvcore.doctor import environment, report, selfcheck

transformers = pytest.importorskip("transformers")

from kvcore.demo import textmodel  # noqa: E402
from kvcore.doctor import probe  # noqa: E402
from kvcore.eval.caches import CacheChoice  # noqa: E402

OPS = selfcheck.op_names()


# ---- self-checks


def test_every_op_has_a_self_check():
    assert {"turbo_attention", "turbo_decode"} <= set(OPS)
    assert set(OPS) == set(selfcheck.CHECKS)


@pytest.mark.parametrize("op", OPS)
def test_op_passes(op):
    check = selfcheck.check_op(op, "cpu")
    assert check.status == "ok", check.detail


def _spoil(result):
    """The first float output off by 2 % of its size, or the first byte of an integer one by 1."""
    outputs = list(result) if isinstance(result, tuple) else [result]
    noise = torch.Generator().manual_seed(0)
    first = outputs[0]
    if first.is_floating_point():
        random = torch.randn(first.shape, generator=noise)
        outputs[0] = first + 0.02 * random * first.square().mean().sqrt()
    else:
        outputs[0] = first.clone()
        outputs[0].view(-1)[0] += 1
    return tuple(outputs) if isinstance(result, tuple) else outputs[0]


@pytest.mark.parametrize("op", OPS)
def test_wrong_op_is_caught(op, monkeypatch):
    right = getattr(kvcore, op)

    def wrong(*args, **kwargs):
        if op in ("turbo_append", "turbo_rewind", "lexico_append"):
            return None  # in-place ops: nothing is done
        return _spoil(right(*args, **kwargs))

    monkeypatch.setattr(kvcore, op, wrong)
    check = selfcheck.check_op(op, "cpu")
    assert check.status == "failed"
    assert check.detail


def test_nan_is_caught(monkeypatch):
    right = kvcore.turbo_decode
    monkeypatch.setattr(
        kvcore, "turbo_decode", lambda *a, **k: tuple(x * math.nan for x in right(*a, **k))
    )
    assert selfcheck.check_op("turbo_decode", "cpu").status == "failed"


def test_raising_op_is_reported_in_one_line(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(kvcore, "turbo_calibrate", broken)
    check = selfcheck.check_op("turbo_calibrate", "cpu")
    assert (check.status, check.detail) == ("failed", "RuntimeError: first line")


def test_absent_kernel_is_missing(monkeypatch):
    monkeypatch.setattr(selfcheck, "has_kernel", lambda op, device: False)
    check = selfcheck.check_op("turbo_decode", "cuda")
    assert (check.status, check.detail) == ("missing", "no cuda kernel is registered")


# ---- environment


def test_diagnosis_is_json_and_renders():
    diagnosis = json.loads(json.dumps(doctor.diagnose()))
    assert doctor.healthy(diagnosis)
    text = doctor.render(diagnosis)
    assert f"torch {torch.__version__}" in text
    for op in OPS:
        assert f"{op} on cpu" in text
    assert diagnosis["environment"]["cpu_isa"]["active"] in text


def _check(status, device="cpu"):
    return {"op": "turbo_decode", "device": device, "status": status, "detail": "", "seconds": 0}


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        ([_check("ok")], True),
        ([_check("ok"), _check("failed", "cuda")], False),
        ([_check("missing")], False),
        ([_check("ok"), _check("missing", "cuda")], True),
    ],
)
def test_healthy(checks, expected):
    assert doctor.healthy({"checks": checks}) is expected


def _environment(**changes):
    loaded = {"path": "x", "loaded": True, "reason": ""}
    env = {
        "libraries": [{"name": name, **loaded} for name in ("kvcore_cpu", "kvcore_cuda", "_C")],
        "torch_cuda": "13.0",
        "gpus": [{"name": "GPU", "arch": "sm_86"}],
        "no_gpu": "",
        "transformers": "5.23.0",
        "cpu_isa": {
            "built": ["scalar", "avx2"],
            "supported": ["scalar", "avx2"],
            "obstacles": {},
            "opt_in": {},
            "active": "avx2",
            "override": None,
        },
    }
    return env | changes


def _not_loaded(name, reason):
    libraries = _environment()["libraries"]
    return [
        library | {"loaded": False, "reason": reason} if library["name"] == name else library
        for library in libraries
    ]


@pytest.mark.parametrize(
    ("changes", "what", "reason", "remedy"),
    [
        (
            {"libraries": _not_loaded("kvcore_cuda", "not built")},
            "CUDA kernels",
            "not built",
            "KVCORE_CUDA=ON",
        ),
        (
            {"libraries": _not_loaded("kvcore_cuda", "not built"), "torch_cuda": None},
            "CUDA kernels",
            "not built",
            "install a CUDA build of torch",
        ),
        (
            {"libraries": _not_loaded("kvcore_cuda", "a build without CUDA"), "torch_cuda": None},
            "CUDA tensors are refused",
            "a build without CUDA",
            "install a CUDA build of torch",
        ),
        (
            {
                "libraries": _not_loaded(
                    "kvcore_cuda", "libx.so.1: cannot open shared object file: No such file"
                )
            },
            "CUDA tensors are refused",
            "libx.so.1",
            "install what the loader misses, or rebuild",
        ),
        (
            {"build": {"cuda_archs": ["90a-real", "120-real"]}},
            "CUDA tensors are refused",
            "built for 90a-real 120-real, which does not run on sm_86",
            "-DKVCORE_CUDA_ARCHS=86",
        ),
        (
            {"gpus": [], "no_gpu": "Found no NVIDIA driver on your system"},
            "CUDA kernels",
            "torch finds no GPU: Found no NVIDIA driver",
            "nvidia-smi",
        ),
        (
            {"libraries": _not_loaded("_C", "not built for this Python")},
            "kvcore._C",
            "not built for this Python",
            "pip install",
        ),
        (
            {"cpu_isa": _environment()["cpu_isa"] | {"active": "scalar", "override": "scalar"}},
            "CPU kernels at avx2",
            "KVCORE_CPU_ISA=scalar asks for scalar",
            "unset KVCORE_CPU_ISA",
        ),
        (
            {
                "cpu_isa": _environment()["cpu_isa"]
                | {"obstacles": dict.fromkeys(["avx512", "avx512_vnni"], "not on this CPU")}
            },
            "CPU kernels at avx512, avx512_vnni",
            "not on this CPU",
            "none needed",
        ),
        (
            {
                "cpu_isa": _environment()["cpu_isa"]
                | {"supported": ["scalar", "avx2", "amx"], "opt_in": {"amx": "never run"}}
            },
            "CPU kernels at amx",
            "available, but opt-in: never run",
            "KVCORE_CPU_ISA=amx",
        ),
        (
            {"cpu_isa": {"override": "sse9", "reason": "KVCORE_CPU_ISA names no level"}},
            "CPU kernels",
            "KVCORE_CPU_ISA names no level",
            "unset KVCORE_CPU_ISA",
        ),
        ({"transformers": None}, "kvcore.cache", "transformers is not installed", "pip install"),
    ],
)
def test_fallback_says_why_and_what_to_do(changes, what, reason, remedy, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (fallback,) = environment.fallbacks(_environment(**changes))
    assert what in fallback["what"]
    assert reason in fallback["reason"]
    assert remedy in fallback["remedy"]


def test_no_fallback_where_all_is_used():
    assert environment.fallbacks(_environment()) == []
    assert environment.fallbacks(_environment(build={"cuda_archs": ["80"]})) == []
    opted_in = {"supported": ["scalar", "avx2", "amx"], "active": "amx", "override": "amx"}
    isa = _environment()["cpu_isa"] | opted_in | {"opt_in": {"amx": "never run"}}
    assert environment.fallbacks(_environment(cpu_isa=isa)) == []


@pytest.mark.parametrize(
    ("archs", "gpu", "expected"),
    [
        (["80"], "sm_75", False),
        (["80"], "sm_80", True),
        (["80"], "sm_90", True),  # through PTX
        (["80-real"], "sm_86", True),
        (["80-real"], "sm_90", False),
        (["86-real"], "sm_80", False),
        (["90a-real"], "sm_90", True),
        (["90a"], "sm_100", False),
        (["80", "90a-real", "120-real"], "sm_120", True),
    ],
)
def test_which_gpus_a_build_runs_on(archs, gpu, expected):
    assert environment._runs_on(archs, gpu) is expected


# ---- the probe


def _model(kind="llama", layers=2, **changes):
    config = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    } | changes
    kinds = {
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "gpt2": lambda **_: transformers.GPT2Config(n_embd=64, n_head=2, n_layer=2, vocab_size=256),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(kinds[kind](**config)).eval()


def _text_model(model, name="test"):
    def encode(text):
        return torch.tensor([list(text.encode())])

    return textmodel.TextModel(name, model, encode, textmodel.ByteDecoder, 2048)


def _examine(model, **kwargs):
    return doctor.examine(_text_model(model), probe.default_text(), max_tokens=320, **kwargs)


def test_k_channels_finds_planted_outliers():
    k = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
    plain = probe.k_channels(k)
    assert plain["num_outliers"] == 0
    assert plain["widest"] == []
    k[:, 1, :, 7] *= 30
    k[:, 0, :, 50] += 100  # a mean is no outlier: it is taken out
    found = probe.k_channels(k)
    assert found["num_outliers"] == 1
    assert found["widest"][0][:2] == [1, 7]
    assert 20 < found["max_ratio"] < 45
    assert found["mean_ratio"] > 20


def test_recommend_takes_the_smallest_that_fits():
    errors = {"2 bit": 0.5, "K4V2": 0.2, "4 bit": 0.05, "8 bit": 0.01}
    assert probe.recommend(errors, 1.0) == CacheChoice(k_bits=2, v_bits=2)
    assert probe.recommend(errors, 0.3) == CacheChoice(k_bits=4, v_bits=2)
    assert probe.recommend(errors, 0.1) == CacheChoice(k_bits=4, v_bits=4)
    assert probe.recommend(errors, 0.02) == CacheChoice(k_bits=8, v_bits=8)
    assert probe.recommend(errors, 0.001) is None
    assert probe.recommend(dict.fromkeys(errors, math.nan), 1.0) is None


def test_examine_reports_layers_and_caches():
    model = _model()
    before = model.config._attn_implementation
    found = json.loads(json.dumps(_examine(model)))
    assert model.config._attn_implementation == before
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        assert (layer["q_heads"], layer["kv_heads"], layer["head_dim"]) == (2, 1, 64)
        assert layer["qk_norm"] is False
        errors = layer["errors"]
        assert 0 < errors["8 bit"] < errors["4 bit"] < errors["2 bit"]
    caches = found["caches"]
    assert caches["full"]["kl"] == 0
    assert caches["full"]["agreement"] == 1
    assert 0 < caches["8 bit"]["kl"] < caches["2 bit"]["kl"]
    assert caches["8 bit"]["kv_bytes"] > caches["2 bit"]["kv_bytes"]
    assert found["recommended"] is not None
    text = report.render(doctor.diagnose() | {"model": found})
    assert "Recommended: TurboCache(config, k_bits=" in text


def test_examine_sees_qk_norm():
    found = _examine(_model("qwen3"))
    assert all(layer["qk_norm"] for layer in found["layers"])


def test_examine_finds_outliers_and_what_balance_saves():
    """Two rotary pairs of one layer's K at 16 times the size: seen there, and there only."""
    model = _model()
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        for channel in (5, 5 + 32, 20, 20 + 32):
            attention.k_proj.weight[channel] *= 16
            for head in range(2):
                attention.q_proj.weight[head * 64 + channel] /= 16
    first, second = _examine(model)["layers"]
    untouched = _examine(_model())["layers"][1]
    assert first["k"]["num_outliers"] == untouched["k"]["num_outliers"] == 0
    assert {channel for _, channel, _ in second["k"]["widest"]} == {5, 37, 20, 52}
    without = "error_8bit_without_balance_and_mean"
    assert second[without] > 3 * untouched[without]
    assert second["errors"]["8 bit"] < second[without] / 3


def test_examine_names_what_is_not_supported():
    narrow = _examine(_model(head_dim=32))
    reason = "head_dim is 32; supported: 64, 96, 128, 256, K and V alike"
    assert narrow["layers"][0]["unsupported"] == reason
    assert (narrow["recommended"], narrow["reason"]) == (None, reason)
    assert "full precision: head_dim is 32" in "\n".join(report._model_lines(narrow))

    sliding = _examine(
        _model("qwen3", use_sliding_window=True, sliding_window=100, max_window_layers=1)
    )
    assert "unsupported" not in sliding["layers"][0]
    assert "sliding window" in sliding["layers"][1]["unsupported"]


@pytest.mark.parametrize(
    ("text", "max_tokens", "message"),
    [
        ("short", 1024, "the text must have at least 256 tokens, got 5"),
        ("x" * 300, 100, "max_tokens must be at least 256, got 100"),
    ],
)
def test_examine_rejects(text, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        doctor.examine(_text_model(None), text, max_tokens=max_tokens)


def test_layers_at_widths_of_their_own():
    def layer(index, recommended):
        return {"layer": index, "recommended": recommended}

    four, eight = {"k_bits": 4, "v_bits": 4}, {"k_bits": 8, "v_bits": 8}
    config = _model(layers=3).config
    mixed = probe._by_layer([layer(0, four), layer(2, eight)], config)
    assert (mixed.k_bits, mixed.v_bits) == ((4, 8, 8), (4, 8, 8))
    assert mixed.label == "by layer"
    assert probe._by_layer([layer(0, four), layer(2, four)], config) is None
    assert probe._by_layer([layer(0, four), layer(2, None)], config) is None
    assert probe._by_layer([layer(0, four), {"layer": 2, "unsupported": "x"}], config) is None
