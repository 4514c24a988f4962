"""Lexico as ``csrc/lexico/README.md`` specifies it: names and arguments of the ops.

Everything is computed in fp64. Backends in fp32 select the same atoms except where two of them are
equally good to fp32 rounding; the bytes of a store are bit-exact.
"""

from kvcore.reference.lexico.attention import lexico_attention, reconstruct_store
from kvcore.reference.lexico.codes import (
    lexico_encode,
    lexico_reconstruct,
    orthogonal_matching_pursuit,
)
from kvcore.reference.lexico.store import (
    empty_tail,
    lexico_append,
    lexico_seal,
    lexico_unpack,
    lexico_unseal,
)

__all__ = [
    "empty_tail",
    "lexico_append",
    "lexico_attention",
    "lexico_encode",
    "lexico_reconstruct",
    "lexico_seal",
    "lexico_unpack",
    "lexico_unseal",
    "orthogonal_matching_pursuit",
    "reconstruct_store",
]
