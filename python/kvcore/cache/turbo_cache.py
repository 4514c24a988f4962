"""A Hugging Face cache whose full-attention layers are quantized."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import StaticCache

from kvcore.cache import file_format, reasons, serialize
from kvcore.cache.checks import is_int
from kvcore.cache.compressed_cache import CompressedCache
from kvcore.cache.model_facts import head_dim_of, is_plain_attention
from kvcore.cache.settings import HEAD_DIMS, TurboSettings, check_bits
from kvcore.cache.static_layer import StaticTurboLayer
from kvcore.cache.turbo_layer import TurboLayer


class TurboCache(CompressedCache):
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
            the first update, and decoding can be compiled; the batch size is fixed. A compiled
            step whose mask hides more than the future and the prompt's left padding, or less, is
            an error (on CUDA an assertion of the device, which ends the process's work there); an
            eager one takes any mask.

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
        super().__init__(config)
        text_config = config.get_text_config(decoder=True)
        if max_cache_len is not None:
            # Lengths are int32 in the store.
            if not is_int(max_cache_len, 1, 2**31 - 1):
                raise ValueError(
                    f"TurboCache: max_cache_len must be an int in [1, 2^31), got {max_cache_len!r}"
                )
            self.layers = StaticCache(config=text_config, max_cache_len=max_cache_len).layers
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
        head_dim = head_dim_of(text_config)
        has_kernels = head_dim in HEAD_DIMS
        if not has_kernels and any(map(is_plain_attention, self.layers)):
            supported = ", ".join(map(str, HEAD_DIMS))
            reasons.record(
                "unsupported head_dim",
                f"got {head_dim}, supported are {supported}; layers are cached exactly",
            )

        def make_layer(i: int) -> TurboLayer | None:
            if not has_kernels:
                return None
            settings = dataclasses.replace(self.settings, k_bits=k_bits[i], v_bits=v_bits[i])
            if max_cache_len is None:
                return TurboLayer(settings, self.tracker, i)
            return StaticTurboLayer(settings, self.tracker, i, max_cache_len=max_cache_len)

        self._compress(make_layer)

    def turbo_layers(self) -> list[TurboLayer]:
        """The layers that are quantized."""
        return self.compressed_layers()

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
        return serialize.load(cls, path, config, torch.device(device), max_cache_len=max_cache_len)

    file_kind = file_format.FILE
    # The widths are facts of the layers.
    settings_names = frozenset(
        {field.name for field in dataclasses.fields(TurboSettings)} - {"k_bits", "v_bits"}
    )

    def file_settings(self) -> dict:
        settings = dataclasses.asdict(self.settings)
        return {name: settings[name] for name in sorted(self.settings_names)}

    @classmethod
    def from_file(
        cls,
        config: PretrainedConfig,
        settings: dict,
        rows: list[dict],
        *,
        max_cache_len: int | None,
    ) -> TurboCache:
        arguments = dict(settings)
        rotary_dim = arguments.pop("rotary_dim")
        for name in ("k_bits", "v_bits"):
            # Of the layers that are not quantized the width means nothing.
            arguments[name] = [row.get(f"layer_{name}", 4) for row in rows]
        cache = cls(config, max_cache_len=max_cache_len, **arguments)
        expected = cache.settings.rotary_dim
        file_format.check(
            rotary_dim == expected,
            "settings.rotary_dim",
            f"{expected} as the config has it",
            rotary_dim,
        )
        return cache


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
