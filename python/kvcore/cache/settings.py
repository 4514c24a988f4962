"""How one layer is quantized."""

from __future__ import annotations

import dataclasses

from kvcore.cache.checks import is_int, is_number

PAGE_TOKENS = 64
HEADER_BYTES = 64
TAIL_SLOTS = 2
SLAB_INDEX_BITS = 21
WIDTHS = (8, 4, 2)
HEAD_DIMS = (64, 96, 128, 256)
# What the ops accept, so that a cache is refused when it is made and not at its first full page.
MIN_SAS_THRESHOLD = -87.0
MAX_TAIL_MARGIN = 2.0**127
MAX_SINK_PAGES = 2**31 - 1


def block_bytes(bits: int, head_dim: int) -> int:
    """Bytes of a 64-token block of one head, as ``csrc/turbo/layout.h`` defines them."""
    side = 0 if bits == 8 else 2 * head_dim
    return HEADER_BYTES + side + PAGE_TOKENS * head_dim * bits // 8


def check_bits(name: str, bits: int) -> int:
    if isinstance(bits, bool) or bits not in WIDTHS:
        raise ValueError(f"TurboCache: {name} must be 8, 4 or 2, got {bits!r}")
    return int(bits)


@dataclasses.dataclass(frozen=True)
class TurboSettings:
    """What :class:`kvcore.cache.TurboCache` passes to each of its layers.

    ``low_bit_heads`` is the fraction of kv heads that take 2 bits, chosen for K and V apart by
    :func:`kvcore.turbo_head_priority` when the layer is calibrated. ``rotary_dim`` counts the
    leading channels under the rotary embedding (-1: all of them).
    """

    k_bits: int = 4
    v_bits: int = 4
    sink_pages: int = 1
    low_bit_heads: float = 0.0
    balance: bool = True
    subtract_mean: bool = True
    tail_margin: float = 1.25
    sas_threshold: float | None = -15.0
    rotary_dim: int = -1

    def __post_init__(self) -> None:
        check_bits("k_bits", self.k_bits)
        check_bits("v_bits", self.v_bits)
        rules = (
            ("sink_pages", "an int in [0, 2^31)", is_int(self.sink_pages, 0, MAX_SINK_PAGES)),
            ("low_bit_heads", "in [0, 1]", is_number(self.low_bit_heads, 0, 1)),
            ("balance", "a bool", isinstance(self.balance, bool)),
            ("subtract_mean", "a bool", isinstance(self.subtract_mean, bool)),
            ("tail_margin", "in [1, 2^127]", is_number(self.tail_margin, 1, MAX_TAIL_MARGIN)),
            (
                "sas_threshold",
                "in [-87, 0) or None",
                self.sas_threshold is None
                or (is_number(self.sas_threshold, MIN_SAS_THRESHOLD, 0) and self.sas_threshold < 0),
            ),
            ("rotary_dim", "an even int up to 256, or -1", _is_rotary(self.rotary_dim)),
        )
        for name, expected, holds in rules:
            if not holds:
                value = getattr(self, name)
                raise ValueError(f"TurboCache: {name} must be {expected}, got {value!r}")

    def num_low_heads(self, kv_heads: int) -> int:
        """How many of the K heads, and of the V heads, take 2 bits."""
        return round(self.low_bit_heads * kv_heads)


def _is_rotary(value: object) -> bool:
    return is_int(value, -1, max(HEAD_DIMS)) and (value == -1 or value % 2 == 0)
