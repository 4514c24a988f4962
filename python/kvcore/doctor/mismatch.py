"""Comparisons of self-checks, and what they raise."""

import torch
from torch import Tensor

MIN_COSINE = 0.99999


class Mismatch(Exception):
    """An op and its reference disagree; the text says where."""


def equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raises Mismatch unless shape, type and every element agree."""
    actual = actual.cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise Mismatch(
            f"{what} is {actual.dtype} {list(actual.shape)}, "
            f"the reference's {expected.dtype} {list(expected.shape)}"
        )
    differs = actual != expected
    if count := int(differs.sum()):
        at = differs.nonzero()[0].tolist()
        raise Mismatch(
            f"{what} differs in {count} of {actual.numel()} places, first at {at}: "
            f"{actual[tuple(at)].item()}, the reference has {expected[tuple(at)].item()}"
        )


def close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Cosine of two attention outputs; raises Mismatch if it or lse is off."""
    out, lse = (x.cpu().double().flatten() for x in actual)
    expected_out, expected_lse = (x.double().flatten() for x in expected)
    cosine = torch.nn.functional.cosine_similarity(out, expected_out, dim=0).item()
    if not cosine >= MIN_COSINE:  # catches NaN
        raise Mismatch(f"output has cosine {cosine:.7f} with the reference, below {MIN_COSINE}")
    worst = (lse - expected_lse).abs().max().item()
    if not worst <= 1e-3:
        raise Mismatch(f"lse is off by {worst:.2e}, more than 1e-3")
    return cosine
