"""LexicoCache.save and load: what was saved comes back, to the bit; the rest is refused."""

import pytest
import torch

import hf_models
import kvcore.hf
from cache_files import (
    check_decoding_continues,
    drop,
    filled,
    load,
    load_lexico,
    put,
    rewrite,
    row,
    save_all_lexico,
    text,
    value,
)
from cache_tools import FailingAllocation, random_kv, stored
from hf_models import NAMES, dictionaries, lexico_cache
from kvcore.cache import CacheFileError, LexicoCache


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_all_lexico(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("tokens", [20, 150])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_continues_bitwise(tmp_path, name, tokens):
    cache = lexico_cache(name, k_sparsity=5, v_sparsity=9, v_tolerance=0.2)
    other = check_decoding_continues(tmp_path / "cache", name, tokens, cache, load_lexico)
    assert other.settings == cache.settings


def test_blocks_and_spare_room(tmp_path, generator):
    """Blocks come back, and are cut and filled as before; spare tiles are left out."""
    cache = filled(make=lexico_cache, tokens=4200, k_sparsity=2, v_sparsity=3)
    cache.batch_select_indices(torch.tensor([1, 2, 2]))
    cache.save(tmp_path / "cache")
    other = load_lexico(tmp_path / "cache")
    for change in (lambda each: None, lambda each: each.crop(-300)):
        for each in (cache, other):
            change(each)
            for i in range(2):
                each.update(*random_kv(torch.Generator().manual_seed(i), 3, 70), i)
        for one, two in zip(cache.layers, other.layers, strict=True):
            assert torch.equal(stored(one), stored(two))
            assert len(one.store.codes.blocks) == len(two.store.codes.blocks)
    for _ in range(30):
        cache.update(*random_kv(generator, 3, 9), 0)
    cache.save(tmp_path / "cache")
    assert load_lexico(tmp_path / "cache").nbytes() < cache.nbytes()


def test_atoms_of_its_own_come_back(tmp_path, generator):
    config = hf_models.config("llama")
    arguments = {"k_sparsity": 2, "v_sparsity": 2, "k_tolerance": 0.4, "v_tolerance": 0.5}
    cache = lexico_cache("llama", adaptive_bytes=4 * 64 * 900, **arguments)
    for i in range(2):
        cache.update(*random_kv(generator, 2, 120), i)
    cache.save(tmp_path / "cache")
    other = load_lexico(tmp_path / "cache")
    rows = other.memory_report()["layers"]
    assert [row["atoms"] for row in rows] == [
        row["atoms"] for row in cache.memory_report()["layers"]
    ]
    assert rows[0]["atoms"][0] > 96
    k, v = random_kv(generator, 2, 90)
    for each in (cache, other):
        each.update(k, v, 0)
    assert torch.equal(stored(cache.layers[0]), stored(other.layers[0]))
    changes = [
        (row(0, atoms=[95, 80]), r"layers\[0\].atoms must be from \[96, 80\] to \[996, 980\]"),
        (row(0, atoms=[96, 981]), r"layers\[0\].atoms must be from"),
        (row(0, atoms=[96]), r"layers\[0\].atoms must be from"),
        (row(0, atoms=[96, 80]), r"k_atoms must be torch.float32 \[0, 64\]"),
        (value("layers.0.k_atoms", lambda x: 1.01 * x), "k_atoms must be of atoms of norm 1"),
        (put("layers.0.v_atoms", (0, 0), float("nan")), "v_atoms must be of atoms of norm 1"),
        (lambda m, p, t: p["settings"].update(adaptive_bytes=0), "atoms must be from"),
    ]
    for change, message in changes:
        rewrite(tmp_path / "cache", tmp_path / "changed", change)
        with pytest.raises(CacheFileError, match=message):
            LexicoCache.load(tmp_path / "changed", config, dictionaries("llama"))


def test_empty_and_exact_layers(tmp_path, saved):
    cache = lexico_cache("llama")
    cache.save(tmp_path / "cache")
    assert load_lexico(tmp_path / "cache").get_seq_length() == 0
    kvcore.hf.clear_fallback_reasons()
    with pytest.warns(RuntimeWarning, match="unsupported dtype"):
        exact = load_lexico(saved / "exact")
    assert exact.get_seq_length() == 29
    assert exact.layers[0].keys.dtype == torch.float64


def test_saving_fails_as_a_whole(tmp_path):
    cache = filled(make=lexico_cache)
    (tmp_path / "cache").write_bytes(b"what was there")
    with pytest.raises(torch.OutOfMemoryError), FailingAllocation(3):
        cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == b"what was there"
    cache.layers[1].store.buffer[0, 0, 0, 3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"Cache.save: keys of layer 1 holds NaN"):
        cache.save(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_codes_are_of_their_dictionaries(saved, tmp_path):
    config = hf_models.config("llama")
    with pytest.raises(CacheFileError, match=r"settings.dictionaries must be .*, that of those"):
        LexicoCache.load(saved / "llama", config, dictionaries("llama", (96, 81)))
    with pytest.raises(ValueError, match=r"model.model_type must be 'qwen3' as the config"):
        load_lexico(saved / "llama", "qwen3")
    with pytest.raises(CacheFileError, match="format must be 'kvcore-cache', got 'kvcore-lexico-c"):
        load(saved / "llama")
    filled().save(tmp_path / "turbo")
    with pytest.raises(CacheFileError, match="format must be 'kvcore-lexico-cache', got 'kvcore-c"):
        load_lexico(tmp_path / "turbo")


def bits(number):
    return torch.tensor([number & 255, number >> 8])


K_TAIL, V_TAIL = "layers.0.k_tail", "layers.0.v_tail"
K_BLOCK, V_BLOCK = "layers.0.k_block.0", "layers.0.v_block.0"
REFUSED = [
    ("llama", lambda m, p, t: p["settings"].pop("k_sparsity"), "settings must be an object of"),
    ("llama", lambda m, p, t: p["settings"].update(k_sparsity=0), "settings do not make a cache"),
    ("llama", lambda m, p, t: p["settings"].update(v_tolerance="0"), "settings do not make"),
    ("llama", lambda m, p, t: p["settings"].update(k_sparsity=4), "k_tail must be torch.uint8"),
    ("llama", lambda m, p, t: p["settings"].update(dictionaries=""), "settings.dictionaries must"),
    ("llama", lambda m, p, t: p["settings"].update(buffer_tokens=3, encode_tokens=4), "buffer_len"),
    ("llama", text("layers", "{}"), "layers must be JSON of a list"),
    ("llama", lambda m, p, t: p["layers"].pop(), "layers must be 2 long"),
    ("llama", row(0, kind="turbo"), r"layers\[0\].kind must be 'lexico'"),
    ("llama", row(0, state="quantized"), r"layers\[0\].state must be one of"),
    ("llama", row(0, state="empty"), r"layers\[0\] must be an object of"),
    ("llama", row(0, more=1), r"layers\[0\] must be an object of"),
    ("llama", row(0, dtype="float64"), r"layers\[0\].dtype must be a quantizable one"),
    ("llama", row(0, dtype="float16"), r"layers.0.keys must be torch.float16"),
    ("llama", row(0, batch=2), r"layers\[0\].padding must be 2 long"),
    ("llama", row(0, kv_heads=10**30), r"layers\[0\].kv_heads must be"),
    ("llama", row(0, kv_heads=1), "layers.0.keys must be"),
    ("llama", row(0, head_dim=128), r"layers\[0\].head_dim must be the dictionaries' 64, got 128"),
    ("llama", row(0, head_dim=65), r"layers\[0\].head_dim must be one of"),
    ("llama", row(0, num_tokens=10**9), r"layers\[0\].blocks must be 244140 pairs of sizes"),
    ("llama", row(0, num_tokens=100), "k_tail must be"),
    ("llama", row(0, padding=[0, 0, 300]), r"layers\[0\].padding must be a list of ints"),
    ("llama", row(0, buffer_len=33), r"layers\[0\].buffer_len must be an int in \[0, 32\]"),
    ("llama", row(0, buffer_len=-1), r"layers\[0\].buffer_len must be an int"),
    ("llama", row(0, blocks=[[128, 8352]]), r"layers\[0\].blocks must be 0 pairs"),
    ("llama", row(0, blocks=None), r"layers\[0\].blocks must be 0 pairs"),
    ("llama", drop(V_TAIL), "tensors must be an object"),
    ("llama", value(K_TAIL, lambda x: x[..., :-1].contiguous()), "k_tail must be"),
    ("llama", value(K_TAIL, lambda x: x.view(torch.int8)), "k_tail must be"),
    ("llama", put("layers.0.keys", (0, 0, 0, 0), float("inf")), "keys must be finite, got NaN"),
    # Index 96, and a negative one, of K's first token; 80 of V's; a coefficient -128; scales.
    ("llama", put(K_TAIL, (0, 0, 0, slice(64, 66)), bits(96)), r"k_tail must be indices in \[0"),
    ("llama", put(K_TAIL, (0, 0, 0, slice(64, 66)), bits(65535)), r"k_tail must be indices in"),
    ("llama", put(V_TAIL, (0, 0, 0, slice(64, 66)), bits(80)), r"v_tail must be indices in \[0"),
    ("llama", put(K_TAIL, (2, 1, 0, 64 + 64 * 3), 128), r"k_tail must be coefficients in \[-127"),
    ("llama", put(V_TAIL, (0, 0, 0, slice(0, 2)), bits(0x7C00)), "v_tail must be scales of at"),
    ("llama", put(V_TAIL, (0, 0, 0, slice(0, 2)), bits(0xBC00)), "v_tail must be scales of at"),
    ("long", row(0, blocks=[]), r"layers\[0\].blocks must be 1 pairs of sizes"),
    ("long", row(0, blocks=[[64]]), r"layers\[0\].blocks\[0\] must be the bytes of K and of V"),
    ("long", row(0, blocks=[["64", 64]]), "k_block.0 must be"),
    ("long", row(0, blocks=[[64, 10**12]]), "k_block.0 must be"),
    ("long", drop(K_BLOCK), "tensors must be an object"),
    ("long", put(K_BLOCK, (0, 0, 5), 65), r"blocks\[0\] must be blocks .*, got lexico_unseal"),
    ("long", put(K_BLOCK, (0, 0, slice(0, 128)), 60), r"blocks\[0\] must be blocks of codes"),
    ("long", put(V_BLOCK, (0, 0, slice(8192, 8352)), 255), r"blocks\[0\] must be blocks of codes"),
    ("long", put(V_BLOCK, (0, 0, 8355), 255), r"blocks\[0\] must be blocks of codes"),
    ("long", put(K_BLOCK, (0, 0, slice(192, 194)), bits(96)), r"k_block.0 must be indices in"),
    ("long", put(K_BLOCK, (0, 0, slice(128, 130)), bits(0xFC00)), "k_block.0 must be scales of at"),
    ("long", put(K_BLOCK, (0, 0, 128 + 128), 128), r"k_block.0 must be coefficients in \[-127"),
    ("long", put(K_BLOCK, (0, 0, slice(256, 288)), 0), "k_block.0 must be as lexico_seal makes it"),
    ("long", put(V_BLOCK, (0, 0, -1), 1), "v_block.0 must be as lexico_seal makes it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refused(tmp_path, saved, name, change, message):
    rewrite(saved / name, tmp_path / "file", change)
    with pytest.raises(ValueError, match=message):
        load_lexico(tmp_path / "file")
