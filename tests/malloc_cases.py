"""Calls of ops and caches whose allocations are made to fail (hostile_malloc.py)."""

import copy
import functools

import numpy as np
import torch

import cache_tools
import cases
from cache_tools import random_kv
from cases import Shape, make_qkv
from compare import assert_bitwise_equal
from kvcore.cache import TurboSettings
from kvcore.cache.layer import CompressedLayer
from kvcore.cache.static_layer import StaticTurboLayer
from kvcore.cache.store import TurboStore
from lexico_cases import make_dictionary, make_problem, random_codes

OPS = torch.ops.kvcore


def flat(values):
    """The tensors in a structure of tuples and lists."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [x for value in values for x in flat(value)] if isinstance(values, (list, tuple)) else []


def copied(values):
    return [x.clone() for x in flat(values)]


def assert_same(actual, expected, name):
    for i, (a, e) in enumerate(zip(flat(actual), flat(expected), strict=True)):
        assert_bitwise_equal(a, e, f"{name} {i}")


class OpCase:
    """One call of an op; `args` may be changed by it."""

    def __init__(self, name, *args, **kwargs):
        self.op = getattr(torch.ops.kvcore, name).default
        self.args, self.kwargs = args, kwargs
        self.before = copied(args)
        self.expected = copied(self.call())
        self.after = copied(args)
        self.restore()

    def call(self):
        return self.op(*self.args, **self.kwargs)

    def restore(self):
        for x, old in zip(flat(self.args), self.before, strict=True):
            x.copy_(old)

    def check_unchanged(self):
        assert_same(self.args, self.before, "argument")

    def check_done(self, result):
        assert_same(() if result is None else result, self.expected, "result")
        assert_same(self.args, self.after, "argument")


class CacheCase:
    """One call on a layer of a cache, by default an update by ``num_new`` tokens.

    ``tokens`` are in it before.
    """

    def __init__(self, make_layer, tokens, num_new=0, action=None, heads=2):
        generator = torch.Generator().manual_seed(0)
        self.fresh = make_layer()
        if tokens:
            self.fresh.update(*random_kv(generator, 2, tokens, heads))
        self.new = random_kv(generator, 2, num_new, heads)
        self.action = action or (lambda layer: layer.update(*self.new))
        self.before = cache_tools.snapshot(self.fresh)
        self.restore()
        self.expected = copied(self.call() or ())
        self.after = cache_tools.snapshot(self.layer)
        self.restore()

    def call(self):
        return self.action(self.layer)

    def restore(self):
        self.layer = copy.deepcopy(self.fresh)

    def check_unchanged(self):
        cache_tools.assert_unchanged(self.layer, self.before)

    def check_done(self, result):
        assert_same(copied(result or ()), self.expected, "result")
        cache_tools.assert_unchanged(self.layer, self.after)
        store = self.layer.synced_store()
        if isinstance(store, TurboStore):
            # A block that was taken for nothing is found again.
            store.collect()
            used = sum(store.pool.num_used(bits) for bits in (8, 4, 2))
            named = len(np.unique(store.host_table[store.host_table >= 0]))
            assert used == named, f"{used} blocks are in use, {named} named"


def crop(count):
    return functools.partial(CompressedLayer.crop, tokens_to_remove=-count)


def select(*indices):
    return functools.partial(CompressedLayer.batch_select_indices, indices=torch.tensor(indices))


def turbo_ops():
    """Every op, reading and writing, with and without what makes it allocate more."""
    q, k, v = make_qkv(Shape(64, 200, 3, 2, 2, 2))
    balance, mean = OPS.turbo_calibrate(k)
    padding = torch.tensor([3, 0], dtype=torch.int32)
    bounds = [torch.tensor([0, 1, n], dtype=torch.int32) for n in (3, 200)]
    store = cases.store_of(OPS.turbo_quantize(k, v, balance, mean))
    long = make_qkv(Shape(64, 2100, 1, 2, 2))
    split = cases.store_of(OPS.turbo_quantize(*long[1:]))
    found = {
        "calibrate": OpCase("turbo_calibrate", k, padding),
        "head_priority": OpCase("turbo_head_priority", v, padding),
        "attention": OpCase("turbo_attention", q, k, v, balance, mean, causal=True),
        "attention_packed": OpCase("turbo_attention", q[:1], k[:1], v[:1], None, None, *bounds),
        "quantize": OpCase("turbo_quantize", k, v, balance, mean, padding, v_bits=[2]),
        "dequantize": OpCase("turbo_dequantize", *store.readable, balance, mean, kv_len=200),
        "decode": OpCase("turbo_decode", q, *store.readable, balance, mean),
        "decode_split": OpCase("turbo_decode", long[0], *split.readable),
        "rewind": OpCase("turbo_rewind", *store.readable, torch.tensor([70, 10]).int()),
    }
    for num_new in (1, 30, 200):
        grown = cases.empty_store(2, 2, 64, 7)
        OPS.turbo_append(k, v, *grown.writable, balance, mean, padding)
        new = k[:, :, :num_new] * 3, v[:, :, :num_new] * 3
        found[f"append_{num_new}"] = OpCase("turbo_append", *new, *grown.writable, balance, mean)
    return found


# Kept as it is; the first that is quantized; an open page; a page that fills; many; a prompt.
UPDATES = ((0, 5), (60, 10), (70, 1), (127, 1), (70, 200), (0, 100))


def turbo_caches():
    """Updates of both kinds of layers; what else changes one that grows."""
    make = functools.partial(cache_tools.turbo_layer, v_bits=2)
    settings = TurboSettings(v_bits=2)
    static = functools.partial(StaticTurboLayer, settings, max_cache_len=320)
    found = {}
    for tokens, num_new in UPDATES:
        found[f"dynamic_{tokens}+{num_new}"] = CacheCase(make, tokens, num_new)
        found[f"static_{tokens}+{num_new}"] = CacheCase(static, tokens, num_new)
    for tokens, drops in ((30, (3, 25)), (200, (3, 25, 150))):
        for dropped in drops:
            found[f"crop_{tokens}-{dropped}"] = CacheCase(make, tokens, action=crop(dropped))
        found[f"select_{tokens}"] = CacheCase(make, tokens, action=select(1, 1, 0))
    return found


def lexico_ops():
    """Every op; the encoder with each of its searches, attention with and without splits."""
    dictionary = make_dictionary(70, 64)
    gram = dictionary @ dictionary.T
    few, many = cases.normal(1, 2, 3, 64, seed=1), cases.normal(2, 2, 40, 64, seed=2)
    codes = OPS.lexico_encode(many, dictionary, sparsity=5)[:3]
    k, v = (random_codes(1, 2, 4096, 3, 70, seed) for seed in (3, 4))
    tails = [torch.zeros(1, 2, 128, 64 + 96 * 3, dtype=torch.uint8) for _ in range(2)]
    OPS.lexico_append(*k, *v, *tails, torch.zeros(1, dtype=torch.int32))
    blocks = OPS.lexico_seal(*tails, v_atoms=70)
    sizes = {"k_sparsity": 3, "v_sparsity": 3, "v_atoms": 70}
    open_tails = [torch.zeros(2, 2, 2, 64 + 96 * 5, dtype=torch.uint8) for _ in range(2)]
    lens = torch.tensor([3, 24], dtype=torch.int32)
    decode = make_problem(Shape(64, 40, 1, 2, 2), blocks=1, buffer=5, left_padding=(3,))
    prompt = make_problem(Shape(64, 40, 9, 2, 2, 2), buffer=5, buffer_lens=(5, 2))
    return {
        "encode_few": OpCase("lexico_encode", few, dictionary, sparsity=5),
        "encode_many": OpCase("lexico_encode", many, dictionary, sparsity=5, tolerance=0.2),
        "encode_given_gram": OpCase("lexico_encode", few, dictionary, gram, sparsity=5),
        "reconstruct": OpCase("lexico_reconstruct", *codes, dictionary),
        "append": OpCase("lexico_append", *codes, *codes, *open_tails, lens),
        "seal": OpCase("lexico_seal", *tails, v_atoms=70),
        "unseal": OpCase("lexico_unseal", *blocks, **sizes),
        "unpack": OpCase("lexico_unpack", tails[0], kv_len=70),
        "attention": OpCase("lexico_attention", *decode.tensors()),
        "attention_prompt": OpCase("lexico_attention", *prompt.tensors(), window=30),
    }


def lexico_caches():
    """Updates that code nothing, the first tokens, a full buffer, many; over the end of a block."""
    make = functools.partial(cache_tools.lexico_layer, k_sparsity=2, v_sparsity=3)
    # Atoms are chosen one by one, so a few are room enough.
    grows = functools.partial(
        make, k_tolerance=0.5, v_tolerance=0.6, adaptive_bytes=4 * cache_tools.HEAD_DIM * 5
    )
    found = {}
    for tokens, num_new in ((0, 5), (0, 60), (60, 1), (28, 1), (60, 50)):
        found[f"update_{tokens}+{num_new}"] = CacheCase(make, tokens, num_new)
    found["seal"] = CacheCase(make, 4090, 30, heads=1)
    found["unseal"] = CacheCase(make, 4130, action=crop(100), heads=1)
    for tokens, num_new in ((0, 40), (40, 50)):
        found[f"grow_{tokens}+{num_new}"] = CacheCase(grows, tokens, num_new)
    for dropped in (25, 50):
        found[f"crop_60-{dropped}"] = CacheCase(make, 60, action=crop(dropped))
    for tokens in (10, 60):
        found[f"select_{tokens}"] = CacheCase(make, tokens, action=select(1, 1, 0))
    return found


# How the cases are made, and the bytes from which on their allocations fail: below 64 torch's own
# Python bindings end the process.
SETS = {
    "turbo-ops": (turbo_ops, 0),
    "turbo-caches": (turbo_caches, 64),
    "lexico-ops": (lexico_ops, 0),
    "lexico-caches": (lexico_caches, 64),
}
