"""Why a slower exact path ran: one name per reason, counted, and said once."""

from __future__ import annotations

import collections
import warnings

_counts: collections.Counter[str] = collections.Counter()


def record(reason: str, detail: str) -> None:
    """Counts a fallback; the first of each reason also warns with its detail."""
    _counts[reason] += 1
    if _counts[reason] == 1:
        warnings.warn(f"kvcore: {reason}: {detail}", RuntimeWarning, stacklevel=3)


def fallback_reasons() -> dict[str, int]:
    """How often each reason led to an exact path, in this process or since the last clear."""
    return dict(_counts)


def clear_fallback_reasons() -> None:
    """Forgets the counts, so that each reason warns once more."""
    _counts.clear()
