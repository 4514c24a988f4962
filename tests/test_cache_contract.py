"""Random calls on a layer, against dense tensors and against stores of single sequences.

The long run: ``pytest -m slow tests/test_cache_contract.py``.
"""

import copy
import functools

import pytest
import torch

import hf_models
import kvcore
from cache_calls import MAX_TOKENS, Calls
from cache_tools import (
    HEAD_DIM,
    HEADS,
    Mirror,
    stored,
    turbo_layer,
)
from compare import relative_l2
from kvcore.cache import LexicoLayer, LexicoSettings, TurboSettings
from kvcore.cache.static_layer import StaticTurboLayer
from kvcore.hf.attention import exact_attention

SHORT_SEEDS, LONG_SEEDS, SEEDS_PER_TEST = 240, 10_000, 250
# Relative error of K in 8 bits; 2 and 4 bits are checked against the single store only. A store of
# fixed capacity that began with fewer than 16 tokens is not calibrated: then the range of all
# channels is that of the widest.
DENSE_TOLERANCE = {True: 0.02, False: 0.04}


class Run(Calls):
    """Calls on a layer of a TurboCache."""

    def __init__(self, seed, static):
        super().__init__(seed)
        self.static = static
        self.settings = TurboSettings(
            k_bits=self.rng.choice([8, 4, 2]),
            v_bits=self.rng.choice([8, 4, 2]),
            sink_pages=self.rng.choice([0, 1, 2]),
            low_bit_heads=self.rng.choice([0.0, 0.0, 0.5]),
        )
        if static:
            self.layer = StaticTurboLayer(self.settings, self.tracker, max_cache_len=MAX_TOKENS)
            self.tracker.native = True
        else:
            self.layer = turbo_layer()
            self.layer.settings, self.layer.tracker = self.settings, self.tracker
        self.batch = self.rng.choice([1, 2, 3])
        self.begin()

    def make_mirror(self):
        return Mirror(self.settings)

    def updated(self, kv, returned, new_padding):
        num_new = kv.shape[3]
        was_quantized = self.mirrors[0].tensors is not None
        for b, mirror in enumerate(self.mirrors):
            mirror.append(kv[:, b, :, new_padding[b] :])
            self.padding[b] += new_padding[b]
        longest = max(self.tokens - padding for padding in self.padding)
        if not self.static:
            assert (self.layer.store is not None) == (was_quantized or longest >= 64)
        begun = self.layer.store is not None and self.layer.store.is_calibrated
        if begun and not was_quantized:
            lens = [self.tokens - padding for padding in self.padding]
            donor = self.mirrors[lens.index(longest)]
            donor.quantize(self.layer.store.head_bits)
            for mirror, length in zip(self.mirrors, lens, strict=True):
                if mirror is not donor:
                    own = length >= min(64, longest)
                    mirror.quantize(self.layer.store.head_bits, None if own else donor)
            if not self.static:
                self.check_exact(returned)
            elif self.tokens == num_new:
                assert torch.equal(returned[0], kv[0])
        elif not was_quantized and not self.static:
            self.check_exact(returned)

    def check_exact(self, returned):
        for b, mirror in enumerate(self.mirrors):
            both = torch.stack([returned[0][b], returned[1][b]])[:, :, self.padding[b] :]
            assert torch.equal(both, mirror.dense)

    def cropped(self, left):
        for mirror, padding in zip(self.mirrors, self.padding, strict=True):
            mirror.crop(left - padding)

    def check(self):
        layer = self.layer
        assert int(layer.get_seq_length()) == self.tokens
        if layer.keys is None:
            return
        both = stored(layer)
        assert both.shape == (2, self.batch, HEADS, self.tokens, HEAD_DIM)
        for b, mirror in enumerate(self.mirrors):
            mine = both[:, b]
            assert not mine[:, :, : self.padding[b]].any() or layer.store is None
            mine = mine[:, :, self.padding[b] :]
            assert torch.equal(mine, mirror.read()), f"sequence {b}"
            if layer.store is None or mirror.tensors is None:
                continue
            clamped = layer.store.clamp_count[b]
            assert torch.equal(clamped, mirror.tensors["clamp_count"][0])
            # One value that was cut off, after a prompt that said too little of the scale of what
            # follows or a crop that opened a page again, outweighs the rounding of all others.
            exact = self.settings.k_bits == 8 and not self.settings.low_bit_heads
            if exact and mine.numel() and not clamped[0].any():
                calibrated = bool((layer.store.k_balance[b] != 1).any())
                assert relative_l2(mine[0], mirror.dense[0]) < DENSE_TOLERANCE[calibrated]
        if layer.store is not None:
            self.check_store(layer.synced_store())

    def check_store(self, store):
        """Every full page has a block of its width, which it shares only with itself."""
        lens = [self.tokens - padding for padding in self.padding]
        assert store.seq_lens.tolist() == lens
        owners = {}
        for b, rows in enumerate(store.block_table.tolist()):
            for kv, heads in enumerate(rows):
                for head, pages in enumerate(heads):
                    for page, entry in enumerate(pages):
                        if page < lens[b] // 64:
                            assert owners.setdefault(entry, (kv, head, page)) == (kv, head, page)
                            bits = 8 if page < self.settings.sink_pages else None
                            bits = bits or store.head_bits[kv][head]
                            row_bytes = (
                                64 + (0 if bits == 8 else 2 * HEAD_DIM) + 8 * HEAD_DIM * bits
                            )
                            assert store.pool.slabs[entry >> 21].shape[1] == row_bytes
                        elif self.static:
                            # A block for what is to come, which nothing else has.
                            assert entry not in owners
                            owners[entry] = (b, kv, head, page)
                        else:
                            assert entry == -1
        if self.static:
            shared = [entry for entry, owner in owners.items() if len(owner) == 3]
            later = [entry for entry, owner in owners.items() if len(owner) == 4]
            assert not set(shared) & set(later)
        store.collect()
        used = sum(store.pool.num_used(bits) for bits in (8, 4, 2))
        assert used == len(owners)


class LexicoMirror:
    """One sequence, padding as zeros: its tokens as they came and as they are coded."""

    def __init__(self, settings):
        self.settings = settings
        self.dense = self.coded = torch.empty(2, HEADS, 0, HEAD_DIM)

    def copy(self):
        return copy.deepcopy(self)

    def append(self, kv, new_padding):
        """A vector's codes depend on nothing else, so all are made at once."""
        kv = kv.clone()
        kv[:, :, :new_padding] = 0
        sparsities = (self.settings.k_sparsity, self.settings.v_sparsity)
        tolerances = (self.settings.k_tolerance, self.settings.v_tolerance)
        rebuilt = []
        for x, atoms, sparsity, tolerance in zip(
            kv, hf_models.dictionaries("llama")[0], sparsities, tolerances, strict=True
        ):
            codes = kvcore.lexico_encode(x[None], atoms, sparsity=sparsity, tolerance=tolerance)
            rebuilt.append(kvcore.lexico_reconstruct(*codes[:3], atoms)[0])
        self.dense = torch.cat([self.dense, kv], 2)
        self.coded = torch.cat([self.coded, torch.stack(rebuilt)], 2)

    def crop(self, length):
        self.dense, self.coded = self.dense[:, :, :length], self.coded[:, :, :length]


class LexicoRun(Calls):
    """Calls on a layer of a LexicoCache, some of them over the end of a block."""

    max_tokens = 4096 + MAX_TOKENS

    def __init__(self, seed):
        super().__init__(seed)
        self.settings = LexicoSettings(
            k_sparsity=self.rng.choice([1, 3]),
            v_sparsity=self.rng.choice([1, 4]),
            k_tolerance=self.rng.choice([0.0, 0.5]),
            v_tolerance=self.rng.choice([0.0, 0.5]),
            buffer_tokens=self.rng.choice([0, 5, 40]),
            encode_tokens=self.rng.choice([1, 8, 32]),
        )
        self.layer = LexicoLayer(self.settings, hf_models.dictionaries("llama"), self.tracker)
        self.batch = self.rng.choice([1, 2, 3])
        self.begin()
        if self.rng.random() < 0.1:
            self.batch = 1
            self.begin()
            self.steps = (*self.steps, 4000)

    def begin(self):
        super().begin()
        self.num_coded = 0
        self.is_first = True

    def make_mirror(self):
        return LexicoMirror(self.settings)

    def updated(self, kv, returned, new_padding):
        num_new = kv.shape[3]
        for b, mirror in enumerate(self.mirrors):
            mirror.append(kv[:, b], new_padding[b])
            self.padding[b] += new_padding[b]
        for i in range(2):
            # Exactly the caller's while all of a token is read as it came.
            for b, x in enumerate(returned[i]):
                fresh = kv[i, b, :, new_padding[b] :]
                assert torch.equal(x[:, x.shape[1] - fresh.shape[1] :], fresh)
        if self.is_first:
            assert torch.equal(returned[0], kv[0])
            self.is_first = False
        # When what is coded, by the rule and not by the code.
        held = self.tokens - num_new - self.num_coded
        few, many = self.settings.buffer_tokens, self.settings.encode_tokens
        if held + num_new > few + many:
            at_once = min(many, held)
            self.num_coded = self.tokens - few if num_new > many else self.num_coded + at_once

    def takes_memory(self, num_new):
        held = self.tokens - self.num_coded
        return self.is_first or held + num_new > self.settings.capacity

    def cropped(self, left):
        self.num_coded = min(self.num_coded, left)
        for mirror in self.mirrors:
            mirror.crop(left)

    def check(self):
        layer = self.layer
        assert layer.get_seq_length() == self.tokens
        if layer.keys is None:
            return
        assert layer.store.codes.num_tokens == self.num_coded
        assert len(layer.store.codes.blocks) == self.num_coded // 4096
        assert layer.store.lens().tolist() == [self.tokens - padding for padding in self.padding]
        both = stored(layer)
        assert both.shape == (2, self.batch, HEADS, self.tokens, HEAD_DIM)
        for b, mirror in enumerate(self.mirrors):
            assert torch.equal(
                both[:, b, :, self.num_coded :], mirror.dense[:, :, self.num_coded :]
            )
            parts = (x[..., : self.num_coded, :] for x in (both[:, b], mirror.coded, mirror.dense))
            self.check_codes(*parts, f"sequence {b}")
        if self.tokens and self.rng.random() < 0.3:
            self.check_attention(both)

    def check_codes(self, mine, other, exact, note):
        """The same vectors, but where the search, which depends on how many there are, found
        another of equally good atoms, or a scale was rounded to its other neighbour: rarely, and
        then they are as near to what was coded."""
        wrong = (mine - other).norm(dim=-1) > 1e-4 * other.norm(dim=-1).clamp(min=1)
        assert wrong.sum() <= 1 + 0.002 * wrong.numel(), note
        left, left_by_other = ((x - exact).norm(dim=-1) for x in (mine, other))
        tolerances = torch.tensor([self.settings.k_tolerance, self.settings.v_tolerance])
        # One of two may have ended at the tolerance, the other gone on.
        enough = (tolerances + 0.02)[:, None, None] * exact.norm(dim=-1)
        assert (left <= torch.maximum(1.25 * left_by_other, enough))[wrong].all(), note

    def check_attention(self, both):
        q_len = self.rng.choice([n for n in (1, 3) if n <= self.tokens])
        query = torch.randn(self.batch, 2 * HEADS, q_len, HEAD_DIM, generator=self.generator)
        out = self.layer.keys.snapshot.attend(query, scale=None, causal=True).transpose(1, 2)
        shown = torch.ones(q_len, self.tokens, dtype=torch.bool).tril(self.tokens - q_len)
        shown = shown & (torch.arange(self.tokens) >= torch.tensor(self.padding)[:, None, None])
        expected, _ = exact_attention(query, *both, shown[:, None], scaling=None)
        for b in range(self.batch):
            # A query that is padding sees nothing.
            real = slice(max(0, self.padding[b] - self.tokens + q_len), None)
            assert torch.allclose(out[b, real], expected[b, real], rtol=1e-3, atol=1e-4)


RUNS = {
    "dynamic": functools.partial(Run, static=False),
    "static": functools.partial(Run, static=True),
    "lexico": LexicoRun,
}


def run(seed, kind):
    try:
        RUNS[kind](seed).go()
    except BaseException as error:
        error.add_note(f"RUNS[{kind!r}]({seed}).go()") if hasattr(error, "add_note") else None
        raise


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("part", range(4))
def test_random_calls(part, kind):
    share = SHORT_SEEDS // 4
    for seed in range(part * share, (part + 1) * share):
        run(seed, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("part", range(LONG_SEEDS // SEEDS_PER_TEST))
def test_random_calls_long(part, kind):
    for seed in range(part * SEEDS_PER_TEST, (part + 1) * SEEDS_PER_TEST):
        run(1_000_000 + seed, kind)
