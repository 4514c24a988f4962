"""Which layer is of which kind, how much memory they take, lazy imports."""

import subprocess
import sys

import pytest
import torch
from transformers import MistralConfig

import hf_models
import kvcore.hf
from cache_tools import (
    held_storages,
    hybrid_config,
    lexico_layer,
    plain_config,
    random_kv,
    turbo_layer,
)
from hf_models import needs_hybrids
from kvcore.cache import CompressedCache, TurboCache
from kvcore.cache.layer import CompressedLayer
from kvcore.cache.linear import linear_states

pytestmark = pytest.mark.usefixtures("no_fallback_reasons")


# ---- layout


@needs_hybrids
def test_layers_of_a_hybrid():
    cache = TurboCache(hybrid_config())
    names = [type(layer).__name__ for layer in cache.layers]
    assert names == ["LinearAttentionLayer"] * 3 + ["TurboLayer"]
    assert not cache.is_croppable
    assert TurboCache(hybrid_config()).settings.rotary_dim == 16


def test_layers_follow_the_model():
    sliding = MistralConfig(num_hidden_layers=2, head_dim=64, sliding_window=16)
    with pytest.warns(RuntimeWarning, match="nothing to compress"):
        names = {type(layer).__name__ for layer in TurboCache(sliding).layers}
    assert names == {"DynamicSlidingWindowLayer"}
    cache = TurboCache(plain_config(), k_bits=[8, 2], v_bits=[4, 8])
    assert [(s.settings.k_bits, s.settings.v_bits) for s in cache.layers] == [(8, 4), (2, 8)]
    assert (cache.is_croppable, cache.is_compileable) == (True, False)
    static = TurboCache(plain_config(), max_cache_len=128)
    assert static.is_compileable
    assert static.layers[0].get_max_length() == 128


def test_partial_rotation_is_known():
    assert TurboCache(plain_config()).settings.rotary_dim == -1
    half = plain_config(rope_parameters={"rope_theta": 1e4, "rope_type": "default",
                                   "partial_rotary_factor": 0.5})  # fmt: skip
    assert TurboCache(half).settings.rotary_dim == 32


def test_unsupported_head_dim_stays_exact():
    with pytest.warns(RuntimeWarning, match="unsupported head_dim: got 80"):
        cache = TurboCache(plain_config(head_dim=80))
    assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
    assert kvcore.hf.fallback_reasons() == {"unsupported head_dim": 1}


def test_a_model_with_nothing_to_compress_is_named():
    config = hf_models.config(hf_models.SLIDING, layer_types=["sliding_attention"] * 2)
    said = "nothing to compress: no layer has plain full attention; there are: DynamicSlidingWin"
    with pytest.warns(RuntimeWarning, match=said):
        cache = TurboCache(config)
    assert cache.compressed_layers() == []
    assert kvcore.hf.fallback_reasons() == {"nothing to compress": 1}


@pytest.mark.parametrize(
    ("make_layer", "k_dim", "v_dim", "dtype", "reason"),
    [
        (turbo_layer, 64, 128, torch.float32, "unsupported different K and V"),
        (turbo_layer, 48, 48, torch.float32, "unsupported head_dim"),
        (turbo_layer, 64, 64, torch.float64, "unsupported dtype"),
        # There are no dictionaries of another head_dim.
        (lexico_layer, 64, 128, torch.float32, "unsupported different K and V"),
        (lexico_layer, 64, 64, torch.float64, "unsupported dtype"),
    ],
)
def test_what_has_no_kernel_is_kept_exactly(generator, make_layer, k_dim, v_dim, dtype, reason):
    layer = make_layer()
    k = torch.randn(2, 2, 200, k_dim, generator=generator, dtype=dtype)
    v = torch.randn(2, 2, 200, v_dim, generator=generator, dtype=dtype)
    with pytest.warns(RuntimeWarning, match=reason):
        layer.update(k[:, :, :150], v[:, :, :150])
    keys, values = layer.update(k[:, :, 150:], v[:, :, 150:])
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    assert reason in kvcore.hf.fallback_reasons()
    layer.crop(-20)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, k[[1, 1], :, :180])


@needs_hybrids
def test_batch_calls_reach_linear_layers(generator):
    cache = TurboCache(hybrid_config())
    conv = torch.randn(2, 8, 4, generator=generator)
    state = torch.randn(2, 4, 16, 16, generator=generator)
    cache.update_conv_state(conv, 0)
    cache.update_recurrent_state(state, 0)
    cache.update(*random_kv(generator, 2, 100), 3)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    held = linear_states(cache.layers[0])
    assert torch.equal(held[0], conv[[1, 0, 0]])
    assert torch.equal(held[1], state[[1, 0, 0]])
    assert cache.layers[3].batch_size == 3
    assert not cache.is_croppable


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        (CompressedCache, {"file_settings", "from_file"}),
        (
            CompressedLayer,
            {"_begin", "_append", "export_store", "stored_form", "check_stored", "restore_store"},
        ),
    ],
)
def test_a_subclass_that_lacks_something_is_not_built(base, missing):
    assert base.__abstractmethods__ == missing
    for name in missing:
        others = dict.fromkeys(missing - {name}, lambda *_: None)
        with pytest.raises(TypeError, match=rf"Incomplete .*abstract method '?{name}"):
            type("Incomplete", (base,), others)(None)


# ---- memory


@pytest.mark.parametrize(
    "kind", ["exact", "store", "beams", "static", pytest.param("hybrid", marks=needs_hybrids)]
)
def test_nbytes_are_those_of_the_storages(generator, kind):
    static = {"max_cache_len": 500} if kind == "static" else {}
    cache = TurboCache(hybrid_config() if kind == "hybrid" else plain_config(), **static)
    if kind == "hybrid":
        cache.update_conv_state(torch.randn(2, 8, 4), 0)
        cache.update_recurrent_state(torch.randn(2, 4, 16, 16), 0)
    layers = [3] if kind == "hybrid" else [0, 1]
    for tokens in (20, 300 if kind != "exact" else 20, 1, 1, 70 if kind != "exact" else 1):
        for layer in layers:
            cache.update(*random_kv(generator, 2, tokens), layer)
    if kind == "beams":
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([0, 0, 2, 1]))
    held = held_storages(cache)
    assert held > 0
    assert abs(cache.nbytes() - held) <= 0.01 * held
    report = cache.memory_report()
    assert report["nbytes"] == report["kv_bytes"] + report["state_bytes"]
    assert report["nbytes"] == sum(row["nbytes"] for row in report["layers"])
    assert (report["state_bytes"] > 0) == (kind == "hybrid")
    for row in report["layers"]:
        if row["kind"].endswith("TurboLayer"):
            pool = sum(size for name, size in row["pool"].items() if name != "free")
            parts = sum(row[name] for name in ("tail", "table", "calibration", "exact"))
            assert row["kv_bytes"] == pool + parts


def test_clamped_values_are_reported(generator):
    cache = TurboCache(plain_config())
    k, v = random_kv(generator, 1, 100)
    cache.update(k, v, 0)
    cache.update(k[:, :, :1] * 100, v[:, :, :1], 0)
    row = cache.memory_report()["layers"][0]
    assert row["k_clamped"] > 0
    assert row["v_clamped"] == 0
    assert cache.memory_report()["clamped"] == row["k_clamped"]


@pytest.fixture(scope="module")
def long_layer():
    """32k tokens of 8 heads at 4 bits."""
    layer = turbo_layer()
    generator = torch.Generator().manual_seed(1)
    layer.update(*random_kv(generator, 1, 32 * 1024, heads=8, head_dim=128))
    return layer


def test_bits_per_element(long_layer):
    generator = torch.Generator().manual_seed(2)
    tokens = long_layer.get_seq_length()
    for _ in range(5):
        elements = 2 * tokens * 8 * 128
        assert 8 * long_layer.nbytes() / elements <= 4.4
        long_layer.update(*random_kv(generator, 1, 64, heads=8, head_dim=128))
        tokens += 64


def test_a_step_needs_little_more_memory_than_the_store(long_layer):
    """The process's own peak, so that scratch of the kernels counts."""
    status = "/proc/self/status"
    if sys.platform != "linux":
        pytest.skip("reads /proc")

    def resident(name):
        with open(status) as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 16, 1, 128, generator=generator)
    k, v = random_kv(generator, 1, 1, heads=8, head_dim=128)
    for step in range(70):  # a page fills among them
        if step == 3:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets the peak
            before = resident("VmRSS")
        long_layer.update(k, v)
        long_layer.store.decode(q, scale=None, causal=True)
    assert resident("VmHWM") - before <= 0.1 * long_layer.nbytes()


def test_soak_holds_memory(generator):
    """Decode, rewind and decode again: nothing is left behind."""
    layer = turbo_layer()
    layer.update(*random_kv(generator, 2, 200))
    k, v = random_kv(generator, 2, 40)
    sizes = []
    for round_idx in range(60):
        layer.update(k, v)
        layer.update(k, v)
        layer.reorder_cache(torch.tensor([1, 0] if round_idx % 2 else [0, 0]))
        layer.crop(-80)
        sizes.append(layer.nbytes())
    assert sizes[-1] == sizes[5]


# ---- imports


def test_transformers_is_needed_only_by_name():
    script = """
import sys
sys.modules["transformers"] = None
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
del sys.modules["transformers"]
sys.meta_path.insert(0, Block())
import kvcore, kvcore.cache, kvcore.hf
assert kvcore.hf.fallback_reasons() == {}
kvcore.cache.TurboSettings(k_bits=8)
for module, name in ((kvcore.cache, "TurboCache"), (kvcore.hf, "enable")):
    try:
        getattr(module, name)
    except ImportError as error:
        assert "needs transformers >= 5.0" in str(error), error
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_unknown_names():
    with pytest.raises(AttributeError, match=r"kvcore.cache' has no attribute 'Nothing'"):
        kvcore.cache.Nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"kvcore.hf' has no attribute 'nothing'"):
        kvcore.hf.nothing  # noqa: B018
    assert {"TurboCache", "TurboStore"} <= set(dir(kvcore.cache))
