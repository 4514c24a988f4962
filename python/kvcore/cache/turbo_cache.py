"""A Hugging Face cache whose full-attention layers are quantized."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, StaticCache

from kvcore.cache import linear, reasons, report, serialize
from kvcore.cache.model_facts import head_dim_of, is_plain_attention, model_facts
from kvcore.cache.padding import PaddingTracker
from kvcore.cache.settings import HEAD_DIMS, TurboSettings, check_bits
from kvcore.cache.static_layer import StaticTurboLayer
from kvcore.cache.turbo_layer import TurboLayer


class TurboCache(DynamicCache):
    """K and V of a model in 8, 4 or 2 bits (TurboAttention, arXiv 2412.08585).

    Pass it to ``generate`` or ``forward`` as ``past_key_values``, and call
    :func:`kvcore.hf.enable` on the model: without it every step rebuilds K and V, which is right
    but slow. transformers lays out the layers; each plain full-attention layer becomes a
    :class:`TurboLayer`. Linear-attention and sliding-window layers stay what they are, and so does
    a layer whose head_dim has no kernel.

    Args:
        config: the model's configuration.
        k_bits: width of K, 8, 4 or 2; one for all layers or one for each layer of the model.
        v_bits: likewise for V.
        sink_pages: leading pages of 64 tokens that keep 8 bits.
        low_bit_heads: fraction of the kv heads of a layer that take 2 bits, chosen for K and for V
            by their priority (equation 12) when the layer is calibrated.
        balance: scale K's channels apart, so that an outlier channel does not take the whole range.
        subtract_mean: take K's channel means out before quantizing.
        tail_margin: headroom of the scale under which new tokens are buffered, at least 1.
        sas_threshold: scores this far below a row's maximum count as zero; None is exact.
        max_cache_len: most tokens of a sequence, padding counted. All memory is then allocated at
            the first update, and decoding can be compiled; the batch size is fixed.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        k_bits: int | Sequence[int] = 4,
        v_bits: int | Sequence[int] = 4,
        sink_pages: int = 1,
        low_bit_heads: float = 0.0,
        balance: bool = True,
        subtract_mean: bool = True,
        tail_margin: float = 1.25,
        sas_threshold: float | None = -15.0,
        max_cache_len: int | None = None,
    ) -> None:
        if not isinstance(config, PretrainedConfig):
            kind = type(config).__name__
            raise ValueError(f"TurboCache: config must be the model's configuration, got {kind}")
        text_config = config.get_text_config(decoder=True)
        super().__init__(config=text_config)
        if max_cache_len is not None:
            if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int):
                raise ValueError(f"TurboCache: max_cache_len must be an int, got {max_cache_len!r}")
            if max_cache_len < 1:
                raise ValueError(f"TurboCache: max_cache_len must be positive, got {max_cache_len}")
            self.layers = StaticCache(config=text_config, max_cache_len=max_cache_len).layers
        self.model_facts = model_facts(config)
        self.settings = TurboSettings(
            sink_pages=sink_pages,
            low_bit_heads=low_bit_heads,
            balance=balance,
            subtract_mean=subtract_mean,
            tail_margin=tail_margin,
            sas_threshold=sas_threshold,
            rotary_dim=_rotary_dim(text_config),
        )
        k_bits = _per_layer("k_bits", k_bits, len(self.layers))
        v_bits = _per_layer("v_bits", v_bits, len(self.layers))
        self.tracker = PaddingTracker()
        head_dim = head_dim_of(text_config)
        for i, layer in enumerate(self.layers):
            if not is_plain_attention(layer):
                is_sliding = getattr(layer, "is_sliding", False)
                if not (is_sliding or linear.is_linear(layer) or linear.is_dummy(layer)):
                    kind = type(layer).__name__
                    reasons.record("unsupported layer", f"a {kind} stays what it is, uncompressed")
                continue
            if head_dim not in HEAD_DIMS:
                supported = ", ".join(map(str, HEAD_DIMS))
                reasons.record(
                    "unsupported head_dim",
                    f"got {head_dim}, supported are {supported}; layers are cached exactly",
                )
                break
            settings = dataclasses.replace(self.settings, k_bits=k_bits[i], v_bits=v_bits[i])
            if max_cache_len is None:
                self.layers[i] = TurboLayer(settings, self.tracker, i)
            else:
                self.layers[i] = StaticTurboLayer(
                    settings, self.tracker, i, max_cache_len=max_cache_len
                )

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` undoes the newest tokens of every layer; recurrent states cannot."""
        return all(
            getattr(layer, "is_croppable", not linear.is_linear(layer)) for layer in self.layers
        )

    def turbo_layers(self) -> list[TurboLayer]:
        """The layers that are quantized."""
        return [layer for layer in self.layers if isinstance(layer, TurboLayer)]

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
        """Writes the cache to a safetensors file; spare blocks are left out.

        Raises:
            NotImplementedError: if the model has layers with no file format.
        """
        serialize.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: PretrainedConfig,
        *,
        max_cache_len: int | None = None,
        device: torch.device | str = "cpu",
    ) -> TurboCache:
        """Reads a cache that :meth:`save` wrote; decoding continues bitwise as it would have.

        The file is refused unless its format, its digest, every name, dtype, shape and value are
        right and the facts of the model are those of ``config``. Which weights the model had, a
        cache cannot know.

        Args:
            path: the file.
            config: the model's configuration.
            max_cache_len: as of the constructor; a file does not say how much memory to take.
            device: where the model is.

        Raises:
            CacheFileError: a ValueError, naming the field.
        """
        return serialize.load(cls, path, config, max_cache_len, torch.device(device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times, in place of it."""
        for layer in self.layers:
            linear.repeat_layer(layer, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices``, int64 or bool ``[batch]``, in that order."""
        for layer in self.layers:
            linear.select_layer(layer, indices)


def _per_layer(name: str, bits: int | Sequence[int], num_layers: int) -> list[int]:
    if not isinstance(bits, Sequence):
        return [check_bits(name, bits)] * num_layers
    if len(bits) != num_layers:
        raise ValueError(
            f"TurboCache: {name} must have one entry for each of the {num_layers} "
            f"layers, got {len(bits)}"
        )
    return [check_bits(f"{name}[{i}]", width) for i, width in enumerate(bits)]


def _rotary_dim(config: PretrainedConfig) -> int:
    """Channels under the rotary embedding; -1 for all of them."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # models with several kinds of attention nest it
    share = rope.get("partial_rotary_factor")
    share = share or getattr(config, "partial_rotary_factor", None) or 1.0
    rotary_dim = int(head_dim_of(config) * share)
    return -1 if share == 1.0 or rotary_dim % 2 else rotary_dim
