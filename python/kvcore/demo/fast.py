"""The demo's models in kvcore's ops, in training.

The demo itself compares attention caches and leaves everything else as transformers runs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fast(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, the model runs kvcore's attention, gated delta rule and norms."""
    from kvcore import hf

    if hf.is_enabled(model):  # by an outer block, which still needs it
        yield
        return
    hf.enable(model)
    try:
        yield
    finally:
        hf.disable(model)
