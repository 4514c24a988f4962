"""Tiny models of three architectures with head_dim 64, with and without a cache."""

import functools

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3NextConfig

from compare import relative_l2
from kvcore.cache import Dictionaries, LexicoCache, TurboCache
from lexico_cases import make_dictionary

transformers.logging.set_verbosity_error()

# Before 5.8 a model with linear attention brought a cache class of its own.
HAS_HYBRIDS = version.parse(transformers.__version__) >= version.parse("5.8")
needs_hybrids = pytest.mark.skipif(not HAS_HYBRIDS, reason="transformers before 5.8")
NAMES = ("llama", "qwen3", "qwen3_next") if HAS_HYBRIDS else ("llama", "qwen3")
HYBRID_NAMES = NAMES[2:]
# A layer with a sliding window of so many tokens, and one without.
SLIDING, WINDOW = "qwen3_sliding", 32
VOCAB = 96
# Left padding of a batch of three.
PADDING = (0, 17, 90)
# Relative L2 error of the logits of these models against no cache at all. The largest found, over
# four ways to cut 300 tokens into steps: 1.3 % at 8 bits and 4.9 % at 4 bits, both of qwen3.
_TOLERANCE = {8: 0.015, 4: 0.06}
COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough that attention is not uniform, narrow enough that the model is not chaotic.
    "initializer_range": 0.1,
}
_LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0, 1],
    "layer_types": ["linear_attention", "full_attention"],
}


def config(name, **arguments):
    if name == "qwen3_next":
        return Qwen3NextConfig(**{**COMMON, **_LINEAR, **arguments})
    if name == SLIDING:
        sliding = {"use_sliding_window": True, "sliding_window": WINDOW}
        types = {"layer_types": ["sliding_attention", "full_attention"]}
        return Qwen3Config(**{**COMMON, **sliding, **types, **arguments})
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[name]
    return kind(**{**COMMON, **arguments})


@functools.cache
def model(name):
    """Shared by tests: who changes it restores it."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(name)).eval()


def prompt(batch, tokens, padding=(), seed=0):
    """Token ids and attention mask; ``padding[b]`` leading ones of sequence b are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for b, count in enumerate(padding):
        ids[b, :count] = 0
        mask[b, :count] = 0
    return ids, mask


@torch.no_grad()
def full_logits(name, ids, mask):
    """Logits of every position in one pass without a cache, fp32, transformers' own attention."""
    net = model(name)
    before = net.config._attn_implementation
    net.set_attn_implementation("eager")
    logits = net(ids, attention_mask=mask, use_cache=False).logits
    net.set_attn_implementation(before)
    return logits


@torch.no_grad()
def stepwise_logits(name, cache, ids, mask, steps):
    """Logits of every position through a cache, in chunks of the given lengths."""
    net, chunks, begin = model(name), [], 0
    for step in steps:
        end = begin + step
        out = net(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        chunks.append(out.logits)
        begin = end
    assert begin == ids.shape[1]
    return torch.cat(chunks, 1)


def real(values, mask):
    """Rows of ``values`` at tokens that are not padding."""
    return values[mask.bool()]


def turbo_cache(name, bits=8, **arguments):
    return TurboCache(config(name), k_bits=bits, v_bits=bits, **arguments)


@functools.cache
def dictionaries(name, atoms=(96, 80), sparsity=64):
    """Of random atoms: what they say of K and V is of no importance, but that 64 say it all."""
    full = [i for i, kind in enumerate(_layer_types(name)) if kind == "full_attention"]
    pairs = {
        i: tuple(make_dictionary(n, 64, seed=2 * i + kv) for kv, n in enumerate(atoms))
        for i in full
    }
    return Dictionaries(pairs, config(name), sparsity=sparsity, model_id=name)


def _layer_types(name):
    return getattr(config(name), "layer_types", None) or ["full_attention"] * 2


def lexico_cache(name, **arguments):
    """With as many atoms as channels: what is left is the rounding of coefficients to 8 bits."""
    sizes = {"buffer_tokens": 24, "encode_tokens": 8}
    return LexicoCache(config(name), dictionaries(name), **{**sizes, **arguments})


each_cache = pytest.mark.parametrize(
    "make_cache", [turbo_cache, lexico_cache], ids=["turbo", "lexico"]
)


def stored_lens(cache):
    """Tokens of each sequence that the stores of a cache hold, without padding."""
    stores = [layer.store for layer in cache.compressed_layers()]
    lens = stores[0].lens().tolist()
    for store in stores:
        assert store.lens().tolist() == lens
        if isinstance(cache, TurboCache):
            assert store.seq_lens.tolist() == lens
    return lens


def check_logits(name, logits, ids, mask, bits=8, begin=0):
    expected = full_logits(name, ids, mask)
    error = relative_l2(real(logits, mask[:, begin:]), real(expected[:, begin:], mask[:, begin:]))
    assert error < _TOLERANCE[bits]
