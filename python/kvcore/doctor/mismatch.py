"""Comparisons of self-checks, and what they raise."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MIN_COSINE = 0.99999
MAX_ERROR = 1e-5  # relative L2, fp32 inputs


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


def compare(
    actual: Sequence[Tensor], expected: Sequence[Tensor], sizes: Mapping[int, Tensor] | None = None
) -> str:
    """The largest relative error of some results; raises Mismatch if it is above MAX_ERROR.

    ``sizes``: what errors of the i-th result are relative to, if not to the result.
    """
    worst = 0.0
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        size = (sizes or {}).get(i, e).norm().clamp_min(1e-30)
        error = ((a.cpu().double() - e).norm() / size).item()
        if not error <= MAX_ERROR:  # catches NaN
            raise Mismatch(f"result {i} has a relative error of {error:.1e}, above {MAX_ERROR:.0e}")
        worst = max(worst, error)
    return f"relative error {worst:.0e}"
