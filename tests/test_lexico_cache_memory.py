"""LexicoCache: the bytes it takes and reports, and where they are."""

import functools
import subprocess
import sys

import pytest
import torch

import cache_tools
import hf_models
from cache_tools import held_storages, random_kv
from hf_models import dictionaries
from kvcore.cache import LexicoCache, LexicoLayer

pytestmark = pytest.mark.usefixtures("restored_models")

BLOCK = 4096


lexico_layer = functools.partial(cache_tools.lexico_layer, k_sparsity=4, v_sparsity=6)


@pytest.mark.parametrize("name", ["llama", *hf_models.HYBRID_NAMES])
@pytest.mark.parametrize("tokens", [15, 300, BLOCK + 200])
def test_nbytes_are_those_of_the_storages(generator, name, tokens):
    cache = LexicoCache(hf_models.config(name), dictionaries(name), k_sparsity=3, v_sparsity=5)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LexicoLayer):
            cache.update(*random_kv(generator, 2, tokens), i)
            cache.update(*random_kv(generator, 2, 1), i)
        else:
            cache.update_conv_state(torch.randn(2, 8, 4), i)
            cache.update_recurrent_state(torch.randn(2, 4, 16, 16), i)
    report = cache.memory_report()
    assert report["dictionary_bytes"] == dictionaries(name).nbytes()
    held = held_storages(cache) - report["dictionary_bytes"]
    assert cache.nbytes() == report["nbytes"] == held
    assert report["nbytes"] == report["kv_bytes"] + report["state_bytes"]
    for row in report["layers"]:
        if row["kind"] == "LexicoLayer":
            assert row["kv_bytes"] == sum(
                row[name] for name in ("blocks", "tail", "buffer", "session")
            )
            assert row["coded_tokens"] == max(0, tokens - 128)
            assert row["tokens"] == [tokens + 1] * 2
            assert (row["encoder_workspace"] > 0) == (tokens > 128)


def test_every_tensor_of_a_store_moves(generator):
    layer = lexico_layer()
    mask = torch.ones(2, 100)
    mask[1, :30] = 0
    layer.tracker.announce(mask, native=True)
    layer.update(*random_kv(generator, 2, 100))
    layer.update(*random_kv(generator, 2, 1))
    layer.store.to(torch.device("meta"))
    devices = {kind: {x.device.type for x in xs} for kind, xs in layer.tensors().items() if xs}
    assert devices
    assert set().union(*devices.values()) == {"meta"}, devices


@pytest.mark.parametrize("sparsity", [8, 16])
def test_bytes_of_a_vector(generator, sparsity):
    """At most 3 s + 4 in blocks, and what is spare in a tail is less than an eighth."""
    layer = lexico_layer(k_sparsity=sparsity, v_sparsity=sparsity, buffer_tokens=0)
    layer.update(*random_kv(generator, 1, 3 * BLOCK, heads=1))
    assert layer.report()["blocks"] <= 2 * 3 * BLOCK * (3 * sparsity + 4)
    layer = lexico_layer(k_sparsity=sparsity, v_sparsity=sparsity, buffer_tokens=0)
    for _ in range(60):
        layer.update(*random_kv(generator, 1, 33, heads=1))
    tokens = layer.get_seq_length()
    assert layer.report()["tail"] - 4 <= 2 * 9 / 8 * (tokens + 32) * (3 * sparsity + 2)


def test_the_encoders_workspace_is_what_it_takes(tmp_path):
    """The process's own peak while a prompt is coded."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    script = """
import sys
sys.path.insert(0, "tests")
import torch
import hf_models
from hf_models import dictionaries
from kvcore.cache import LexicoLayer, LexicoSettings

torch.set_num_threads(1)
settings = LexicoSettings(k_sparsity=16, v_sparsity=16)
layer = LexicoLayer(settings, dictionaries("llama", (3000, 3000)))
k = torch.randn(1, 1, 3000, 64)
layer.update(k[:, :, :200], k[:, :, :200])
layer.reset()

def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = resident("VmRSS")
layer.update(k, k)
print(resident("VmHWM") - before - layer.nbytes(), layer.report()["encoder_workspace"])
"""
    run = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=300
    )
    used, said = map(int, run.stdout.split())
    assert 0.9 * said < used < 1.1 * said + (4 << 20)
