"""kvcore: attention over a compressed KV cache, as PyTorch ops.

Importing loads the native libraries and registers the ops; it never compiles, downloads or warns.
"""

from __future__ import annotations

import importlib

from kvcore import _native

_native.load()

from kvcore import ops  # noqa: E402  (needs the schemas)
from kvcore.ops import *  # noqa: E402, F403
from kvcore.ops import dense_autograd as _dense_autograd  # noqa: E402, F401  (fakes, backwards)
from kvcore.ops import fake as _fake  # noqa: E402, F401  (registers the fake kernels)
from kvcore.ops import gdn_autograd as _gdn_autograd  # noqa: E402, F401  (and backwards)

__version__ = "0.1.0"
__all__ = ["__version__", *ops.__all__]

# These may import transformers or torch.distributed, or are for tests: only on first use.
_LAZY = ("cache", "demo", "distributed", "eval", "hf", "reference")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"kvcore.{name}")
    raise AttributeError(f"module 'kvcore' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
