"""What the files of caches need to know of a compressed layer."""

from __future__ import annotations

import abc

import numpy as np
import torch
from torch import Tensor

from kvcore.cache.exact import ExactTokens


class LayerFiles(abc.ABC):
    """The part of a layer's row in a file, and of its tensors, that its store is.

    A *row* is the layer's JSON object in the metadata. :mod:`kvcore.cache.serialize` adds what is
    the same for all layers, ``kind``, ``state`` and ``dtype``, and calls these in order.
    """

    file_kind: str
    stored_state: str
    # Facts of a row in that state.
    stored_facts: frozenset[str]

    def file_facts(self) -> dict:
        """Facts of the layer in any state."""
        return {}

    @abc.abstractmethod
    def export_store(self) -> tuple[dict, dict[str, Tensor]] | None:
        """Facts for JSON and tensors of the store; None if there is nothing in it to keep."""

    @abc.abstractmethod
    def stored_form(self, row: dict, dtype: torch.dtype, field: str) -> dict[str, tuple]:
        """Checks the facts of a store; returns dtype and shape of its tensors."""

    @abc.abstractmethod
    def check_stored(self, row: dict, tensors: dict[str, Tensor], field: str) -> None:
        """Checks the values of a store whose form was checked."""

    @abc.abstractmethod
    def restore_store(
        self, row: dict, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Adopts what :meth:`export_store` gave, after it was checked."""

    def synced_store(self):
        """The store, with the host's count of tokens up to date."""
        return self.store

    def restore_exact(self, k: Tensor, v: Tensor, padding: np.ndarray) -> None:
        """Adopts tokens that are held exactly."""
        self.lazy_initialization(k, v)
        self._exact = ExactTokens([k, v], padding)

    def _adopt_shape(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        none = torch.empty((shape[0], shape[1], 0, shape[2]), dtype=dtype, device=device)
        self.lazy_initialization(none, none)
