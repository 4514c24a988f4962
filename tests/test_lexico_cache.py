"""LexicoCache: what is coded when, what attention reads, what it costs."""

import copy
import functools

import pytest
import torch

import cache_tools
import hf_models
import kvcore.hf
from cache_tools import Module, random_kv, stored
from compare import relative_l2
from hf_models import dictionaries, full_logits, model, prompt, stepwise_logits
from kvcore.cache import Dictionaries, LexicoCache
from kvcore.hf.attention import exact_attention, kvcore_attention
from kvcore.reference import lexico as reference

pytestmark = pytest.mark.usefixtures("restored_models")

BLOCK = 4096


lexico_layer = functools.partial(cache_tools.lexico_layer, k_sparsity=4, v_sparsity=6)


def coded(x, atoms, sparsity, tolerance=0.0):
    """What is left of vectors when they are coded and rebuilt, by the reference."""
    codes = reference.lexico_encode(x, atoms, sparsity=sparsity, tolerance=tolerance)
    return reference.lexico_reconstruct(*codes[:3], atoms)


# ---- what is coded when


def test_all_but_the_newest_tokens_are_coded(generator):
    layer = lexico_layer()
    k, v = random_kv(generator, 2, 160)
    keys, values = layer.update(k[:, :, :70], v[:, :, :70])
    assert torch.equal(keys, k[:, :, :70]), "the first update is exact"
    assert torch.equal(values, v[:, :, :70])
    pair = dictionaries("llama")[0]
    both = torch.stack([coded(k, pair.k, 4), coded(v, pair.v, 6)])
    exact = torch.stack([k, v])

    def check(tokens, num_coded):
        assert layer.store.codes.num_tokens == num_coded
        held = stored(layer)
        assert relative_l2(held[:, :, :, :num_coded], both[:, :, :, :num_coded]) < 1e-5
        assert torch.equal(held[:, :, :, num_coded:], exact[:, :, :, num_coded:tokens])

    check(70, 50)
    # One by one: the buffer has room for 28, then its oldest 8 are coded together.
    for token in range(70, 100):
        layer.update(k[:, :, token : token + 1], v[:, :, token : token + 1])
        check(token + 1, 50 + (token - 70) // 8 * 8)
    # A few at once are like one by one, many at once leave the newest 20.
    layer.update(k[:, :, 100:105], v[:, :, 100:105])
    check(105, 82)
    keys, values = layer.update(k[:, :, 105:160], v[:, :, 105:160])
    check(160, 140)
    # Their own attention reads them, and the buffer before them, as they came.
    assert torch.equal(keys[:, :, 82:], k[:, :, 82:])
    assert torch.equal(values[:, :, 82:], v[:, :, 82:])
    assert relative_l2(keys[:, :, :82], both[0, :, :, :82]) < 1e-5


def test_without_a_buffer_every_token_is_coded(generator):
    layer = lexico_layer(buffer_tokens=0, encode_tokens=1)
    k, v = random_kv(generator, 1, 10)
    layer.update(k[:, :, :6], v[:, :, :6])
    assert layer.store.codes.num_tokens == 6
    for token in range(6, 10):
        layer.update(k[:, :, token : token + 1], v[:, :, token : token + 1])
        assert layer.store.codes.num_tokens == token


def test_padding_is_coded_as_zeros_and_hidden(generator):
    layer = lexico_layer()
    k, v = random_kv(generator, 2, 90)
    mask = torch.ones(2, 90)
    mask[1, :30] = 0
    k[1, :, :30], v[1, :, :30] = torch.nan, torch.inf
    layer.tracker.announce(mask, native=True)
    layer.update(k, v)
    held = stored(layer)
    assert not held[:, 1, :, :30].any()
    assert held.isfinite().all()
    more = random_kv(generator, 2, 1)
    keys, values = layer.update(*more)
    query = torch.randn(2, 4, 1, 64, generator=generator)
    shown = torch.ones(2, 1, 1, 91, dtype=torch.bool)
    shown[1, ..., :30] = False
    out, _ = kvcore_attention(Module(), query, keys, values, shown)
    expected, _ = exact_attention(query, keys.clone(), values.clone(), shown, scaling=None)
    assert relative_l2(out, expected) < 1e-5
    assert kvcore.hf.fallback_reasons() == {}


def test_padding_is_not_made_again_for_every_step(generator):
    """On a device it would be a copy from the host for every layer."""
    layer = lexico_layer()
    mask = torch.ones(2, 40)
    mask[1, :7] = 0
    layer.tracker.announce(mask, native=True)
    layer.update(*random_kv(generator, 2, 40))
    held = layer.store.left_padding
    assert held.tolist() == [0, 7]
    for _ in range(20):  # some of them code
        layer.update(*random_kv(generator, 2, 1))
        assert layer.store.left_padding is held
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.store.left_padding.tolist() == [7, 7]
    layer.crop(-55)
    assert layer.store.left_padding.tolist() == [5, 5]


def test_sparsities_and_tolerances_are_of_k_and_v_apart(generator):
    k, v = random_kv(generator, 1, 200)
    pair = dictionaries("llama")[0]
    layer = lexico_layer(k_sparsity=3, v_sparsity=40, k_tolerance=0.0, v_tolerance=0.4)
    layer.update(k, v)
    held = stored(layer)[:, :, :, :180]
    assert relative_l2(held[0], coded(k, pair.k, 3)[:, :, :180]) < 1e-5
    expected = coded(v, pair.v, 40, 0.4)[:, :, :180]
    assert relative_l2(held[1], expected) < 1e-5
    error = (held[1] - v[:, :, :180]).norm(dim=-1) / v[:, :, :180].norm(dim=-1)
    assert error.max() < 0.41
    assert error.mean() > 0.3


def test_a_vector_that_is_not_finite_stays_alone(generator):
    """What is coded and read of all others keeps its bits."""
    kv = random_kv(generator, 2, 150)
    layers = []
    for value in (None, torch.nan, torch.inf):
        k, v = (x.clone() for x in kv)
        if value is not None:
            k[1, 0, 10, 3] = v[1, 0, 20, 5] = value
        layers.append(lexico_layer())
        layers[-1].update(k, v)
        layers[-1].update(*random_kv(torch.Generator().manual_seed(1), 2, 1))
    query = torch.randn(2, 4, 1, 64, generator=generator)
    clean = stored(layers[0])
    out = layers[0].keys.snapshot.attend(query, scale=None, causal=True)
    for layer in layers[1:]:
        held = stored(layer)
        for kv_idx, token in ((0, 10), (1, 20)):
            assert held[kv_idx, 1, 0, token].isnan().all()
            held[kv_idx, 1, 0, token] = clean[kv_idx, 1, 0, token]
        assert torch.equal(held, clean)
        spoiled = layer.keys.snapshot.attend(query, scale=None, causal=True)
        assert spoiled[1, :2].isnan().all()
        assert torch.equal(spoiled[0], out[0])
        assert torch.equal(spoiled[1, 2:], out[1, 2:])


# ---- attention


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        (300, torch.float32),
        (300, torch.bfloat16),
        (300, torch.float16),
        (BLOCK + 500, torch.float32),
    ],
)
def test_attention_is_that_over_the_rebuilt_vectors(generator, tokens, dtype, q_len):
    layer = lexico_layer()
    mask = torch.ones(2, tokens)
    mask[1, : tokens - 80] = 0
    layer.tracker.announce(mask, native=True)
    layer.update(*random_kv(generator, 2, tokens, dtype=dtype))
    assert len(layer.store.codes.blocks) == tokens // BLOCK
    for step in (q_len, 1):
        keys, values = layer.update(*random_kv(generator, 2, step, dtype=dtype))
        query = (2 * torch.randn(2, 4, step, 64, generator=generator)).to(dtype)
        seen = layer.get_seq_length()
        shown = torch.ones(step, seen, dtype=torch.bool).tril(seen - step)[None, None]
        shown = shown & (torch.arange(seen) >= torch.tensor([0, tokens - 80])[:, None, None, None])
        out, _ = kvcore_attention(Module(), query, keys, values, shown)
        # Neither is rounded to the type of the queries, as what readers of the views get is.
        context = keys.snapshot.context
        rebuilt = context.codes.reconstruct(context.pair, torch.float32)
        dense = torch.cat([torch.stack(rebuilt), context.buffer], 3).double()
        expected, _ = exact_attention(query.double(), *dense, shown, scaling=None)
        # In half precision, all but nothing of it is the rounding of the output.
        bound = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2e-3}[dtype]
        assert relative_l2(out.double(), expected) < bound
    assert kvcore.hf.fallback_reasons() == {}


def test_quality_does_not_depend_on_how_many_are_coded_together():
    """n_a = 1 and 32 of the paper, with as many exact tokens on the average: 80."""
    kvcore.hf.enable(model("llama"))
    ids, mask = prompt(2, 420)
    expected = full_logits("llama", ids, mask)
    errors = {}
    for count, buffer_tokens, num_coded in ((1, 79, 340), (32, 64, 352)):
        cache = hf_models.lexico_cache(
            "llama",
            k_sparsity=16,
            v_sparsity=16,
            buffer_tokens=buffer_tokens,
            encode_tokens=count,
        )
        logits = stepwise_logits("llama", cache, ids, mask, [160, *[1] * 260])
        assert cache.layers[0].store.codes.num_tokens == num_coded
        errors[count] = relative_l2(logits[:, 160:], expected[:, 160:])
    assert 0.02 < errors[1] < 0.5
    assert abs(errors[1] - errors[32]) < 0.05 * errors[1]


def test_more_atoms_are_better():
    kvcore.hf.enable(model("llama"))
    ids, mask = prompt(2, 200)
    errors = []
    for sparsity in (4, 16, 64):
        cache = hf_models.lexico_cache("llama", k_sparsity=sparsity, v_sparsity=sparsity)
        logits = stepwise_logits("llama", cache, ids, mask, [150, 50])
        errors.append(relative_l2(logits, full_logits("llama", ids, mask)))
    assert errors[0] > 1.5 * errors[1]
    assert errors[1] > 15 * errors[2]


# ---- crop, select


@pytest.mark.parametrize("left", [BLOCK + 200, BLOCK + 70, BLOCK, BLOCK - 1, 100, 0])
def test_crop(generator, left):
    """Into the buffer, the tail, to the end of a block and into it."""
    layer, fresh = lexico_layer(), lexico_layer()
    k, v = random_kv(generator, 2, BLOCK + 210, heads=1)
    layer.update(k, v)
    before = stored(layer)
    layer.crop(left - layer.get_seq_length())
    assert layer.get_seq_length() == left
    held = stored(layer)
    num_coded = min(left, BLOCK + 190)
    # A block has the pairs of a value in another order: sums differ in their rounding.
    assert relative_l2(held, before[:, :, :, :left]) < 1e-6 or left == 0
    assert torch.equal(held[:, :, :, num_coded:], before[:, :, :, num_coded:left])
    fresh.update(k[:, :, :left], v[:, :, :left])
    more = random_kv(generator, 2, 300, heads=1)
    for each in (layer, fresh):
        each.update(*more)
        each.update(*random_kv(torch.Generator().manual_seed(3), 2, 1, heads=1))
    num_coded = layer.store.codes.num_tokens
    assert num_coded == fresh.store.codes.num_tokens
    exact = slice(max(0, left - 20), left)
    one, other = stored(layer), stored(fresh)
    for part in (slice(0, exact.start), slice(left, None)):
        assert relative_l2(one[:, :, :, part], other[:, :, :, part]) < 1e-5 or part.stop == 0


def test_beams_change_places_without_copies_of_what_they_share(generator):
    layer = lexico_layer(k_sparsity=2, v_sparsity=2)
    layer.update(*random_kv(generator, 2, BLOCK + 50, heads=1))
    layer.batch_repeat_interleave(3)
    block = layer.store.codes.blocks[0]
    before = stored(layer)
    indices = [2, 0, 0, 4, 5, 3]
    layer.reorder_cache(torch.tensor(indices))
    assert layer.store.codes.blocks[0].k is block.k
    assert torch.equal(stored(layer), before[:, indices])
    indices = [3, 3, 0, 1, 2, 5]
    before = stored(layer)
    layer.reorder_cache(torch.tensor(indices))
    assert layer.store.codes.blocks[0].k is not block.k
    assert torch.equal(stored(layer), before[:, indices])


# ---- copies, arguments


def test_copies_share_the_dictionaries(generator):
    cache = hf_models.lexico_cache("llama")
    cache.update(*random_kv(generator, 1, 100), 0)
    twin = copy.deepcopy(cache)
    assert twin.dictionaries is cache.dictionaries
    assert twin.layers[0].store.pair is cache.layers[0].store.pair
    assert twin.layers[0].store.codes.k_tail is not cache.layers[0].store.codes.k_tail


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_sparsity": 0}, r"k_sparsity must be an int in \[1, 64\], got 0"),
        ({"v_sparsity": 65}, r"v_sparsity must be an int in \[1, 64\], got 65"),
        ({"v_sparsity": True}, r"v_sparsity must be an int in \[1, 64\], got True"),
        ({"k_tolerance": 1.0}, r"k_tolerance must be in \[0, 1\), got 1.0"),
        ({"v_tolerance": -0.1}, r"v_tolerance must be in \[0, 1\), got -0.1"),
        ({"v_tolerance": float("nan")}, r"v_tolerance must be in \[0, 1\), got nan"),
        ({"buffer_tokens": -1}, r"buffer_tokens must be an int in \[0, 1048576\], got -1"),
        ({"buffer_tokens": 1.5}, r"buffer_tokens must be an int in .* got 1.5"),
        ({"adaptive_bytes": -1}, r"adaptive_bytes must be an int in .* got -1"),
        ({"encode_tokens": 0}, r"encode_tokens must be an int in \[1, 4096\], got 0"),
        ({"encode_tokens": 4097}, r"encode_tokens must be an int in \[1, 4096\], got 4097"),
    ],
)
def test_rejects_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"LexicoCache: {message}"):
        LexicoCache(hf_models.config("llama"), dictionaries("llama"), **arguments)


def test_rejects_dictionaries():
    config = hf_models.config("llama")
    with pytest.raises(ValueError, match="dictionaries must be a Dictionaries, got dict"):
        LexicoCache(config, {})
    with pytest.raises(ValueError, match="config must be the model's configuration, got dict"):
        LexicoCache({}, dictionaries("llama"))
    with pytest.raises(ValueError, match=r"model.model_type must be 'qwen3' as the config has it"):
        LexicoCache(hf_models.config("qwen3"), dictionaries("llama"))
    few = dictionaries("llama", (20, 30), 20)
    assert LexicoCache(config, few).settings.k_sparsity == 20
    with pytest.raises(ValueError, match="v_sparsity must be at most 20, the smallest number of"):
        LexicoCache(config, few, v_sparsity=21)


def test_rejects_heads_of_another_width(generator):
    layer = lexico_layer()
    with pytest.raises(ValueError, match="head_dim of the dictionaries, 64, got 96"):
        layer.update(*random_kv(generator, 1, 3, head_dim=96))
    assert not layer.is_initialized
    layer.update(*random_kv(generator, 1, 3))


def test_a_graph_that_must_be_whole_is_refused():
    kvcore.hf.enable(model("llama"))
    torch._dynamo.reset()
    ids, mask = prompt(1, 40)
    forward = torch.compile(model("llama"), backend="eager", fullgraph=True)
    cache = hf_models.lexico_cache("llama")
    assert not cache.is_compileable
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="run it eagerly"):
        forward(ids, attention_mask=mask, past_key_values=cache)
    torch._dynamo.reset()


def test_dictionaries_move_to_the_device_of_k():
    # None that other tests use: those that moved stay with them.
    held = dictionaries("llama", (20, 30), 20)
    pair = held.pair(1, torch.device("meta"))
    assert pair is held.pair(1, torch.device("meta"))
    assert pair.v.device.type == "meta"
    assert isinstance(held, Dictionaries)
