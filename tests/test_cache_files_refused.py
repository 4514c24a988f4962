"""TurboCache.load refuses whatever is not right, and save what a file cannot hold."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import MistralConfig

import hf_models
from cache_files import drop, filled, load, put, rewrite, row, save_all, text, value
from hf_models import needs_hybrids
from kvcore.cache import CacheFileError, TurboCache


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("saved"))


def test_files_of_other_kinds(tmp_path, saved):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    for content in (b"", b"\0" * 8, b"\xff" * 64, pickle.dumps({"a": 1}), b"PK\3\4" + b"\0" * 99):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CacheFileError, match="cannot be read"):
            load(tmp_path / "file")
    with pytest.raises(CacheFileError, match="cannot be read"):
        load(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "file")
    with pytest.raises(CacheFileError, match="format must be 'kvcore-cache', got None"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 128}, "model.hidden_size must be 128"),
        ({"num_key_value_heads": 1}, "model.num_key_value_heads must be 1"),
        ({"head_dim": 128}, "model.head_dim must be 128"),
        ({"num_hidden_layers": 3}, "model.num_hidden_layers must be 3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "model.rope_theta"),
    ],
)
def test_files_of_other_models(saved, change, field):
    with pytest.raises(CacheFileError, match=field):
        TurboCache.load(saved / "llama", hf_models.config("llama", **change))
    with pytest.raises(CacheFileError, match=r"model.model_type must be 'qwen3'"):
        load(saved / "llama", "qwen3")


def test_capacity_is_the_callers(saved):
    cache = load(saved / "llama", max_cache_len=209)
    dynamic = load(saved / "llama")
    assert torch.equal(cache.layers[0].keys.clone(), dynamic.layers[0].keys.clone())
    with pytest.raises(ValueError, match="max_cache_len must be at least 209, got 208"):
        load(saved / "llama", max_cache_len=208)
    with pytest.raises(ValueError, match="holds nothing exactly"):
        load(saved / "exact", max_cache_len=300)


def test_a_layer_without_a_file_format_is_not_saved(tmp_path):
    config = MistralConfig(num_hidden_layers=2, head_dim=64, sliding_window=16)
    cache = TurboCache(config, max_cache_len=128)
    with pytest.raises(
        NotImplementedError,
        match=r"TurboCache\.save: layer 0 is a StaticSlidingWindowLayer, which has no file format",
    ):
        cache.save(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@needs_hybrids
def test_past_states_are_not_saved(tmp_path):
    cache = filled("qwen3_next")
    cache.layers[0].activate_past_recording()
    with pytest.raises(
        NotImplementedError, match=r"TurboCache\.save: layer 0 records past states for assisted"
    ):
        cache.save(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def duplicate(metadata, parts, tensors):
    table = tensors["layers.0.block_table"]
    table[0, 0, 0, 2] = table[0, 0, 0, 1]


def unused_block(metadata, parts, tensors):
    name = "layers.0.pool4"
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    parts["layers"][0]["blocks"][1] += 1


POOL8, POOL4, TABLE, TAIL = (f"layers.0.{n}" for n in ("pool8", "pool4", "block_table", "tail"))
REFUSED = [
    (lambda m, p, t: m.update(format="other"), "format must be"),
    (lambda m, p, t: m.update(version="2"), "version must be 1, got 2"),
    (lambda m, p, t: m.update(extra="1"), "metadata must be"),
    (lambda m, p, t: (m.pop("model"), p.pop("model")), "metadata must be"),
    (text("layers", "{"), "layers must be JSON"),
    (text("layers", "[" * 100_000), "layers must be JSON"),
    (text("layers", "{}"), "layers must be JSON of a list"),
    (text("settings", "[]"), "settings must be JSON of a dict"),
    (text("model", "3"), "model must be JSON of a dict"),
    (lambda m, p, t: p["model"].pop("head_dim"), "model must be the facts"),
    (lambda m, p, t: p["settings"].pop("balance"), "settings must be an object"),
    (lambda m, p, t: p["settings"].update(balance=3), "settings do not make a cache.*balance"),
    (lambda m, p, t: p["settings"].update(sink_pages=-1), "settings do not make a cache.*sink"),
    (lambda m, p, t: p["settings"].update(sink_pages=10**30), "settings do not make a cache.*sink"),
    (lambda m, p, t: p["settings"].update(tail_margin="2"), "settings do not make a cache"),
    (lambda m, p, t: p["settings"].update(rotary_dim=2), "settings.rotary_dim must be -1"),
    (lambda m, p, t: p["settings"].update(sink_pages=0), "block_table must be entries.*width"),
    (lambda m, p, t: p["settings"].update(balance=False, subtract_mean=False), "calibrated"),
    (lambda m, p, t: p["layers"].pop(), "k_bits must have one entry|layers must be 2 long"),
    (lambda m, p, t: p["layers"].append({"kind": "turbo"}), "one entry for each|2 long"),
    (lambda m, p, t: p["layers"].__setitem__(0, 3), r"layers\[0\] must be an object"),
    (row(0, kind="linear"), r"layers\[0\].kind must be 'turbo'"),
    (row(0, kind=[]), r"layers\[0\].kind must be 'turbo'"),
    (row(0, layer_k_bits=3), "settings do not make a cache"),
    (row(0, layer_k_bits=None), "settings do not make a cache"),
    (row(0, state="full"), r"layers\[0\].state must be one of"),
    (row(0, state="empty"), r"layers\[0\] must be an object of"),
    (row(0, more=1), r"layers\[0\] must be an object of"),
    (row(0, dtype="int8"), r"layers\[0\].dtype must be one of"),
    (row(0, dtype="float64"), r"layers\[0\].dtype must be a quantizable one"),
    (row(0, dtype=[]), r"layers\[0\].dtype must be one of"),
    (row(0, batch=-1), r"layers\[0\].batch must be an int in"),
    (row(0, batch=True), r"layers\[0\].batch must be an int in"),
    (row(0, batch=2), r"layers\[0\].padding must be 2 long"),
    (row(0, kv_heads=0), r"layers\[0\].kv_heads must be"),
    (row(0, kv_heads=10**30), r"layers\[0\].kv_heads must be"),
    (row(0, kv_heads=1), r"layers\[0\].k_bits must be 1 long"),
    (row(0, head_dim=32), r"layers\[0\].head_dim must be one of"),
    (row(0, head_dim=128), "pool8 must be"),
    (row(0, num_tokens=1.5), r"layers\[0\].num_tokens must be an int"),
    (row(0, num_tokens=10**9), "block_table must be"),
    (row(0, num_tokens=64), r"layers\[0\].padding must be a list of ints in \[0, 64\]"),
    (row(0, num_tokens=130), "block_table must be"),
    (row(0, padding=[0, 0, 300]), r"layers\[0\].padding must be a list of ints"),
    (row(0, padding="000"), r"layers\[0\].padding must be a list of ints"),
    (row(0, padding=[0, 0, 0]), "block_table|tail"),
    (row(0, k_bits=[4, 3]), r"layers\[0\].k_bits must be 8, 4 or 2"),
    (row(0, k_bits=[4, 2]), r"layers\[0\].k_bits must be \[4, 4\] in any order, got \[4, 2\]"),
    (row(0, layer_v_bits=8), r"layers\[0\].v_bits must be \[8, 8\] in any order, got \[4, 4\]"),
    (row(0, v_bits=[]), r"layers\[0\].v_bits must be 2 long"),
    (row(0, blocks=[12, 24]), r"layers\[0\].blocks must be 3 long"),
    (row(0, blocks=[12, 24, 10**12]), r"layers\[0\].blocks must be a list of ints"),
    (row(0, blocks=[12, 10**6, 0]), "pool4 must be"),
    (row(0, calibrated=False), r"layers\[0\].calibrated must be True"),
    (row(0, calibrated=1), r"layers\[0\].calibrated"),
    (drop(TAIL), "tensors must be an object"),
    (lambda m, p, t: t.update(extra=torch.zeros(1)), "tensors must be an object"),
    (value(POOL4, lambda x: x[:-1]), "pool4 must be"),
    (value(POOL4, lambda x: x[:, :-1].contiguous()), "pool4 must be"),
    (value(POOL4, lambda x: x.view(torch.int8)), "pool4 must be"),
    (value(TABLE, lambda x: x.long()), "block_table must be"),
    (value("layers.0.tail_scale", lambda x: x.double()), "tail_scale must be"),
    (put(TABLE, (0, 0, 0, 1), -1), "block_table must be entries of 2 slabs"),
    (put(TABLE, (0, 0, 0, 1), 7 << 21), "block_table must be entries of 2 slabs"),
    (put(TABLE, (0, 0, 0, 1), 2**31 - 1), "block_table must be entries of 2 slabs"),
    (put(TABLE, (0, 0, 0, 1), (1 << 21) | 5000), "block_table must be entries of blocks in the"),
    (put(TABLE, (0, 0, 0, 0), 1 << 21), "block_table must be entries of blocks of the page's"),
    (put(TABLE, (1, 0, 0, 2), 1), "block_table must be -1 past the full pages"),
    (duplicate, "block_table must be entries that name each block for one page"),
    (unused_block, "block_table must be entries of all 41 blocks|block_table must be entries"),
    (put(POOL8, (0, 3), 0xBF), "pool8 must be blocks with scales"),
    (put(POOL4, (0, slice(0, 4)), torch.tensor([0, 0, 0x80, 0x7F])), "pool4 must be blocks with"),
    (put(POOL4, (0, 40), 1), "pool4 must be blocks with zero in unused bytes"),
    (put(POOL8, (1, 100), 0x80), r"pool8 must be codes in \[-119, 119\]"),
    (put(POOL4, (1, 64), 0), r"pool4 must be steps in \[1, 16\]"),
    (put(POOL4, (1, 64), 17), r"pool4 must be steps in \[1, 16\]"),
    (put(POOL4, (1, 64 + 64), 0x80), r"pool4 must be zeros in \[-119, 119\]"),
    (put(TAIL, (0, 0, 0, 0, 100), 0x80), r"tail must be codes in \[-119, 119\]"),
    (put(TAIL, (0, 0, 0, 0, 4), 3), "tail must be headers of pages"),
    (put(TAIL, (0, 0, 0, 1, 4), 1), "tail must be the open page's codes"),
    (put(TAIL, (0, 0, 0, 0, 20), 1), "tail must be blocks with zero in unused bytes"),
    (put("layers.0.clamp_count", (0, 0, 0), -1), "clamp_count must be at least 0"),
    (put("layers.0.tail_scale", (0, 0, 0), float("inf")), "tail_scale must be finite"),
    (put("layers.0.tail_scale", (0, 0, 0), -1.0), "tail_scale must be finite"),
    (put("layers.0.k_balance", (0, 0, 0), 0.0), "k_balance must be finite and at least"),
    (put("layers.0.k_balance", (0, 0, 0), float("nan")), "k_balance must be finite"),
    (put("layers.0.k_mean", (0, 0, 0), float("nan")), "k_mean must be finite"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused(tmp_path, saved, change, message):
    rewrite(saved / "llama", tmp_path / "file", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file")


REFUSED_LINEAR = [
    (row(0, states=[]), r"layers\[0\].states must be an object"),
    (row(0, states={"conv.0": [3, 8, 4]}), "tensors must be"),
    (row(0, states={"conv.0": [3, 8], "recurrent.0": [3, 4, 16, 16]}), "conv.0 must be 3 long"),
    (row(0, states={"conv.7": [3, 8, 4]}), r"layers\[0\].states must be among"),
    (row(0, states={"conv.0": [2, 8, 4], "recurrent.0": [3, 4, 16, 16]}), "of one batch"),
    (row(0, states={"conv.0": [3, 8, -4], "recurrent.0": [3, 4, 16, 16]}), "a list of ints"),
    (row(0, has_previous_state=[1]), "has_previous_state must be 1 bools"),
    (row(0, has_previous_state=[True, True]), "has_previous_state must be 1 bools"),
    (row(0, conv_kernel_size=[3]), r"conv.0 must be \[..., 3\]"),
    (row(0, conv_kernel_size=[None]), "conv_kernel_size"),
    (row(0, conv_kernel_size=["4"]), "conv_kernel_size must be 1 ints or null"),
    (row(1, kind="linear"), r"layers\[1\].kind must be 'turbo'"),
    (value("layers.0.conv.0", lambda x: x[:, :4].contiguous()), "conv.0 must be"),
    (value("layers.0.conv.0", lambda x: x.int()), "conv.0 must be"),
    (
        put("layers.0.recurrent.0", (0, 0, 0, 0), float("nan")),
        "recurrent.0 must be finite, got NaN",
    ),
]


@needs_hybrids
@pytest.mark.parametrize(("change", "message"), REFUSED_LINEAR)
def test_refused_linear(tmp_path, saved, change, message):
    rewrite(saved / "qwen3_next", tmp_path / "file", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file", "qwen3_next")


REFUSED_EXACT = [
    (row(0, k_shape=[3, 2, 29]), r"layers\[0\].k_shape must be 4 long"),
    (row(0, k_shape=[3, 2, 28, 64]), r"layers\[0\].v_shape must be"),
    (row(0, v_shape=[3, 2, 29, 10**9]), "values must be"),
    (row(0, padding=[0]), r"layers\[0\].padding must be 3 long"),
    (row(0, padding=[0, 0, 30]), r"layers\[0\].padding must be a list"),
    (row(0, dtype="bfloat16"), "keys must be"),
    (row(0, state="quantized"), r"layers\[0\] must be an object"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_EXACT)
def test_refused_exact(tmp_path, saved, change, message):
    rewrite(saved / "exact", tmp_path / "file", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file")
