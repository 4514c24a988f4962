"""TurboLayer: what it holds, how it grows and is shared; what readers see of any layer."""

import copy
import inspect

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import kvcore.hf
import kvcore.reference.turbo as reference
from cache_tools import (
    HEAD_DIM,
    each_fine_layer,
    each_layer,
    random_kv,
    stored,
    turbo_layer,
)
from compare import relative_l2
from kvcore.cache.pages import PagePool

pytestmark = pytest.mark.usefixtures("no_fallback_reasons")


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


@each_layer
def test_what_the_caller_does_to_its_tensors_later_does_not_matter(make_layer, generator):
    layer = make_layer()
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


@each_fine_layer
def test_views_keep_their_tokens_while_more_are_appended(make_layer, generator):
    layer = make_layer()
    layer.update(*random_kv(generator, 2, 100))
    keys, values = layer.update(*random_kv(generator, 2, 3))
    expected = stored(layer)
    layer.update(*random_kv(generator, 2, 80))
    assert keys.shape == (2, 2, 103, HEAD_DIM)
    assert torch.equal(keys.clone(), expected[0])
    assert torch.equal(values.clone(), expected[1])


@each_layer
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
def test_views_end_when_the_layer_changes(make_layer, generator, change):
    layer = make_layer()
    layer.update(*random_kv(generator, 2, 100))
    keys, _ = layer.update(*random_kv(generator, 2, 1))
    change(layer)
    with pytest.raises(RuntimeError, match="were read from the cache before it was cropped"):
        keys.clone()


@each_layer
def test_views_work_in_any_operation(make_layer, generator):
    layer = make_layer()
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


@each_layer
def test_views_are_read_only(make_layer, generator):
    layer = make_layer()
    layer.update(*random_kv(generator, 1, 100))
    layer.update(*random_kv(generator, 1, 1))
    expected = stored(layer)
    for change in (
        lambda x: x.mul_(2),
        lambda x: x.copy_(torch.zeros(x.shape)),
        lambda x: torch.add(x, 1, out=x),
        lambda x: x.__setitem__((0, 0, 0, 0), 1.0),
        lambda x: x.share_memory_(),
    ):
        with pytest.raises(RuntimeError, match="which are read-only"):
            change(layer.keys)
    view = layer.keys
    copied = copy.deepcopy(view)
    assert type(copied) is torch.Tensor
    assert torch.equal(copied, expected[0])
    copied.zero_()
    assert torch.equal(view, expected[0])
    with pytest.raises(AttributeError, match="keys cannot be assigned"):
        layer.keys = expected[0]
    assert torch.equal(stored(layer), expected)


@each_layer
def test_gradients_reach_the_tokens_of_the_call(make_layer, generator):
    layer = make_layer()
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


@each_layer
def test_inference_mode_may_begin_and_end_anywhere(make_layer, generator):
    layer = make_layer()
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


@each_fine_layer
def test_crop_by_count_and_by_length(make_layer, generator):
    layer = make_layer()
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


@each_layer
def test_offloaded_tokens_come_back(make_layer, generator, device):
    """On one device nothing moves; the calls are the same."""
    layer, other = make_layer(), make_layer()
    for tokens in (50, 60, 1, 1, 30):
        k, v = (x.to(device) for x in random_kv(generator, 2, tokens))
        for each in (layer, other):
            each.update(k, v)
        layer.offload()
        moved = [x for kind, xs in layer.tensors().items() if kind != "session" for x in xs]
        assert {x.device.type for x in moved} == {"cpu"}
        if tokens == 1:
            layer.reorder_cache(torch.tensor([1, 0]))
            other.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(stored(layer), stored(other))
        assert {x.device.type for xs in layer.tensors().values() for x in xs} == {device.type}
        layer.offload()
    layer.crop(-35)
    other.crop(-35)
    assert torch.equal(stored(layer), stored(other))


@each_layer
def test_sizes(make_layer, generator):
    layer = make_layer()
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
