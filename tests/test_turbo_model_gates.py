"""What TurboCache may cost the shipped models, paired with the full cache on the same tokens.

Every scored token is predicted through the cache. The models are those of the demo: `control`
(Llama, attention in every layer, no QK norm) and `hybrid` (Qwen3-Next, QK norm).
"""

import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cases
from kvcore.eval import kl_divergence, through_caches

pytest.importorskip("transformers")

from kvcore.demo import models, tasks
from kvcore.demo.measure import Workload, measure
from kvcore.eval import bits_per_byte, paired_ratio_interval
from kvcore.eval.caches import FULL, CacheChoice

EIGHT, FOUR = CacheChoice(k_bits=8, v_bits=8), CacheChoice(k_bits=4, v_bits=4)
PLAIN_EIGHT = dataclasses.replace(EIGHT, balance=False, subtract_mean=False)
# Relative change of bits per byte, and loss of recall.
MAX_BITS_CHANGE = {EIGHT: 0.005, FOUR: 0.02}
MAX_RECALL_LOSS = {EIGHT: 0.01, FOUR: 0.03}

CONTEXT_LEN, SCORED = 1024, 256


@dataclasses.dataclass(frozen=True)
class Size:
    sequences: int
    prompts: int  # of 32 queries
    distance: tuple[int, int]  # tokens from what a query asks for to the query


SMALL, WHOLE = Size(8, 16, (500, 700)), Size(48, 128, (1500, 2000))


@pytest.fixture(params=[SMALL, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["small", "whole"])
def size(request):
    return request.param


class On(TorchDispatchMode):
    """Runs the ops of turbo on another backend's kernels, and remembers which ran."""

    def __init__(self, backend):
        super().__init__()
        self.backend, self.ran = backend, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("kvcore::")
        if name.startswith("turbo_"):
            self.ran.add(name)
            func = getattr(self.backend.ops, name).default
        return func(*args, **(kwargs or {}))


@pytest.fixture(
    params=[
        pytest.param(*param.values, id=param.id, marks=[*param.marks, pytest.mark.slow])
        if param.id == "simt"
        else param
        for param in cases.BACKENDS
        if param.id != "cuda"
    ]
)
def kernels(request, size):
    """Whose kernels run: the CPU's, or the source of CUDA's, which takes minutes."""
    if request.param is cases.CPU:
        yield
        return
    if size is WHOLE:
        pytest.skip("hours on the SIMT shim")
    with On(request.param) as ran_on:
        yield
    assert {"turbo_calibrate", "turbo_quantize", "turbo_append", "turbo_decode"} <= ran_on.ran


@pytest.fixture(scope="module", params=models.NAMES)
def model(request):
    return models.load(request.param)


@pytest.fixture(scope="module")
def control():
    return models.load("control")


def _text(size):
    return tasks.text_chunks(size.sequences, CONTEXT_LEN + SCORED + 2)


# ---- the models as they are


def test_quality(model, size):
    nearest, furthest = size.distance
    recall = tasks.recall_prompts(size.prompts, min_distance=nearest, max_distance=furthest)
    work = Workload(
        _text(size), CONTEXT_LEN, recall.tokens, recall.context_len, recall.query_positions
    )
    assert size is SMALL or work.num_queries >= 4000
    found = measure(model, [FULL, EIGHT, FOUR], work)
    assert found[FULL].recall.mean > 0.9  # a model that recalls nothing loses nothing
    for choice, quality in found.items():
        if choice == FULL:
            continue
        print(f"{choice.label}: bits {quality.bits_change}, recall {quality.recall_change}")
        # The interval, not only the mean, must lie within the bound.
        assert quality.bits_change.high <= MAX_BITS_CHANGE[choice], choice.label
        assert quality.recall_change.mean >= -MAX_RECALL_LOSS[choice], choice.label
        assert quality.kl.mean > 0, "the cache was not read"


# ---- outliers of K, planted


def _attention_layers(model):
    return [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]


def _widest_pairs(model, tokens, count):
    """The rotary pairs of each attention layer whose keys reach furthest: ``[kv_heads, count]``."""
    cache = FULL.make(model)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    pairs = []
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            continue
        k = layer.keys - layer.keys.mean((0, 2), keepdim=True)
        half = _rotary_dim(model) // 2
        reach = k.abs().amax((0, 2))[:, : 2 * half].unflatten(1, (2, half)).amax(1)
        pairs.append(reach.topk(count).indices)
    return pairs


def _rotary_dim(model):
    config = model.config
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return int(config.head_dim * share)


@torch.no_grad()
def with_rotary_outliers(model, tokens, factor=16.0):
    """A copy with two rotary pairs of each kv head `factor` times as large in K, and as small in Q.

    Scores are products of the two, so that the model computes what it did. Behind a QK norm the
    scale is in the norms' weights, which all heads share: the pairs are those of head 0.
    """
    pairs = _widest_pairs(model, tokens, 2)
    model = copy.deepcopy(model)
    config = model.config
    head_dim, half = config.head_dim, _rotary_dim(model) // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    for attention, of_heads in zip(_attention_layers(model), pairs, strict=True):
        for head, of_head in enumerate(of_heads.tolist()):
            channels = [pair + side for pair in of_head for side in (0, half)]
            if hasattr(attention, "k_norm"):
                if head == 0:  # Qwen3-Next's norms multiply by 1 + weight
                    attention.k_norm.weight[channels] += 1
                    attention.k_norm.weight[channels] *= factor
                    attention.k_norm.weight[channels] -= 1
                    attention.q_norm.weight[channels] += 1
                    attention.q_norm.weight[channels] /= factor
                    attention.q_norm.weight[channels] -= 1
                continue
            for channel in channels:
                attention.k_proj.weight[head * head_dim + channel] *= factor
                for q_head in range(head * groups, (head + 1) * groups):
                    attention.q_proj.weight[q_head * head_dim + channel] /= factor
    return model


@torch.no_grad()
def with_key_bias(model, value=40.0):
    """A copy whose keys have a bias of `value` in two slow rotary pairs of each kv head.

    The slowest pair does not turn within the context: its bias moves all scores of a row alike.
    The other turns a little, which the mean over tokens does not remove. A bias in faster pairs
    would be a strong position signal, and the model would be another.
    """
    model = copy.deepcopy(model)
    head_dim = model.config.head_dim
    half = head_dim // 2
    bias = torch.zeros(model.config.num_key_value_heads, head_dim)
    bias[:, [half - 1, head_dim - 1, half - 10, head_dim - 10]] = value
    for attention in _attention_layers(model):
        attention.k_proj.bias = torch.nn.Parameter(bias.flatten().clone())
    return model


def _text_changes(model, choices, text):
    """Relative change of bits per byte, and mean KL, of each cache."""
    full, *others = through_caches(model, [FULL, *choices], text, CONTEXT_LEN)
    targets = text[:, CONTEXT_LEN + 1 :]
    bits = bits_per_byte(full, targets)
    found = {}
    for choice, scores in zip(choices, others, strict=True):
        change = paired_ratio_interval(bits_per_byte(scores, targets), bits)
        found[choice] = change, kl_divergence(full, scores).mean().item()
        print(f"{choice.label} (balance {choice.balance}): bits {change}, KL {found[choice][1]}")
    return found


def _check_bits(found):
    for choice, bound in MAX_BITS_CHANGE.items():
        assert found[choice][0].high <= bound, choice.label


def test_rotary_outliers_leave_the_full_cache_alone(model):
    text = _text(SMALL)[:2]
    changed = with_rotary_outliers(model, text)
    found = []
    for m in (model, changed):
        cache = FULL.make(m)
        with torch.no_grad():
            found.append((torch.log_softmax(m(text, past_key_values=cache).logits, -1), cache))
    (before, cache), (after, wide_cache) = found
    torch.testing.assert_close(after, before, rtol=0, atol=2e-3)
    for layer, wide in zip(cache.layers, wide_cache.layers, strict=True):
        if getattr(layer, "keys", None) is not None:
            grown = wide.keys.abs().amax((0, 2)) / layer.keys.abs().amax((0, 2))
            # Two pairs of each head, which a rotation spreads over both channels of a pair.
            assert ((grown - 16).abs() < 1).sum().item() == 4 * grown.shape[0]


@pytest.mark.parametrize("factor", [16, 32])
def test_rotary_outliers(model, size, factor, kernels):
    text = _text(size)
    changed = with_rotary_outliers(model, text[:2], factor)
    found = _text_changes(changed, [EIGHT, FOUR, PLAIN_EIGHT], text)
    _check_bits(found)
    # Without the calibration the same outliers move the predictions by far more.
    assert found[PLAIN_EIGHT][1] > 20 * found[EIGHT][1]


def test_8_bit_without_balance_fails_on_rotary_outliers(control, size, kernels):
    """The outliers are a test only if the method without its remedy does not pass it."""
    text = _text(size)
    changed = with_rotary_outliers(control, text[:2], 32)
    unbalanced = dataclasses.replace(EIGHT, balance=False)
    change, _ = _text_changes(changed, [unbalanced], text)[unbalanced]
    assert change.mean > MAX_BITS_CHANGE[EIGHT]
    assert change.low > 0


def test_key_bias(control, size, kernels):
    text = _text(size)
    found = _text_changes(with_key_bias(control), [EIGHT, FOUR, PLAIN_EIGHT], text)
    _check_bits(found)
    assert found[PLAIN_EIGHT][1] > 5 * found[EIGHT][1]


@pytest.mark.skipif("not any(p.id == 'simt' for p in cases.BACKENDS)", reason="no kvcore_simt")
@pytest.mark.simt
def test_rotary_outliers_on_the_shim(control):
    """The same outliers through the CUDA kernels' source: the caches cost what they do on the CPU.

    The workloads above are slow there, and less text does not tell half a percent of bits per byte:
    so it is two short sequences, of which every prediction is compared with the CPU's.
    """
    context_len, scored = 200, 40
    text = tasks.text_chunks(2, context_len + scored + 2)
    changed = with_rotary_outliers(control, text)
    choices = [EIGHT, FOUR, PLAIN_EIGHT]
    full, *expected = through_caches(changed, [FULL, *choices], text, context_len)
    with On(cases.SIMT) as simt:
        found = through_caches(changed, choices, text, context_len)
    assert {"turbo_calibrate", "turbo_quantize", "turbo_append", "turbo_decode"} <= simt.ran
    for choice, scores, cpu in zip(choices, found, expected, strict=True):
        cost = kl_divergence(full, cpu).mean().item()
        moved = kl_divergence(cpu, scores).mean().item()
        print(f"{choice.label} (balance {choice.balance}): KL {cost:.2e}, shim to CPU {moved:.2e}")
        assert moved < 0.01 * cost
    eight, plain = (kl_divergence(full, found[i]).mean().item() for i in (0, 2))
    assert plain > 20 * eight
