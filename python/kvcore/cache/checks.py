"""Whether a value is a number of the kind and size that is wanted."""

from __future__ import annotations

import math

MAX_INT = 1 << 40


def is_int(value: object, low: int, high: int = MAX_INT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and low <= value <= high
