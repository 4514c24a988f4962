"""Caches of other projects, to compare with: made and attended with as `CacheChoice` is."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any


@dataclasses.dataclass(frozen=True)
class QuantizedChoice:
    """transformers' ``QuantizedCache``: backend ``fp8``, or ``quanto`` or ``hqq`` at `nbits`.

    It attends over K and V that are rebuilt whole in every step.
    """

    backend: str
    nbits: int | None = None
    kind = "quantized"
    evicts = False

    @property
    def label(self) -> str:
        return f"{self.backend} {self.nbits} bit" if self.nbits else self.backend

    def make(self, model: Any) -> Any:
        """A new empty cache for `model`.

        Raises:
            ValueError: for a model with other layers than full attention, or a width that the
                backend lacks.
            ImportError: if the backend is not installed.
        """
        from transformers import QuantizedCache

        options = {} if self.nbits is None else {"nbits": self.nbits}
        return QuantizedCache(self.backend, config=model.config, **options)

    def attention(self, model: Any) -> AbstractContextManager[None]:
        """`model` attends with its own functions."""
        return contextlib.nullcontext()


# Methods of kvpress that need no attention weights, so that any attention function will do.
PRESSES = {
    "expected": "ExpectedAttentionPress",
    "keydiff": "KeyDiffPress",
    "knorm": "KnormPress",
    "random": "RandomPress",
    "snapkv": "SnapKVPress",
    "streamingllm": "StreamingLLMPress",
    "tova": "TOVAPress",
}


@dataclasses.dataclass(frozen=True)
class PressChoice:
    """A method of NVIDIA's kvpress, which evicts a share of the prompt's tokens when it has run.

    What follows the prompt is kept. `name` is one of `PRESSES`, `ratio` the share, in (0, 1).
    """

    name: str
    ratio: float
    kind = "kvpress"
    evicts = True

    def __post_init__(self) -> None:
        if self.name not in PRESSES:
            raise ValueError(f"the method must be one of {', '.join(PRESSES)}, got {self.name!r}")
        if not 0 < self.ratio < 1:
            raise ValueError(f"the evicted share must lie between 0 and 1, got {self.ratio}")

    @property
    def label(self) -> str:
        return f"{self.name} -{self.ratio:.0%}"

    def _press(self) -> Any:
        import transformers
        from packaging.requirements import Requirement

        try:
            needed = importlib.metadata.requires("kvpress") or []
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError("kvpress is not installed; run pip install kvpress") from error
        for requirement in map(Requirement, needed):
            wrong = not requirement.specifier.contains(transformers.__version__)
            if requirement.name == "transformers" and wrong:
                raise ImportError(
                    f"kvpress {importlib.metadata.version('kvpress')} needs {requirement}, and "
                    f"{transformers.__version__} is installed"
                )
        import kvpress

        return getattr(kvpress, PRESSES[self.name])(compression_ratio=self.ratio)

    def make(self, model: Any) -> Any:
        """A new empty cache for `model`, from which `attention` evicts.

        Raises:
            ValueError: for a model with other layers than full attention.
            ImportError: if kvpress is not installed, or not for these transformers.
        """
        from transformers import DynamicCache

        config = model.config.get_text_config(decoder=True)
        others = {*(getattr(config, "layer_types", None) or [])} - {"full_attention"}
        if others:
            raise ValueError(f"kvpress takes full attention only, and there is {min(others)}")
        self._press()
        return DynamicCache(config=model.config)

    @contextlib.contextmanager
    def attention(self, model: Any) -> Iterator[None]:
        """Within it, a prompt that `model` runs into an empty cache loses tokens."""
        with self._press()(model):
            yield


def why_not(choice: Any, model: Any) -> str | None:
    """Why `choice` cannot serve `model`, in a line; None where it can."""
    try:
        choice.make(model)
    except (ImportError, ValueError) as error:
        return " ".join(str(error).split())
    return None
