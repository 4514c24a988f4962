"""What every compressed cache shares."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from kvcore.cache import linear, reasons, report, serialize
from kvcore.cache.layer import CompressedLayer
from kvcore.cache.model_facts import is_plain_attention, model_facts
from kvcore.cache.padding import PaddingTracker
from kvcore.cache.safe_file import FileKind


class CompressedCache(DynamicCache, abc.ABC):
    """A Hugging Face cache whose full-attention layers are compressed; the others stay.

    Subclasses are :class:`kvcore.cache.TurboCache` and :class:`kvcore.cache.LexicoCache`. Threads
    may each have a cache; one cache must not be used by two at once.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        if not isinstance(config, PretrainedConfig):
            name, kind = type(self).__name__, type(config).__name__
            raise ValueError(f"{name}: config must be the model's configuration, got {kind}")
        super().__init__(config=config.get_text_config(decoder=True))
        self.model_facts = model_facts(config)
        self.tracker = PaddingTracker()

    def _compress(self, make_layer: Callable[[int], CompressedLayer | None]) -> None:
        """Replaces the plain attention layers, but where None is made; others that hold K and V are
        named."""
        if not any(map(is_plain_attention, self.layers)):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in self.layers})) or "none"
            reasons.record(
                "nothing to compress", f"no layer has plain full attention; there are: {kinds}"
            )
        for i, layer in enumerate(self.layers):
            if is_plain_attention(layer):
                self.layers[i] = make_layer(i) or layer
                continue
            is_sliding = getattr(layer, "is_sliding", False)
            if not (is_sliding or linear.is_linear(layer) or linear.is_dummy(layer)):
                kind = type(layer).__name__
                reasons.record("unsupported layer", f"a {kind} stays what it is, uncompressed")

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` undoes the newest tokens of every layer; recurrent states cannot."""
        return all(
            getattr(layer, "is_croppable", not linear.is_linear(layer)) for layer in self.layers
        )

    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def announce(
        self, attention_mask: Tensor | dict[str, Tensor] | None, *, native: bool = False
    ) -> None:
        """Tells the cache which of the tokens of the next updates are padding.

        :func:`kvcore.hf.enable` does this. Leading padding of a sequence is then not stored.

        Args:
            attention_mask: ``[batch, tokens]`` over all tokens including the new ones, nonzero for
                a real one; or the mask made of it, ``[batch, 1, q_len, tokens]``; or None.
            native: the model's attention implementation is ``kvcore``.
        """
        self.tracker.announce(attention_mask, native=native)

    def nbytes(self) -> int:
        """Bytes of the memory behind every tensor of the cache, linear-attention states too."""
        return self.memory_report()["nbytes"]

    def memory_report(self) -> dict:
        """What the cache holds, per layer and in total; see :func:`kvcore.cache.report.report`."""
        return report.report(self.layers)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache to a safetensors file; spare room is left out.

        Raises:
            NotImplementedError: if a layer has no file format, or records past states for
                assisted decoding.
        """
        serialize.save(self, path)

    # What a subclass says of its files.
    file_kind: FileKind
    settings_names: frozenset[str]

    @abc.abstractmethod
    def file_settings(self) -> dict:
        """The settings that a file states, JSON values by ``settings_names``."""

    @classmethod
    @abc.abstractmethod
    def from_file(
        cls, config: PretrainedConfig, settings: dict, rows: list[dict], **arguments: object
    ) -> CompressedCache:
        """An empty cache of a file's settings and of the facts of its layers, ``rows``."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times, in place of it."""
        for layer in self.layers:
            linear.repeat_layer(layer, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices``, int64 or bool ``[batch]``, in that order."""
        for layer in self.layers:
            linear.select_layer(layer, indices)
