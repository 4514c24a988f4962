"""Calls whose n-th allocation fails, for every n, in a process of its own.

``python hostile_malloc.py ops|caches THREADS`` runs with ``native/failing_malloc.c`` preloaded and
prints a line of JSON for each case: its name, how many allocations there are to fail, the errors
that were raised with how often, and what went wrong.
"""

import collections
import copy
import ctypes
import functools
import json
import sys

import numpy as np
import torch

import cache_tools
import cases
from cases import Shape, make_qkv
from compare import assert_bitwise_equal
from kvcore.cache import TurboLayer, TurboSettings
from kvcore.cache.static_layer import StaticTurboLayer

OPS = torch.ops.kvcore
EVERY = 2**62
# An op takes some 50 allocations, an update of the cache some 100.
MOST = 5_000


class FailingMalloc:
    """Counts the allocations in its block, and lets some of them fail."""

    def __init__(self):
        library = ctypes.CDLL(None)
        self.arm, self.disarm = library.failing_malloc_arm, library.failing_malloc_disarm
        self.arm.argtypes, self.arm.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_size_t], None
        self.disarm.argtypes, self.disarm.restype = [], ctypes.c_long

    def call(self, function, first, failures, min_bytes):
        """The function's result, its error, and whether an allocation failed."""
        result = error = None
        self.arm(first, failures, min_bytes)
        try:
            result = function()
        except (MemoryError, RuntimeError, SystemError) as raised:  # the last is numpy's
            error = raised
        finally:
            counted = self.disarm()
        return result, error, counted > first


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
    """One call on a layer of the cache, by default an update."""

    def __init__(self, tokens, num_new=0, static=False, action=None):
        generator = torch.Generator().manual_seed(0)
        self.fresh = cache_tools.turbo_layer(v_bits=2)
        if static:
            self.fresh = StaticTurboLayer(TurboSettings(v_bits=2), max_cache_len=320)
        if tokens:
            self.fresh.update(*cache_tools.random_kv(generator, 2, tokens))
        self.new = cache_tools.random_kv(generator, 2, num_new)
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
        if store is not None:
            # A block that was taken for nothing is found again.
            store.collect()
            used = sum(store.pool.num_used(bits) for bits in (8, 4, 2))
            named = len(np.unique(store.host_table[store.host_table >= 0]))
            assert used == named, f"{used} blocks are in use, {named} named"


def op_cases():
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


def cache_cases():
    """Updates of both kinds of layers; what else changes one that grows."""
    found = {}
    for tokens, num_new in UPDATES:
        for static in (False, True):
            name = f"{'static' if static else 'dynamic'}_{tokens}+{num_new}"
            found[name] = CacheCase(tokens, num_new, static)
    for tokens in (30, 200):
        for dropped in (3, 25, 150)[: 2 if tokens == 30 else 3]:
            crop = functools.partial(TurboLayer.crop, tokens_to_remove=-dropped)
            found[f"crop_{tokens}-{dropped}"] = CacheCase(tokens, action=crop)
        order = torch.tensor([1, 1, 0])
        select = functools.partial(TurboLayer.batch_select_indices, indices=order)
        found[f"select_{tokens}"] = CacheCase(tokens, action=select)
    return found


def run(malloc, case, failures, min_bytes):
    """Fails the n-th allocation and `failures - 1` more, for every n; returns how many there are.

    A call that fails changes nothing, and succeeds when it is made again.
    """
    errors = collections.Counter()
    for n in range(MOST):
        result, error, failed = malloc.call(case.call, n, failures, min_bytes)
        if error is not None:
            errors[f"{type(error).__name__}: {error}".splitlines()[0]] += 1
            assert failed, f"nothing failed, but: {error}"
            case.check_unchanged()
            result = case.call()
        case.check_done(result)
        case.restore()
        if not failed:
            return n, errors
    raise AssertionError(f"more than {MOST} allocations")


def main():
    what, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    malloc = FailingMalloc()
    # Below 64 bytes torch's own Python bindings end the process.
    named, smallest = (op_cases(), 0) if what == "ops" else (cache_cases(), 64)
    for name, case in named.items():
        # One alone; then all of those that hold data, as when memory is used up.
        for kind, failures, min_bytes in (("one", 1, smallest), ("all", EVERY, 1024)):
            line = {"case": name, "kind": kind, "failed": 0, "errors": {}, "wrong": ""}
            try:
                line["failed"], line["errors"] = run(malloc, case, failures, min_bytes)
            except AssertionError as wrong:
                line["wrong"] = str(wrong)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
