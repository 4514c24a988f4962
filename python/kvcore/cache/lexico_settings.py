"""How one layer is coded."""

from __future__ import annotations

import dataclasses

from kvcore.cache.checks import MAX_INT, is_int, is_number

# csrc/lexico/layout.h.
TILE_TOKENS = 32
BLOCK_TILES = 128
BLOCK_TOKENS = TILE_TOKENS * BLOCK_TILES
MAX_SPARSITY = 64
COEFFICIENT_MAX = 127
MAX_ATOMS = 32768


def tile_bytes(width: int) -> int:
    """Bytes of the codes of 32 tokens of one head, ``width`` pairs each."""
    return (2 + 3 * width) * TILE_TOKENS


@dataclasses.dataclass(frozen=True)
class LexicoSettings:
    """What :class:`kvcore.cache.LexicoCache` passes to each of its layers; see there."""

    k_sparsity: int
    v_sparsity: int
    k_tolerance: float = 0.0
    v_tolerance: float = 0.0
    buffer_tokens: int = 128
    encode_tokens: int = 32
    adaptive_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("k_sparsity", "v_sparsity"):
            value = getattr(self, name)
            _check(is_int(value, 1, MAX_SPARSITY), name, f"an int in [1, {MAX_SPARSITY}]", value)
        for name in ("k_tolerance", "v_tolerance"):
            value = getattr(self, name)
            _check(is_number(value, 0, 1) and value < 1, name, "in [0, 1)", value)
        limits = {
            "buffer_tokens": (0, 1 << 20),
            "encode_tokens": (1, BLOCK_TOKENS),
            "adaptive_bytes": (0, MAX_INT),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            _check(is_int(value, low, high), name, f"an int in [{low}, {high}]", value)

    def room(self, atoms: tuple[int, int], head_dim: int) -> tuple[int, int]:
        """Atoms that may be added to K's and V's dictionary of so many."""
        limit = self.adaptive_bytes // (4 * head_dim)
        tolerances = (self.k_tolerance, self.v_tolerance)
        rooms = (
            min(limit, MAX_ATOMS - count) if tolerance else 0
            for count, tolerance in zip(atoms, tolerances, strict=True)
        )
        k_room, v_room = rooms
        return k_room, v_room

    @property
    def capacity(self) -> int:
        """Tokens that the buffer has room for."""
        return self.buffer_tokens + self.encode_tokens


def _check(holds: bool, name: str, expected: str, actual: object) -> None:
    if not holds:
        raise ValueError(f"LexicoCache: {name} must be {expected}, got {actual!r}")
