"""`generate` of transformers over compressed caches: every way in which it calls a cache."""

import concurrent.futures

import pytest
import torch
from transformers import DynamicCache

import hf_models
import kvcore.hf
from hf_models import (
    HYBRID_NAMES,
    NAMES,
    check_logits,
    each_cache,
    full_logits,
    model,
    needs_hybrids,
    prompt,
    stepwise_logits,
    stored_lens,
)
from kvcore.cache import TurboCache

pytestmark = pytest.mark.usefixtures("restored_models")


def best_choices(name, sequences, mask, begin):
    """By how much each generated token's full-precision logit misses the best one."""
    full = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])], 1)
    logits = full_logits(name, sequences, full)[:, begin - 1 : -1]
    chosen = logits.gather(2, sequences[:, begin:, None])[..., 0]
    return logits.amax(-1) - chosen


# Between two logits that err by at most 0.084, the largest found with 8 bits.
LOGIT_ERROR = 0.17


@each_cache
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [40, 100])
def test_greedy_generation(make_cache, name, tokens):
    kvcore.hf.enable(model(name))
    ids, mask = prompt(3, tokens, (0, 17, 33))
    cache = make_cache(name)
    out = model(name).generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False,
                               max_new_tokens=40, eos_token_id=None)  # fmt: skip
    assert out.shape == (3, tokens + 40)
    assert best_choices(name, out, mask, tokens).max() < LOGIT_ERROR
    assert kvcore.hf.fallback_reasons() == {}
    assert cache.get_seq_length() == tokens + 39
    assert stored_lens(cache) == [tokens + 39 - padding for padding in (0, 17, 33)]


@each_cache
@pytest.mark.parametrize("name", NAMES)
def test_beam_search(make_cache, name):
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 150, (0, 17))
    arguments = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 20,
        "num_beams": 4,
        "eos_token_id": None,
        "length_penalty": 0.0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    cache = make_cache(name)
    out = model(name).generate(ids, past_key_values=cache, **arguments)
    full = torch.cat([mask, mask.new_ones(2, 20)], 1)
    logits = full_logits(name, out.sequences, full)[:, 149:-1].log_softmax(-1)
    scores = logits.gather(2, out.sequences[:, 150:, None]).sum((1, 2))
    # Twenty log probabilities, each within the error of a logit.
    assert (scores - out.sequences_scores).abs().max() < 20 * LOGIT_ERROR / 2
    best = model(name).generate(ids, past_key_values=DynamicCache(config=model(name).config),
                                **arguments)  # fmt: skip
    assert (best.sequences_scores - scores).max() < 20 * LOGIT_ERROR / 2
    assert kvcore.hf.fallback_reasons() == {}
    if not isinstance(cache, TurboCache):
        assert stored_lens(cache) == [169] * 4 + [152] * 4
        return
    # Eight beams of 169 tokens hold less than two times what two sequences do.
    store = cache.turbo_layers()[0].store
    assert store.batch == 8
    store.collect()
    assert sum(store.pool.num_used(bits) for bits in (8, 4, 2)) <= 2 * 2 * 2 * 2 * 2


@each_cache
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_prompt_lookup_crops(make_cache, name):
    kvcore.hf.enable(model(name))
    ids, _ = prompt(1, 30)
    ids = ids.repeat(1, 4)  # so that there is something to look up
    mask = torch.ones_like(ids)
    cache = make_cache(name)
    cropped = []
    crop = type(cache).crop
    cache.crop = lambda count: (cropped.append(count), crop(cache, count))
    out = model(name).generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False,
                               max_new_tokens=30, prompt_lookup_num_tokens=4,
                               eos_token_id=hf_models.VOCAB)  # fmt: skip
    assert best_choices(name, out, mask, 120).max() < LOGIT_ERROR
    assert any(cropped)
    assert kvcore.hf.fallback_reasons() == {}


@each_cache
@needs_hybrids
def test_assisted_decoding_is_refused_for_hybrids(make_cache):
    name = "qwen3_next"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(1, 80)
    with pytest.raises(ValueError, match=r"crop|stateful|cache"):
        model(name).generate(ids, attention_mask=mask, past_key_values=make_cache(name),
                             max_new_tokens=4, prompt_lookup_num_tokens=4)  # fmt: skip


@each_cache
@pytest.mark.parametrize("name", NAMES)
def test_turns_and_reset(make_cache, name):
    kvcore.hf.enable(model(name))
    ids, mask = prompt(1, 90)
    cache = make_cache(name)
    arguments = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    for turn in range(3):
        more, _ = prompt(1, 25, seed=turn + 1)
        ids = torch.cat([ids, more], 1)
        mask = torch.ones_like(ids)
        begin = ids.shape[1]
        ids = model(name).generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
        assert best_choices(name, ids, mask, begin).max() < LOGIT_ERROR
        assert cache.get_seq_length() == ids.shape[1] - 1
    assert kvcore.hf.fallback_reasons() == {}
    cache.reset()
    assert cache.get_seq_length() == 0
    other, mask = prompt(1, 100, seed=9)
    again = model(name).generate(other, attention_mask=mask, past_key_values=cache, **arguments)
    fresh = model(name).generate(other, attention_mask=mask, past_key_values=make_cache(name),
                                 **arguments)  # fmt: skip
    assert torch.equal(again, fresh)


def num_blocks(cache):
    return sum(slab.shape[0] for slab in cache.turbo_layers()[0].store.pool.slabs)


@each_cache
@pytest.mark.parametrize("name", ["llama", *HYBRID_NAMES])
def test_several_answers_to_one_prompt(make_cache, name):
    """The prompt is read once and repeated; answers share its pages."""
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 140, (0, 40))
    cache = make_cache(name)
    stepwise_logits(name, cache, ids, mask, [140])
    has_pages = isinstance(cache, TurboCache)
    pool = num_blocks(cache) if has_pages else 0
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2, 3, 5]))
    if has_pages:
        assert num_blocks(cache) == pool
    rows = [0, 0, 1, 1]
    more, _ = prompt(4, 30, seed=3)
    ids, mask = torch.cat([ids[rows], more], 1), torch.cat([mask[rows], torch.ones_like(more)], 1)
    with torch.no_grad():
        logits = model(name)(more, attention_mask=mask, past_key_values=cache).logits
    check_logits(name, logits, ids, mask, begin=140)


@each_cache
def test_threads_with_a_cache_each(make_cache):
    """As a server has them: one model, one prompt a thread, and the logits of a thread alone."""
    name = "qwen3"
    kvcore.hf.enable(model(name))
    ids, mask = prompt(2, 130)
    steps = [90, *[1] * 40]

    def run(row):
        return stepwise_logits(
            name, make_cache(name), ids[row : row + 1], mask[row : row + 1], steps
        )

    alone = [run(row) for row in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, range(2)))
    assert all(map(torch.equal, together, alone))
