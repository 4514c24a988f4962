"""Every op in plain PyTorch, written to be read; the oracle of the tests.

Nothing here imports the ops or native code. ``kvcore.reference.<family>`` repeats the names and
arguments of the ops; :func:`exact_attention` is what turbo approximates.
"""

from kvcore.reference import dense, gdn, lexico, turbo
from kvcore.reference.attention import exact_attention

__all__ = ["dense", "exact_attention", "gdn", "lexico", "turbo"]
