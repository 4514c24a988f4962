"""TurboLayer and TurboCache without a model."""

import inspect
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3NextConfig
from transformers.cache_utils import DynamicLayer

import kvcore.hf
import kvcore.reference.turbo as reference
from cache_tools import (
    HEAD_DIM,
    FailingAllocation,
    assert_unchanged,
    held_storages,
    random_kv,
    snapshot,
    stored,
    turbo_layer,
)
from compare import relative_l2
from hf_models import needs_hybrids
from kvcore.cache import TurboCache, TurboSettings
from kvcore.cache.linear import linear_states
from kvcore.cache.pages import PagePool
from kvcore.cache.static_layer import StaticTurboLayer


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def no_reasons():
    kvcore.hf.clear_fallback_reasons()


def config(**arguments):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return LlamaConfig(**{**sizes, **heads, **arguments})


def hybrid_config():
    return Qwen3NextConfig(num_hidden_layers=4, hidden_size=32, head_dim=64, num_attention_heads=4,
                           num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4,
                           linear_key_head_dim=16, linear_value_head_dim=16)  # fmt: skip


# ---- calibration and what is exact


def test_tokens_are_exact_until_a_sequence_has_64(generator):
    layer = turbo_layer()
    k, v = random_kv(generator, 2, 100)
    for begin, end in ((0, 1), (1, 40), (40, 63)):
        keys, values = layer.update(k[:, :, begin:end], v[:, :, begin:end])
        assert layer.store is None
        assert torch.equal(keys, k[:, :, :end])
        assert torch.equal(values, v[:, :, :end])
    keys, values = layer.update(k[:, :, 63:64], v[:, :, 63:64])
    assert torch.equal(keys, k[:, :, :64]), "the update that begins the store is still exact"
    balance, mean = reference.turbo_calibrate(k[:, :, :64])
    assert torch.equal(layer.store.k_balance, balance)
    assert torch.equal(layer.store.k_mean, mean)
    keys, values = layer.update(k[:, :, 64:], v[:, :, 64:])
    assert not torch.equal(keys.clone(), k)
    assert torch.equal(layer.store.k_mean, mean), "the calibration is frozen"
    assert relative_l2(values.clone(), v) < 0.2


def test_what_the_caller_does_to_its_tensors_later_does_not_matter(generator):
    layer = turbo_layer()
    k, v = random_kv(generator, 1, 10)
    layer.update(k, v)
    expected = k.clone()
    k.zero_()
    assert torch.equal(layer.keys, expected)


def test_short_sequences_take_the_calibration_of_the_longest(generator):
    layer = turbo_layer(k_bits=8, v_bits=8)
    k, v = random_kv(generator, 3, 100)
    mask = torch.ones(3, 100)
    mask[0, :99] = 0
    mask[2, :50] = 0
    layer.tracker.announce(mask, native=True)
    layer.update(k, v)
    balance, mean = reference.turbo_calibrate(k[1:2])
    for b in range(3):
        assert torch.equal(layer.store.k_balance[b], balance[0])
        assert torch.equal(layer.store.k_mean[b], mean[0])
    later = random_kv(generator, 3, 40)
    keys, _ = layer.update(*later)
    # Calibrated on its one token, sequence 0 would cut off all that follows.
    assert relative_l2(keys.clone()[0, :, 99:], torch.cat([k, later[0]], 2)[0, :, 99:]) < 0.02
    assert layer.store.seq_lens.tolist() == [41, 140, 90]


def test_low_bit_heads_are_those_of_the_lowest_priority(generator):
    layer = turbo_layer(low_bit_heads=0.5)
    k, v = random_kv(generator, 2, 128, heads=4)
    k = k * torch.tensor([1.0, 4.0, 2.0, 8.0])[:, None, None]
    v = v * torch.tensor([8.0, 1.0, 4.0, 2.0])[:, None, None] * torch.linspace(1, 2, HEAD_DIM)
    layer.update(k, v)
    for row, x in zip(layer.store.head_bits, (k, v), strict=True):
        low = reference.turbo_head_priority(x).sum(0).argsort()[:2].tolist()
        assert [head for head, bits in enumerate(row) if bits == 2] == sorted(low)
    assert layer.store.head_bits.tolist() == [[2, 4, 2, 4], [4, 2, 4, 2]]


def test_widths_of_pages(generator):
    layer = turbo_layer(k_bits=4, v_bits=2, sink_pages=2)
    layer.update(*random_kv(generator, 1, 200))
    layer.update(*random_kv(generator, 1, 60))
    widths = {64 + 64 * HEAD_DIM: 8, 64 + 2 * HEAD_DIM + 32 * HEAD_DIM: 4}
    widths[64 + 2 * HEAD_DIM + 16 * HEAD_DIM] = 2
    found = [
        [widths[layer.store.pool.slabs[entry >> 21].shape[1]] for entry in pages[0][:4]]
        for pages in layer.store.block_table[0].tolist()
    ]
    assert found == [[8, 8, 4, 4], [8, 8, 2, 2]]


def test_balance_keeps_an_outlier_channel_from_taking_the_range(generator):
    errors = {}
    for balance in (True, False):
        layer = turbo_layer(k_bits=8, v_bits=8, balance=balance, subtract_mean=balance)
        k, v = random_kv(generator, 1, 256)
        k[..., 5] += 60
        layer.update(k, v)
        rest = torch.arange(HEAD_DIM) != 5
        errors[balance] = relative_l2(stored(layer)[0][..., rest], k[..., rest])
    assert errors[True] < 0.02
    assert errors[False] > 3 * errors[True]
    assert layer.store.k_balance is None


# ---- views


def test_views_keep_their_tokens_while_more_are_appended(generator):
    layer = turbo_layer(k_bits=8, v_bits=8)
    layer.update(*random_kv(generator, 2, 100))
    keys, values = layer.update(*random_kv(generator, 2, 3))
    expected = stored(layer)
    layer.update(*random_kv(generator, 2, 80))
    assert keys.shape == (2, 2, 103, HEAD_DIM)
    assert torch.equal(keys.clone(), expected[0])
    assert torch.equal(values.clone(), expected[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-1),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reset(),
    ],
    ids=["crop", "reorder", "select", "repeat", "reset"],
)
def test_views_end_when_the_layer_changes(generator, change):
    layer = turbo_layer()
    layer.update(*random_kv(generator, 2, 100))
    keys, _ = layer.update(*random_kv(generator, 2, 1))
    change(layer)
    with pytest.raises(RuntimeError, match="were read from the cache before it was cropped"):
        keys.clone()


def test_views_work_in_any_operation(generator):
    layer = turbo_layer()
    layer.update(*random_kv(generator, 2, 100))
    layer.update(*random_kv(generator, 2, 30))
    keys, values = layer.keys, layer.values
    k, v = stored(layer)
    assert torch.equal(torch.cat([keys, values], 1), torch.cat([k, v], 1))
    assert torch.equal(keys.transpose(2, 3) @ values, k.transpose(2, 3) @ v)
    assert torch.equal(keys[:, :, -1], k[:, :, -1])
    assert torch.equal(keys.to(torch.float64), k.double())
    assert (keys.dtype, keys.device) == (torch.float32, k.device)
    out = torch.empty_like(k)
    out.copy_(keys)
    assert torch.equal(out, k)
    assert "LazyKV(K, shape=(2, 2, 130, 64)" in repr(keys)


def test_views_are_read_only(generator):
    layer = turbo_layer()
    layer.update(*random_kv(generator, 1, 100))
    layer.update(*random_kv(generator, 1, 1))
    expected = stored(layer)
    for change in (
        lambda x: x.mul_(2),
        lambda x: x.copy_(torch.zeros(x.shape)),
        lambda x: torch.add(x, 1, out=x),
    ):
        with pytest.raises(RuntimeError, match="which are read-only"):
            change(layer.keys)
    with pytest.raises(AttributeError, match="keys cannot be assigned"):
        layer.keys = expected[0]
    assert torch.equal(stored(layer), expected)


def test_gradients_reach_the_tokens_of_the_call(generator):
    layer = turbo_layer()
    layer.update(*random_kv(generator, 1, 100))
    before = stored(layer)
    k, v = random_kv(generator, 1, 5)
    k.requires_grad_()
    with pytest.warns(RuntimeWarning, match="gradients"):
        keys, _ = layer.update(k, v)
    assert torch.equal(keys[:, :, :100], before[0])
    assert torch.equal(keys[:, :, 100:], k)
    keys.pow(2).sum().backward()
    assert torch.equal(k.grad, 2 * k.detach())
    assert layer.get_seq_length() == 105
    assert kvcore.hf.fallback_reasons() == {"gradients": 1}


def test_inference_mode_may_begin_and_end_anywhere(generator):
    layer = turbo_layer()
    with torch.inference_mode():
        layer.update(*random_kv(generator, 2, 100))
    layer.update(*random_kv(generator, 2, 30))
    with torch.inference_mode():
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.update(*random_kv(generator, 2, 70))
    layer.crop(-3)
    layer.update(*random_kv(generator, 2, 5))
    assert layer.get_seq_length() == 202


# ---- crop, reset, sizes


def test_crop_by_count_and_by_length(generator):
    layer = turbo_layer(k_bits=8, v_bits=8)
    layer.update(*random_kv(generator, 1, 50))
    layer.crop(-10)
    assert layer.get_seq_length() == 40
    layer.update(*random_kv(generator, 1, 60))
    layer.update(*random_kv(generator, 1, 30))
    expected = stored(layer)
    if "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters:
        layer.crop(0)  # earlier transformers left no token
    assert layer.get_seq_length() == 130
    layer.crop(125)
    layer.crop(-1)
    layer.crop(500)
    assert torch.equal(stored(layer), expected[:, :, :, :124])
    layer.crop(-1000)
    assert layer.get_seq_length() == 0
    layer.update(*random_kv(generator, 1, 1))
    assert layer.get_seq_length() == 1


def test_reset_returns_the_memory_and_calibrates_again(generator):
    layer = turbo_layer()
    layer.update(*random_kv(generator, 2, 100))
    layer.reset()
    assert layer.nbytes() == 0
    assert layer.get_seq_length() == 0
    assert layer.keys is None
    k, v = random_kv(generator, 3, 80)
    layer.update(k, v)
    assert torch.equal(layer.store.k_mean, reference.turbo_calibrate(k)[1])


def test_sizes(generator):
    layer = turbo_layer()
    assert (layer.get_seq_length(), layer.get_max_length()) == (0, -1)
    assert layer.get_mask_sizes(5) == (5, 0)
    layer.update(*random_kv(generator, 2, 100))
    assert layer.get_mask_sizes(5) == (105, 0)
    assert layer.get_mask_sizes(torch.arange(7)) == (107, 0)
    assert layer.get_max_cache_shape() == -1
    assert layer.batch_size == 2
    assert (layer.is_croppable, layer.is_compileable, layer.is_sliding) == (True, False, False)


# ---- pages are shared, never copied


def test_beams_share_full_pages(generator):
    layer = turbo_layer(k_bits=8, v_bits=8)
    layer.update(*random_kv(generator, 2, 300))
    store = layer.store
    addresses = [slab.data_ptr() for slab in store.pool.slabs]
    content = [slab.clone() for slab in store.pool.slabs]
    layer.batch_repeat_interleave(3)
    layer.reorder_cache(torch.tensor([1, 1, 0, 3, 5, 5]))
    assert [slab.data_ptr() for slab in store.pool.slabs] == addresses
    assert sum(store.pool.num_used(bits) for bits in (8, 4, 2)) == 2 * 2 * 2 * 4
    before = stored(layer)
    k, v = random_kv(generator, 6, 100)
    layer.update(k, v)
    for old, new in zip(content, store.pool.slabs, strict=False):
        assert torch.equal(old, new), "a page that others use was written"
    assert torch.equal(stored(layer)[:, :, :, :300], before)
    # Pages of dropped sequences come back, those that are still read do not.
    layer.batch_select_indices(torch.tensor([0]))
    expected = stored(layer)
    size = sum(len(slab) for slab in store.pool.slabs)
    for _ in range(2):
        layer.update(*random_kv(generator, 1, 200))
    assert sum(len(slab) for slab in store.pool.slabs) == size
    assert torch.equal(stored(layer)[:, :, :, :400], expected)


def test_a_reopened_page_leaves_the_shared_one_alone(generator):
    layer = turbo_layer(k_bits=8, v_bits=8)
    layer.update(*random_kv(generator, 1, 150))
    layer.batch_repeat_interleave(2)
    layer.crop(-30)
    one = stored(layer)[:, :1]
    layer.batch_select_indices(torch.tensor([1, 0]))
    for _ in range(20):
        layer.update(*random_kv(generator, 2, 7))
    assert torch.equal(stored(layer)[:, :1, :, :120], one)


def test_slabs_reach_any_length():
    pool = PagePool(128, torch.device("meta"))
    blocks, column = 0, 16
    while blocks < column * 2**18:  # 16 million tokens
        missing = column if pool.num_free(4) < column else 0
        if missing:
            pool.grow(4, missing, column)
        blocks += pool.num_free(4)
        pool.allocate(4, pool.num_free(4))
        assert len(pool.slabs) < 1024
    assert len(pool.slabs) > 100


def test_spare_room_stays_below_one_percent(generator):
    layer = turbo_layer()
    layer.update(*random_kv(generator, 1, 64 * 1024, heads=1))
    for _ in range(40):
        layer.update(*random_kv(generator, 1, 64, heads=1))
        store = layer.store
        free = sum(store.pool.num_free(bits) for bits in (8, 4, 2))
        used = sum(store.pool.num_used(bits) for bits in (8, 4, 2))
        assert free <= 0.01 * used


# ---- failures


def changes(layer, k, v):
    yield "update", lambda: layer.update(k, v)
    yield "select", lambda: layer.batch_select_indices(torch.tensor([1, 1, 0]))
    yield "crop", lambda: layer.crop(-70)


@pytest.mark.parametrize("tokens", [0, 10, 63, 64, 127, 200])
@pytest.mark.parametrize("num_new", [1, 70])
@pytest.mark.parametrize("name", ["update", "select", "crop"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_every_allocation_may_fail(generator, tokens, num_new, name, static):
    if name != "update" and (not tokens or static):
        return
    if static:
        layer = StaticTurboLayer(TurboSettings(low_bit_heads=0.5), max_cache_len=320)
    else:
        layer = turbo_layer(low_bit_heads=0.5)
    if tokens:
        layer.update(*random_kv(generator, 2, tokens))
    k, v = random_kv(generator, 2, num_new)
    action = dict(changes(layer, k, v))[name]
    before = snapshot(layer)
    for failures in range(200):
        try:
            with FailingAllocation(failures):
                action()
            break
        except torch.OutOfMemoryError:
            assert_unchanged(layer, before)
    assert failures > 0, "nothing was injected"
    other = StaticTurboLayer(TurboSettings(low_bit_heads=0.5), max_cache_len=320)
    if not static:
        other = turbo_layer(low_bit_heads=0.5)
    if tokens:
        other.update(*random_kv(torch.Generator().manual_seed(0), 2, tokens))
    dict(changes(other, k, v))[name]()
    assert torch.equal(stored(layer), stored(other)), "the retry gives what a first try would have"


HOSTILE = [
    (lambda k, v: (k.half(), v), "value_states|key_states must have dtype"),
    (lambda k, v: (k, v.bfloat16()), "value_states must have dtype"),
    (lambda k, v: (k.half(), v.half()), "key_states must have dtype torch.float32, got .*float16"),
    (lambda k, v: (k[:, :1], v[:, :1]), r"key_states must have shape \[2, 2, 3, 64\], got \[2, 1"),
    (lambda k, v: (k[:1], v[:1]), r"key_states must have shape \[2, 2, 3, 64\], got \[1, 2"),
    (lambda k, v: (k[..., :32], v[..., :32]), r"key_states must have shape .* got \[2, 2, 3, 32\]"),
    (lambda k, v: (k, v[:, :, :2]), r"value_states must have shape .* got \[2, 2, 2, 64\]"),
    (lambda k, v: (k[0], v[0]), r"key_states must have shape .*, got \[2, 3, 64\]"),
    (lambda k, v: (k, v[0]), r"value_states must have shape .*, got \[2, 3, 64\]"),
    (lambda k, v: (k.to("meta"), v.to("meta")), "key_states must have device cpu, got meta"),
    (lambda k, v: (k, v.to("meta")), "value_states must have device cpu, got meta"),
]


@pytest.mark.parametrize("rotary_dim", [3, -2, 258, True])
def test_rejects_a_rotary_dim(rotary_dim):
    message = f"rotary_dim must be an even int up to 256, or -1, got {rotary_dim}"
    with pytest.raises(ValueError, match=message):
        TurboSettings(rotary_dim=rotary_dim)


def test_rejects_a_rotary_dim_beyond_the_heads(generator):
    layer = turbo_layer(rotary_dim=66)
    k, v = random_kv(generator, 2, 3)
    with pytest.raises(ValueError, match="rotary_dim must be at most the head_dim of 64, got 66"):
        layer.update(k, v)
    assert not layer.is_initialized


@pytest.mark.parametrize("tokens", [10, 100])
@pytest.mark.parametrize(("spoil", "message"), HOSTILE)
def test_rejects(generator, tokens, spoil, message):
    layer = turbo_layer()
    layer.update(*random_kv(generator, 2, tokens))
    before = snapshot(layer)
    k, v = random_kv(generator, 2, 3)
    with pytest.raises(ValueError, match=message):
        layer.update(*spoil(k, v))
    assert_unchanged(layer, before)
    layer.update(k, v)
    assert layer.get_seq_length() == tokens + 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda k, v: (k[0], v[0]), r"key_states must be \[batch, kv_heads, tokens, head_dim\]"),
        (lambda k, v: (k, v.half()), "value_states must have dtype torch.float32"),
        (lambda k, v: (k, v[:, :, :1]), r"value_states must have shape\[:3\]"),
    ],
)
def test_rejects_at_first(generator, spoil, message):
    layer = turbo_layer()
    k, v = random_kv(generator, 2, 3)
    with pytest.raises(ValueError, match=message):
        layer.update(*spoil(k, v))
    assert not layer.is_initialized
    layer.update(*random_kv(generator, 3, 80, dtype=torch.bfloat16))
    assert layer.get_seq_length() == 80


def test_rejects_indices(generator):
    layer = turbo_layer()
    layer.update(*random_kv(generator, 2, 100))
    before = snapshot(layer)
    with pytest.raises(IndexError, match=r"indices must be in \[0, 2\), got 2"):
        layer.reorder_cache(torch.tensor([0, 2]))
    with pytest.raises(IndexError, match=r"indices must be bool \[2\], got \[3\]"):
        layer.batch_select_indices(torch.tensor([True, False, True]))
    assert_unchanged(layer, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_bits": 3}, "k_bits must be 8, 4 or 2, got 3"),
        ({"v_bits": True}, "v_bits must be 8, 4 or 2, got True"),
        ({"k_bits": [4]}, "k_bits must have one entry for each of the 2 layers, got 1"),
        ({"v_bits": [4, 5]}, r"v_bits\[1\] must be 8, 4 or 2, got 5"),
        ({"k_bits": "4"}, "k_bits must have one entry|k_bits"),
        ({"sink_pages": -1}, r"sink_pages must be an int in \[0, 2\^31\), got -1"),
        ({"sink_pages": 1.5}, r"sink_pages must be an int in \[0, 2\^31\), got 1.5"),
        ({"sink_pages": 2**31}, "sink_pages must be .*, got 2147483648"),
        ({"low_bit_heads": 1.5}, r"low_bit_heads must be in \[0, 1\], got 1.5"),
        ({"balance": 1}, "balance must be a bool, got 1"),
        ({"subtract_mean": None}, "subtract_mean must be a bool, got None"),
        ({"tail_margin": 0.5}, r"tail_margin must be in \[1, 2\^127\], got 0.5"),
        ({"tail_margin": float("nan")}, r"tail_margin must be in \[1, 2\^127\], got nan"),
        ({"sas_threshold": 0.0}, r"sas_threshold must be in \[-87, 0\) or None, got 0.0"),
        ({"tail_margin": 1e39}, r"tail_margin must be in \[1, 2\^127\], got 1e\+39"),
        ({"sas_threshold": -88.0}, r"sas_threshold must be in \[-87, 0\) or None, got -88.0"),
        ({"max_cache_len": 0}, "max_cache_len must be positive, got 0"),
        ({"max_cache_len": 1.0}, "max_cache_len must be an int, got 1.0"),
    ],
)
def test_rejects_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TurboCache(config(), **arguments)


def test_rejects_a_config_that_is_none():
    with pytest.raises(ValueError, match="config must be the model's configuration, got dict"):
        TurboCache({})


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
    names = {type(layer).__name__ for layer in TurboCache(sliding).layers}
    assert names == {"DynamicSlidingWindowLayer"}
    cache = TurboCache(config(), k_bits=[8, 2], v_bits=[4, 8])
    assert [(s.settings.k_bits, s.settings.v_bits) for s in cache.layers] == [(8, 4), (2, 8)]
    assert (cache.is_croppable, cache.is_compileable) == (True, False)
    static = TurboCache(config(), max_cache_len=128)
    assert static.is_compileable
    assert static.layers[0].get_max_length() == 128


def test_partial_rotation_is_known():
    assert TurboCache(config()).settings.rotary_dim == -1
    half = config(rope_parameters={"rope_theta": 1e4, "rope_type": "default",
                                   "partial_rotary_factor": 0.5})  # fmt: skip
    assert TurboCache(half).settings.rotary_dim == 32


def test_unsupported_head_dim_stays_exact():
    with pytest.warns(RuntimeWarning, match="unsupported head_dim: got 80"):
        cache = TurboCache(config(head_dim=80))
    assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
    assert kvcore.hf.fallback_reasons() == {"unsupported head_dim": 1}


@pytest.mark.parametrize(
    ("k_dim", "v_dim", "dtype", "reason"),
    [
        (64, 128, torch.float32, "unsupported different K and V"),
        (48, 48, torch.float32, "unsupported head_dim"),
        (64, 64, torch.float64, "unsupported dtype"),
    ],
)
def test_what_has_no_kernel_is_kept_exactly(generator, k_dim, v_dim, dtype, reason):
    layer = turbo_layer()
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


# ---- memory


@pytest.mark.parametrize(
    "kind", ["exact", "store", "beams", "static", pytest.param("hybrid", marks=needs_hybrids)]
)
def test_nbytes_are_those_of_the_storages(generator, kind):
    static = {"max_cache_len": 500} if kind == "static" else {}
    cache = TurboCache(hybrid_config() if kind == "hybrid" else config(), **static)
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
    cache = TurboCache(config())
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
