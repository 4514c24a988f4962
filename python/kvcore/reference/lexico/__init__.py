"""Lexico as ``csrc/lexico/README.md`` specifies it: names and arguments of the ops.

Everything is computed in fp64. Backends in fp32 select the same atoms except where two of them are
equally good to fp32 rounding.
"""

from kvcore.reference.lexico.codes import (
    lexico_encode,
    lexico_reconstruct,
    orthogonal_matching_pursuit,
)

__all__ = ["lexico_encode", "lexico_reconstruct", "orthogonal_matching_pursuit"]
