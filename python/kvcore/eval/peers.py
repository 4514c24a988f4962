"""Caches of other projects, to compare with: made and attended with as `CacheChoice` is."""

from __future__ import annotations

import contextlib
import dataclasses
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


def why_not(choice: Any, model: Any) -> str | None:
    """Why `choice` cannot serve `model`, in a line; None where it can."""
    try:
        choice.make(model)
    except (ImportError, ValueError) as error:
        return " ".join(str(error).split())
    return None
