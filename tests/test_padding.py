"""Which masks say no more than a store knows, case by case."""

import numpy as np
import pytest
import torch

from kvcore.cache.padding import PaddingTracker

MIN = torch.finfo(torch.float32).min


def masked(q_len, kv_len, padding, causal=True):
    """Bool ``[batch, 1, q_len, kv_len]`` of the newest queries."""
    keys = torch.arange(kv_len)
    rows = keys[kv_len - q_len :, None]
    left = torch.tensor(padding)[:, None, None]
    shown = (keys >= left) & ((keys <= rows) | (not causal))
    return shown.expand(len(padding), q_len, kv_len)[:, None].clone()


def is_plain(mask, kv_len, padding, causal=True):
    return PaddingTracker().is_plain(mask, mask.shape[2], kv_len, np.array(padding), causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("padding", [(0, 0), (0, 3), (9, 2)])
def test_future_and_padding_alone_are_plain(padding, q_len, kv_len, causal):
    mask = masked(q_len, kv_len, padding, causal)
    additive = torch.where(mask, 0.0, MIN)
    for one in (mask, additive, additive.to(torch.bfloat16), torch.where(mask, 0.0, -torch.inf)):
        assert is_plain(one, kv_len, padding, causal)
        # Columns past the tokens are those of a cache of fixed capacity.
        assert is_plain(torch.nn.functional.pad(one, (0, 5)), kv_len, padding, causal)
    assert is_plain(mask[:1], kv_len, padding, causal) == (padding == (0, 0))


def test_what_padding_tokens_see_does_not_matter():
    """Versions of transformers differ: no row of theirs is empty, or rows of padding are."""
    for rows in (True, False):
        mask = masked(9, 9, (0, 4))
        mask[1, :, :4] = rows
        assert is_plain(mask, 9, (0, 4))


@pytest.mark.parametrize("place", [(0, 0, 0, 5), (0, 0, 3, 8), (1, 0, 3, 4), (1, 0, 0, 6)])
def test_anything_else_is_not(place):
    """A token hidden, or shown, that the store would not."""
    mask = masked(4, 9, (0, 4))
    mask[place] = ~mask[place]
    assert not is_plain(mask, 9, (0, 4))
    assert not is_plain(torch.where(mask, 0.0, MIN), 9, (0, 4))


@pytest.mark.parametrize("value", [1.0, -1e-3, -1e4, float("nan")])
def test_a_bias_is_not(value):
    mask = torch.where(masked(4, 9, (0, 4)), 0.0, MIN)
    mask[0, 0, 3, 2] = value
    assert not is_plain(mask, 9, (0, 4))


def test_other_shapes_and_types_are_not():
    mask = masked(4, 9, (0, 4))
    assert not is_plain(mask[:, 0], 9, (0, 4))
    assert not is_plain(mask.repeat(2, 1, 1, 1), 9, (0, 4))
    assert not is_plain(mask, 10, (0, 4))
    assert not is_plain(mask.long(), 9, (0, 4))
    assert not PaddingTracker().is_plain(mask, 3, 9, np.array([0, 4]), True)
    assert not is_plain(mask, 9, (0, 3))
    assert not is_plain(mask, 9, (0, 4), causal=False)


def test_an_answer_is_kept_for_the_same_mask_only():
    tracker = PaddingTracker()
    mask = masked(4, 9, (0, 4))
    ask = lambda mask: tracker.is_plain(mask, 4, 9, np.array([0, 4]), True)  # noqa: E731
    assert ask(mask)
    mask[0, 0, 3, 1] = False
    assert not ask(mask)
    assert ask(masked(4, 9, (0, 4)))
    assert not tracker.is_plain(masked(4, 9, (0, 4)), 4, 9, np.array([0, 5]), True)


# ---- leading padding that is announced


def announced(mask, batch, seen, num_new, padding):
    tracker = PaddingTracker()
    tracker.announce(mask, native=True)
    new = tracker.new_padding(batch, seen, num_new, np.array(padding))
    return None if new is None else new.tolist()


def rows(num_tokens, padding):
    """Int ``[batch, tokens]`` as tokenizers make it."""
    return (torch.arange(num_tokens) >= torch.tensor(padding)[:, None]).long()


@pytest.mark.parametrize("four_dimensional", [False, True])
@pytest.mark.parametrize(
    ("lead", "seen", "num_new", "padding", "expected"),
    [
        ((0, 3), 0, 9, (0, 0), [0, 3]),
        ((0, 0), 0, 9, (0, 0), None),
        ((9, 2), 0, 9, (0, 0), [9, 2]),
        # Chunks: only a sequence that is nothing but padding so far can have more of it.
        ((7, 2), 5, 4, (5, 2), [2, 0]),
        ((9, 2), 5, 4, (5, 2), [4, 0]),
        ((5, 2), 5, 4, (5, 2), None),
        ((7, 2), 5, 4, (4, 2), None),
        ((7, 2), 5, 4, (0, 0), None),
    ],
)
def test_leading_padding(four_dimensional, lead, seen, num_new, padding, expected):
    mask = masked(num_new, seen + num_new, lead) if four_dimensional else rows(seen + num_new, lead)
    if four_dimensional:
        # Room of a cache of fixed capacity.
        mask = torch.nn.functional.pad(mask, (0, 6))
    for one in (mask, torch.where(mask, 0.0, MIN) if four_dimensional else mask.bool()):
        assert announced(one, 2, seen, num_new, padding) == expected
        assert announced({"full_attention": one}, 2, seen, num_new, padding) == expected


def test_masks_of_other_tokens_say_nothing():
    for mask in (rows(8, (0, 3)), rows(10, (0, 3)), rows(9, (0, 3, 3)), None, "mask", {}):
        assert announced(mask, 2, 0, 9, (0, 0)) is None
    assert announced(masked(4, 9, (0, 3)), 2, 0, 9, (0, 0)) is None
    # One row for all sequences.
    assert announced(masked(9, 9, (3,)), 2, 0, 9, (0, 0)) == [3, 3]


def test_an_announcement_replaces_the_last_one():
    tracker = PaddingTracker()
    for lead in (3, 5, 0):
        tracker.announce(rows(9, (0, lead)), native=True)
        new = tracker.new_padding(2, 0, 9, np.zeros(2, dtype=np.int64))
        assert (0 if new is None else new[1]) == lead
    tracker.announce(rows(9, (0, 3)), native=True)
    tracker.forget()
    assert tracker.new_padding(2, 0, 9, np.zeros(2, dtype=np.int64)) is None
