"""What kvcore eval measures, against loops written out and figures computed by hand."""

import contextlib
import copy
import importlib.metadata
import importlib.util
import math
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import scipy.stats
from transformers import DynamicCache, QuantizedCache

import kvcore
from kvcore.demo import models, tasks
from kvcore.eval import CacheBytes, cache_bytes, pitfalls, recall, spearman, text
from kvcore.eval.caches import FULL, CacheChoice
from kvcore.eval.peers import PressChoice, QuantizedChoice, why_not

TWO = CacheChoice(k_bits=2, v_bits=2)
CONTEXT, SCORED = 150, 24
NOTHING = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(scope="module", params=models.NAMES)
def model(request):
    return models.load(request.param)


@pytest.fixture(scope="module")
def control():
    return models.load("control")


@pytest.fixture(scope="module")
def tokens():
    return torch.from_numpy(tasks.held_out_text()[:60_000].astype("int64"))


@pytest.fixture(scope="module")
def symbols():
    first = torch.tensor([models.FIRST_KEY, models.FIRST_VALUE])
    return recall.Symbols(*(first[:, None] + torch.arange(64)))


def _draw(tokens, seed=0, prefix=NOTHING):
    sizes = {"seeds": 3, "sequences": 2, "context": CONTEXT, "scored": SCORED}
    return text.draw(tokens, prefix, lambda ids: "x" * len(ids), seed=seed, **sizes)


# ---- text


def test_full_cache_is_one_forward_pass(model, tokens):
    sample = _draw(tokens)
    (found,) = text.score(model, [FULL], sample, chunk=7)
    with torch.no_grad():
        logits = model(sample.tokens, use_cache=False).logits.double()
    rows = []
    for b in range(2):
        nats = 0.0
        for at in range(CONTEXT, CONTEXT + SCORED):
            chances = torch.softmax(logits[b, at], 0)
            nats -= math.log(chances[sample.tokens[b, at + 1]])
        rows.append(nats / math.log(2) / SCORED)
    assert found.bits_per_byte.tolist() == pytest.approx(rows, rel=1e-4)
    assert found.kl.tolist() == [0, 0]
    assert found.agreement.tolist() == [1, 1]


needs_quanto = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None, reason="pip install optimum-quanto"
)
QUANTO = [pytest.param(QuantizedChoice("quanto", bits), marks=needs_quanto) for bits in (4, 2)]


@pytest.mark.parametrize("choice", [TWO, QuantizedChoice("fp8"), *QUANTO], ids=lambda c: c.label)
def test_compressed_cache_is_a_loop_of_single_steps(control, tokens, choice):
    """Bits per byte, KL, agreement and bytes, one sequence and one token at a time."""
    sample = _draw(tokens)
    _, found = text.score(control, [FULL, choice], sample, chunk=1, batch=1)
    for b, row in enumerate(sample.tokens):
        full = control(row[None], use_cache=False).logits[0].log_softmax(-1)
        if choice is TWO:
            kvcore.hf.enable(control)
            cache = kvcore.cache.TurboCache(control.config, k_bits=2, v_bits=2)
        else:
            options = {} if choice.nbits is None else {"nbits": choice.nbits}
            cache = QuantizedCache(choice.backend, config=control.config, **options)
        bits, kl, same = [], [], []
        with torch.no_grad():
            control(row[None, :CONTEXT], past_key_values=cache)
            for at in range(CONTEXT, CONTEXT + SCORED):
                out = control(row[None, at : at + 1], past_key_values=cache)
                scores = out.logits[0, 0].log_softmax(-1)
                bits.append(F.nll_loss(scores, row[at + 1]).item() / math.log(2))
                kl.append(F.kl_div(scores, full[at], log_target=True, reduction="sum").item())
                same.append(float(scores.argmax() == full[at].argmax()))
        kvcore.hf.disable(control)
        assert found.bits_per_byte[b].item() == pytest.approx(sum(bits) / SCORED, rel=1e-4)
        assert found.kl[b].item() == pytest.approx(sum(kl) / SCORED, rel=1e-2)
        assert found.agreement[b].item() == pytest.approx(sum(same) / SCORED)
    assert found.kl.min() > 1e-4
    assert found.held == 1
    # Sizes depend on lengths alone, so the last row's are the first's.
    if choice is TWO:
        assert found.bytes == CacheBytes(cache.nbytes(), 0)
    elif choice.backend == "fp8":  # one byte an element, a scale of K and one of V in each layer
        assert found.bytes.kv == 4 * (2 * 2 * 64 * (CONTEXT + SCORED) + 2 * 4)
    else:  # the prompt in codes, with scale and zero of 64 elements in fp32; the rest as it came
        codes = 2 * 2 * CONTEXT * (64 * choice.nbits // 8 + 2 * 4)
        assert found.bytes.kv == 4 * (codes + 2 * 2 * 64 * 4 * SCORED)


def test_seeds_share_no_text():
    drawn = [_draw(torch.arange(2000), seed) for seed in range(3)]
    used = torch.cat([sample.tokens.flatten() for sample in drawn])
    assert len(used.unique()) == len(used) == 3 * 2 * (CONTEXT + 1 + SCORED)
    for sample in drawn:
        assert (sample.tokens.diff() == 1).all()
    again = _draw(torch.arange(2000), 1, torch.tensor([7, 8]))
    assert again.tokens[:, :2].tolist() == [[7, 8]] * 2
    assert torch.equal(again.tokens[:, 2:], drawn[1].tokens)
    assert again.context_len == CONTEXT + 2
    with pytest.raises(ValueError, match="has 900 tokens, which make 5 sequences of 175; 3 seeds"):
        _draw(torch.arange(900))


def test_bytes_of_scored_text():
    """A token may stand for several bytes, or for a part of a character."""
    words = ["aé", "b", "😀 ", "x"]

    def decode(ids):
        return "".join(words[i] for i in ids)

    ids = torch.tensor([0, 1, 2, 3] * 3)
    sample = text.draw(ids, NOTHING, decode, seed=0, seeds=1, sequences=3, context=1, scored=2)
    assert sample.num_bytes.tolist() == [6, 6, 6]  # of "😀 " and "x"


def test_bytes_of_wrapped_and_shared_tensors():
    layer = type("Layer", (), {})()
    layer.keys = torch.zeros(10)
    layer.view = layer.keys[2:]
    layer.packed = {"a": (torch.zeros(3, dtype=torch.int8), {"scale": torch.zeros(2)})}
    layer.recurrent_states = {0: torch.zeros(5)}
    cache = type("Cache", (), {"layers": [layer]})()
    assert cache_bytes(cache) == CacheBytes(40 + 3 + 8, 20)


# ---- recall


def _draws(tokens, symbols, seed=0):
    return recall.Draws(tokens, torch.tensor([5]), symbols, seed)


def _ask(asked, row):
    """Bindings of a prompt as a dict, and its queries, by reading the tokens."""
    tokens = asked.tokens[row].tolist()
    context, queries = tokens[: asked.context_len], tokens[asked.context_len :]
    is_key = lambda t: models.FIRST_KEY <= t < models.FIRST_VALUE  # noqa: E731
    places = [i for i, token in enumerate(context) if is_key(token)]
    bound = {context[i]: context[i + 1] for i in places}
    assert len(bound) == len(places)
    return bound, places, list(zip(queries[::2], queries[1::2], strict=True))


def test_needles(tokens, symbols):
    depths = (0.0, 0.5, 1.0)
    asked = recall.needles(_draws(tokens, symbols), 4, 100, depths)
    assert asked.tokens.shape == (4, 1 + 100 + 6)
    assert asked.context_len == 101
    for row in range(4):
        assert asked.tokens[row, 0] == 5  # what a sequence begins with
        bound, places, queries = _ask(asked, row)
        assert places == [1, 1 + 47 + 2, 1 + 94 + 4]  # at 0, 47 and 94 of 94 tokens of text
        assert dict(queries) == bound
        assert [list(bound).index(key) for key, _ in queries] == asked.order[row].tolist()
        assert asked.answers[row].tolist() == [value for _, value in queries]
    assert not torch.equal(asked.tokens[0], asked.tokens[1])


def test_pairs(tokens, symbols):
    draws = _draws(tokens, symbols)
    asked = recall.pairs(draws, 3, 200, 40)
    for row in range(3):
        bound, _, queries = _ask(asked, row)
        assert len(bound) == 40
        assert dict(queries) == bound
    with pytest.raises(ValueError, match=r"pairs must lie in \[1, 64\], got 65"):
        recall.pairs(draws, 1, 200, 65)
    with pytest.raises(ValueError, match="40 pairs take 80 tokens, and do not fit a length of 80"):
        recall.pairs(draws, 1, 80, 40)
    with pytest.raises(ValueError, match="the text has 60000 tokens, and 69998 are needed"):
        recall.pairs(draws, 1, 70_000, 1)


def test_recall_puts_answers_in_the_order_of_bindings(control, tokens, symbols):
    asked = recall.needles(_draws(tokens, symbols), 3, 120, (0.0, 0.3, 1.0))
    found, broken = recall.recall(control, [FULL, TWO], asked, batch=2)
    with torch.no_grad():
        scores = control(asked.tokens, use_cache=False).logits.log_softmax(-1)
    for row in range(3):
        for query in range(3):
            at = asked.query_positions[query]
            expected = scores[row, at, asked.tokens[row, at + 1]].item()
            binding = asked.order[row, query]
            assert found.log_probs[row, binding].item() == pytest.approx(expected, abs=1e-3)
    assert found.hits.dtype == torch.bool
    assert found.hits.double().mean() > 0.8  # what the model was trained for
    assert not torch.equal(found.log_probs, broken.log_probs)


def test_free_symbols():
    words = {0: "", 1: " the", 2: "é", 3: "cat", 4: "dog", 5: " 12", 6: "ox", 7: "cow"}
    text_ids = torch.tensor([1, 4])
    found = recall.free_symbols(text_ids, 8, lambda ids: words[ids[0]], 1)
    ids = [*found.keys.tolist(), *found.values.tolist()]
    assert len(set(ids)) == 2
    assert set(ids) <= {3, 6, 7}
    found = recall.free_symbols(text_ids, 8, lambda ids: words[ids[0]], 2)
    assert {3, 6, 7} < {*found.keys.tolist(), *found.values.tolist()} <= {2, 3, 5, 6, 7}
    with pytest.raises(ValueError, match=r"3 keys and values need 6 tokens .* vocabulary has 5"):
        recall.free_symbols(text_ids, 8, lambda ids: words[ids[0]], 3)


# ---- pitfalls


def test_spearman():
    one = torch.tensor([0.1, 3.0, 2.0, 2.0, -1.0, 9.0])
    other = torch.tensor([1.0, 2.0, 2.0, 5.0, 5.0, 0.0])
    expected = scipy.stats.spearmanr(one, other).statistic
    assert spearman(one, other) == pytest.approx(expected)
    assert spearman(one, one) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert math.isnan(spearman(one, torch.ones(6)))


def test_ordered_prompts(tokens, symbols):
    asked = pitfalls.ordered_prompts(_draws(tokens, symbols), 2, 400)
    groups, size = pitfalls.SEGMENTS, pitfalls.PER_SEGMENT
    assert asked.tokens.shape == (4, 1 + 400 + 2 * groups * size)
    for row in (0, 2):
        one, places, queries = _ask(asked, row)
        other, other_places, other_queries = _ask(asked, row + 1)
        assert one == other == dict(queries)
        assert queries == other_queries
        assert places == other_places
        keys = [list(one)[i : i + size] for i in range(0, groups * size, size)]
        assert keys == [list(other)[i : i + size] for i in range(0, groups * size, size)][::-1]
        numbers = [list(one).index(key) for key, _ in queries]
        assert asked.order[row].tolist() == asked.order[row + 1].tolist() == numbers
        # A text on both sides of each group.
        gaps = torch.tensor(places).diff()
        assert set(gaps[size - 1 :: size].tolist()) <= {42 + 2, 43 + 2}


def test_unevenness_by_hand():
    """Bindings of known log-probabilities: what depends on the binding cancels, the place stays."""
    groups, size = pitfalls.SEGMENTS, pitfalls.PER_SEGMENT
    count = groups * size
    hard = torch.linspace(0, 1, count).double()  # of a binding, whatever the cache
    full = -hard.repeat(2, 1)
    place = torch.arange(groups).repeat_interleave(size).double()
    lost = torch.stack([10 - place, 10 - place.reshape(groups, size).flip(0).flatten()])
    hits = torch.ones(2, count, dtype=torch.bool)
    hits[0, :size] = False  # the first group, in the first segment
    hits[1, -size:] = False  # the last group, in the first segment of the reversed row
    found = recall.Recalled(hits, full - lost)
    result = pitfalls.compare(found, recall.Recalled(torch.ones_like(hits), full))
    assert result.by_segment.tolist() == [pytest.approx([10.0 - i for i in range(groups)])]
    assert result.recall.tolist() == [[0.0] + [1.0] * (groups - 1)]
    assert result.order_effect.tolist() == pytest.approx([4.0])
    ranks = [scipy.stats.spearmanr(full[i], full[i] - lost[i]).statistic for i in (0, 1)]
    assert result.rank_correlation.tolist() == pytest.approx([sum(ranks) / 2])


def test_stored_reads_the_cache_back(model, tokens):
    """Errors of K and V are those of what the layers themselves say they hold."""
    prompt = tokens[None, :400]
    full, four, two = pitfalls.stored(model, [FULL, CacheChoice(), TWO], prompt)
    assert full.kept.tolist() == four.kept.tolist() == [1] * pitfalls.SEGMENTS
    assert full.k_error.tolist() == full.v_error.tolist() == [0] * pitfalls.SEGMENTS
    for choice, found in ((CacheChoice(), four), (TWO, two)):
        exact, cache = DynamicCache(config=model.config), choice.make(model)
        with torch.no_grad():
            model(prompt, past_key_values=exact)
            model(prompt, past_key_values=cache)
        errors = []
        for layer in cache.compressed_layers():
            held = exact.layers[layer.layer_idx]
            layer = copy.deepcopy(layer)
            pairs = ((layer.keys.clone(), held.keys), (layer.values.clone(), held.values))
            errors.append(
                [
                    [
                        (a - b).norm() / b.norm()
                        for a, b in zip(x.split(50, 2), y.split(50, 2), strict=True)
                    ]
                    for x, y in pairs
                ]
            )
        expected = torch.tensor(errors).double().mean(0)
        torch.testing.assert_close(found.k_error, expected[0], rtol=0.02, atol=1e-3)
        torch.testing.assert_close(found.v_error, expected[1], rtol=0.02, atol=1e-3)
    # The first segment lies in the page that keeps 8 bits.
    assert two.k_error[0] == four.k_error[0] < 0.02
    assert (two.k_error > 3 * four.k_error)[1:].all()


# ---- eviction


class _Press:
    """What kvpress's methods are: hooks that shorten the cache when the prompt has run."""

    def __init__(self, compression_ratio):
        self.ratio = compression_ratio

    @contextlib.contextmanager
    def __call__(self, model):
        def evict(module, args, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            length = kwargs["hidden_states"].shape[1]
            if layer.keys.shape[2] == length:  # a prompt
                cut = 10 + int(length * self.ratio)
                layer.keys, layer.values = (
                    torch.cat([x[:, :, :10], x[:, :, cut:]], 2) for x in (layer.keys, layer.values)
                )

        hooks = [
            layer.self_attn.register_forward_hook(evict, with_kwargs=True)
            for layer in model.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()


@pytest.fixture
def kvpress(monkeypatch):
    """A stand-in, as kvpress itself is not for every version of transformers."""
    module = types.ModuleType("kvpress")
    module.SnapKVPress = _Press
    monkeypatch.setitem(sys.modules, "kvpress", module)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch<3", "x"])


def test_evicted_tokens_are_not_seen_and_the_others_stay_in_place(control, tokens, kvpress):
    """One forward pass in which the tokens after the prompt do not see what was evicted."""
    sample, choice = _draw(tokens), PressChoice("snapkv", 0.4)
    evicted = int(CONTEXT * 0.4)
    _, found = text.score(control, [FULL, choice], sample, chunk=7)
    length = CONTEXT + 1 + SCORED
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[CONTEXT:, 10 : 10 + evicted] = False
    with torch.no_grad():
        mask = seen.expand(2, 1, -1, -1)
        scores = control(sample.tokens, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        full = control(sample.tokens, use_cache=False).logits.log_softmax(-1)
    at = slice(CONTEXT, -1)
    nats = F.nll_loss(scores[:, at].mT, sample.tokens[:, CONTEXT + 1 :], reduction="none")
    bits = nats.mean(1) / math.log(2)
    assert found.bits_per_byte.tolist() == pytest.approx(bits.tolist(), rel=1e-4)
    kl = F.kl_div(scores[:, at], full[:, at], log_target=True, reduction="none").sum(-1).mean(1)
    assert found.kl.tolist() == pytest.approx(kl.tolist(), rel=1e-3)
    assert found.kl.min() > 1e-3
    assert found.bytes.kv == 2 * 4 * 2 * 2 * 64 * 4 * (CONTEXT + SCORED - evicted)


def test_kept_counts_what_eviction_left(control, tokens, kvpress):
    full, pressed = pitfalls.stored(control, [FULL, PressChoice("snapkv", 0.5)], tokens[None, :400])
    assert full.kept.tolist() == [1] * 8
    # 10 to 209 of 400 tokens in segments of 50 are gone.
    assert pressed.kept.tolist() == pytest.approx([0.2, 0, 0, 0, 0.8, 1, 1, 1])
    assert pressed.k_error.tolist() == [0] * 8


def test_why_kvpress_cannot_be_had(control, monkeypatch):
    choice = PressChoice("snapkv", 0.5)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["transformers<5,>=4.5"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5")
    reason = why_not(choice, control)
    assert re.match(r"kvpress 0\.5 needs transformers<5,>=4\.5, and 5\.\S+ is installed", reason)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert why_not(choice, control) == "kvpress is not installed; run pip install kvpress"
    assert "full attention only, and there is linear" in why_not(choice, models.load("hybrid"))
