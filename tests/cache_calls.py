"""Random calls on a layer of any cache: updates, some of which fail, crops, choices of sequences,
resets."""

import random

import pytest
import torch

from cache_tools import FailingAllocation, assert_unchanged, random_kv, snapshot
from kvcore.cache.padding import PaddingTracker

MAX_TOKENS = 600


class Calls:
    """One random sequence of calls on a layer. A subclass makes it, mirrors it and checks it."""

    static = False
    max_tokens = MAX_TOKENS
    steps = (1, 1, 1, 2, 5, 33, 63, 64, 65, 130)

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.tracker = PaddingTracker()

    def begin(self):
        self.mirrors = [self.make_mirror() for _ in range(self.batch)]
        self.padding = [0] * self.batch
        self.tokens = 0

    def update(self):
        num_new = self.rng.choice(self.steps)
        if self.tokens + num_new > self.max_tokens:
            return
        k, v = random_kv(self.generator, self.batch, num_new)
        new_padding = [0] * self.batch
        for b in range(self.batch):
            if self.padding[b] == self.tokens and self.rng.random() < 0.4:
                new_padding[b] = self.rng.randint(0, num_new)
        mask = torch.ones(self.batch, self.tokens + num_new, dtype=torch.long)
        for b in range(self.batch):
            mask[b, : self.padding[b] + new_padding[b]] = 0
        if any(new_padding) or self.rng.random() < 0.5:
            self.tracker.announce(mask, native=True)
        if self.rng.random() < 0.2:
            self.fail(k, v)
        # What the last update left of a mask must not matter any more.
        returned = self.layer.update(k, v)
        self.tokens += num_new
        self.updated(torch.stack([k, v]), returned, new_padding)

    def takes_memory(self, num_new):
        return True

    def fail(self, k, v):
        """An update that is refused or runs out of memory changes nothing."""
        before = snapshot(self.layer)
        if self.takes_memory(k.shape[2]):
            with pytest.raises(torch.OutOfMemoryError), FailingAllocation(0):
                self.layer.update(k, v)
            assert_unchanged(self.layer, before)
        if before["initialized"]:
            with pytest.raises(ValueError, match="key_states must have dtype"):
                self.layer.update(k.half(), v.half())
            with pytest.raises(ValueError, match="value_states must have shape"):
                self.layer.update(k, v[:, :, :, :32])
            assert_unchanged(self.layer, before)

    def crop(self):
        if not self.tokens:
            return
        left = self.rng.choice([self.tokens - 1, self.tokens - 3, self.tokens // 64 * 64])
        left = max(0, self.rng.choice([left, left, self.rng.randint(0, self.tokens)]))
        by_length = left > 0 and self.rng.random() < 0.5
        self.layer.crop(left if by_length else left - self.tokens)
        self.padding = [min(padding, left) for padding in self.padding]
        self.tokens = left
        self.cropped(left)

    def choose(self, indices):
        self.mirrors = [self.mirrors[i].copy() for i in indices]
        self.padding = [self.padding[i] for i in indices]
        self.batch = len(indices)

    def reorder(self):
        indices = [self.rng.randrange(self.batch) for _ in range(self.batch)]
        self.layer.reorder_cache(torch.tensor(indices))
        self.choose(indices)

    def select(self):
        if self.static or not self.tokens:
            return
        keep = [self.rng.random() < 0.6 for _ in range(self.batch)]
        if not any(keep):
            keep[0] = True
        indices = [i for i, kept in enumerate(keep) if kept]
        as_bool = self.rng.random() < 0.5
        self.layer.batch_select_indices(torch.tensor(keep if as_bool else indices))
        self.choose(indices)

    def repeat(self):
        if self.static or self.batch > 2 or not self.tokens:
            return
        self.layer.batch_repeat_interleave(2)
        self.choose([i for i in range(self.batch) for _ in range(2)])

    def reset(self):
        self.layer.reset()
        self.begin()

    def go(self, calls=14):
        actions = [self.update] * 6 + [self.crop] * 2 + [self.reorder, self.select, self.repeat]
        for call in range(calls):
            action = self.rng.choice(actions) if call else self.update
            if self.rng.random() < 0.02:
                action = self.reset
            action()
            self.check()
