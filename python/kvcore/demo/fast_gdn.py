"""The gated delta rule and the norms of the demo's hybrid model in kvcore's ops, in training.

The demo itself compares attention caches and leaves these layers as transformers runs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def fast_gdn() -> Iterator[None]:
    """Within the block, transformers' Qwen3-Next runs kvcore's gated delta rule and norms."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    from kvcore.hf import gdn

    gdn.route([modeling.__name__])
    try:
        yield
    finally:
        gdn.restore([modeling.__name__])
