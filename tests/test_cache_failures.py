"""Updates that fail or are refused change nothing; arguments that are refused."""

import functools

import pytest
import torch

from cache_tools import (
    FailingAllocation,
    assert_unchanged,
    each_layer,
    lexico_layer,
    plain_config,
    random_kv,
    snapshot,
    stored,
    turbo_layer,
)
from kvcore.cache import TurboCache, TurboSettings
from kvcore.cache.static_layer import StaticTurboLayer

pytestmark = pytest.mark.usefixtures("no_fallback_reasons")


def changes(layer, k, v):
    yield "update", lambda: layer.update(k, v)
    # A cache of fixed capacity keeps its batch.
    kept = [1, 1] if isinstance(layer, StaticTurboLayer) else [1, 1, 0]
    yield "select", lambda: layer.batch_select_indices(torch.tensor(kept))
    yield "crop", lambda: layer.crop(-70)


MAKE = {
    "dynamic": functools.partial(turbo_layer, low_bit_heads=0.5),
    "static": lambda: StaticTurboLayer(TurboSettings(low_bit_heads=0.5), max_cache_len=320),
    "lexico": functools.partial(lexico_layer, k_sparsity=2, v_sparsity=3),
}


@pytest.mark.parametrize("num_new", [1, 70])
@pytest.mark.parametrize(
    ("name", "kind", "tokens"),
    [("update", kind, n) for kind in MAKE for n in (0, 10, 63, 64, 127, 200)]
    + [
        (name, kind, n)
        for name in ("select", "crop")
        for kind in MAKE
        for n in (10, 63, 64, 127, 200)
    ]
    # Out of a full buffer; over the end of a block, and back into it.
    + [
        ("update", "lexico", 28),
        ("update", "lexico", 4090),
        ("select", "lexico", 4130),
        ("crop", "lexico", 4130),
    ],
)
def test_every_allocation_may_fail(generator, tokens, num_new, name, kind):
    layer = MAKE[kind]()
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
    # What the buffer has room for, and a crop within it, takes no memory.
    in_buffer = {"update": num_new == 1 and tokens not in (0, 28), "crop": tokens == 10}
    none_wanted = kind == "lexico" and in_buffer.get(name, False)
    assert (failures == 0) == none_wanted, f"{failures} calls were made to fail"
    other = MAKE[kind]()
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


@each_layer
@pytest.mark.parametrize("tokens", [10, 100])
@pytest.mark.parametrize(("spoil", "message"), HOSTILE)
def test_rejects(make_layer, generator, tokens, spoil, message):
    layer = make_layer()
    layer.update(*random_kv(generator, 2, tokens))
    before = snapshot(layer)
    k, v = random_kv(generator, 2, 3)
    with pytest.raises(ValueError, match=message):
        layer.update(*spoil(k, v))
    assert_unchanged(layer, before)
    layer.update(k, v)
    assert layer.get_seq_length() == tokens + 3


@each_layer
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda k, v: (k[0], v[0]), r"key_states must be \[batch, kv_heads, tokens, head_dim\]"),
        (lambda k, v: (k, v.half()), "value_states must have dtype torch.float32"),
        (lambda k, v: (k, v[:, :, :1]), r"value_states must have shape\[:3\]"),
    ],
)
def test_rejects_at_first(make_layer, generator, spoil, message):
    layer = make_layer()
    k, v = random_kv(generator, 2, 3)
    with pytest.raises(ValueError, match=message):
        layer.update(*spoil(k, v))
    assert not layer.is_initialized
    layer.update(*random_kv(generator, 3, 80, dtype=torch.bfloat16))
    assert layer.get_seq_length() == 80


@each_layer
def test_rejects_indices(make_layer, generator):
    layer = make_layer()
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
        ({"max_cache_len": 0}, r"max_cache_len must be an int in \[1, 2\^31\), got 0"),
        ({"max_cache_len": 1.0}, r"max_cache_len must be an int in \[1, 2\^31\), got 1.0"),
        ({"max_cache_len": 1 << 31}, r"max_cache_len must be .* got 2147483648"),
    ],
)
def test_rejects_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TurboCache(plain_config(), **arguments)


def test_rejects_a_config_that_is_none():
    with pytest.raises(ValueError, match="config must be the model's configuration, got dict"):
        TurboCache({})
