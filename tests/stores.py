"""What the tests of the store share: ops on any backend, and equality of whole stores."""

import itertools

import cases
from cases import Shape, Store
from compare import assert_bitwise_equal
from kvcore.reference.turbo import blocks


def make_kv(*args, seed=0, **kwargs):
    return cases.make_qkv(Shape(*args, **kwargs), seed)[1:]


def on(device, *values):
    return [None if x is None else x.to(device) for x in values]


def run(backend, name, *args, **kwargs):
    """An op on a backend, tensors given on the CPU; results back on the CPU."""
    results = getattr(backend.ops, name)(*on(backend.device, *args), **kwargs)
    return tuple(x.cpu() for x in results) if isinstance(results, tuple) else results.cpu()


def quantize(backend, *args, **kwargs):
    return cases.store_of(run(backend, "turbo_quantize", *args, **kwargs))


def append(backend, store, k, v, k_balance=None, k_mean=None, left_padding=None, **kwargs):
    args = on(backend.device, k_balance, k_mean, left_padding)
    k, v = on(backend.device, k, v)
    backend.ops.turbo_append(k, v, *store.writable, *args, **kwargs)


def rewind(backend, store, new_lens):
    backend.ops.turbo_rewind(*store.readable, new_lens.to(backend.device))


def with_stale_codes_zeroed(store: Store) -> Store:
    """A copy without tail codes past the ends of sequences: after a rewind they mean nothing."""
    store = store.to("cpu")
    head_dim = blocks.tail_head_dim(store.tail.shape[-1])
    for b, kv, slot in itertools.product(range(len(store.seq_lens)), range(2), range(2)):
        held = store.tail[b, kv, :, slot]
        if len(held) == 0:
            continue
        page = int(blocks.block_page(held)[0])
        codes, scale = blocks.unpack_blocks(held, head_dim, kv)
        codes[:, max(0, int(store.seq_lens[b]) - 64 * page) :] = 0
        store.tail[b, kv, :, slot] = blocks.pack_blocks(codes, scale, 8, kv, page)
    return store


def assert_same_store(actual: Store, expected: Store, note: str = "") -> None:
    actual, expected = with_stale_codes_zeroed(actual), with_stale_codes_zeroed(expected)
    for (name, a), e in zip(actual.named().items(), expected.named().values(), strict=True):
        assert_bitwise_equal(a, e, f"{name}{note}")


def run_dequantize(backend, store, k_balance=None, k_mean=None, **kwargs):
    calibration = on(backend.device, k_balance, k_mean)
    return [x.cpu() for x in backend.ops.turbo_dequantize(*store.readable, *calibration, **kwargs)]
