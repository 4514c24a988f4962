"""A Hugging Face cache whose full-attention layers are sparse codes over a dictionary."""

from __future__ import annotations

import dataclasses
import os

import torch
from transformers import PretrainedConfig

from kvcore.cache import lexico_files, serialize
from kvcore.cache.compressed_cache import CompressedCache
from kvcore.cache.dictionaries import Dictionaries
from kvcore.cache.file_format import check
from kvcore.cache.lexico_layer import LexicoLayer
from kvcore.cache.lexico_settings import LexicoSettings


class LexicoCache(CompressedCache):
    """K and V of a model as sparse codes over dictionaries (Lexico, arXiv 2412.08890).

    Pass it to ``generate`` or ``forward`` as ``past_key_values``, and call
    :func:`kvcore.hf.enable` on the model: without it every step rebuilds K and V, which is right
    but slow. transformers lays out the layers; each plain full-attention layer becomes a
    :class:`LexicoLayer`. Linear-attention and sliding-window layers stay what they are.

    The prompt is attended to exactly. The newest ``buffer_tokens`` of every sequence are kept as
    they came, older ones are coded (algorithm 1 of the paper): a vector is ``k_sparsity`` or
    ``v_sparsity`` pairs of an atom and an int8 coefficient under one fp16 scale, ``3 s + 2`` bytes,
    fewer with a tolerance. Attention works on the codes; vectors are not rebuilt.

    Decoding cannot be compiled into one graph, and there is no ``max_cache_len``: how long a sealed
    block of codes is depends on their values, so memory cannot be laid out before they are known,
    and a step in which tokens are coded does more than one in which they are buffered. A compiled
    model runs the cache's part of a step outside of its graphs.

    Args:
        config: the model's configuration.
        dictionaries: those that were trained for the model.
        k_sparsity: atoms of a key's code at most; None is what the dictionaries were trained with.
        v_sparsity: likewise of a value's.
        k_tolerance: a code of a key ends when what it misses is at most this share of the norm of
            the key (0: at ``k_sparsity`` atoms only), in [0, 1).
        v_tolerance: likewise for values.
        buffer_tokens: newest tokens that are not coded, at least (n_b of the paper).
        encode_tokens: tokens that are coded together while tokens come one by one (n_a).
        adaptive_bytes: with a tolerance, a key or a value that no code comes so near to becomes an
            atom of the cache's own dictionary, and its code one pair (section 3.4 of the paper).
            So many bytes, 4 * head_dim an atom, each layer may add for K and as many for V; they
            are taken at once, with a copy of the dictionary, and count among the cache's. 0: none.

    Raises:
        ValueError: naming the argument, or the fact in which the dictionaries are not the model's.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dictionaries: Dictionaries,
        *,
        k_sparsity: int | None = None,
        v_sparsity: int | None = None,
        k_tolerance: float = 0.0,
        v_tolerance: float = 0.0,
        buffer_tokens: int = 128,
        encode_tokens: int = 32,
        adaptive_bytes: int = 0,
    ) -> None:
        super().__init__(config)
        if not isinstance(dictionaries, Dictionaries):
            kind = type(dictionaries).__name__
            raise ValueError(f"LexicoCache: dictionaries must be a Dictionaries, got {kind}")
        dictionaries.check_model(config)
        self.dictionaries = dictionaries
        self.settings = LexicoSettings(
            k_sparsity=dictionaries.sparsity if k_sparsity is None else k_sparsity,
            v_sparsity=dictionaries.sparsity if v_sparsity is None else v_sparsity,
            k_tolerance=k_tolerance,
            v_tolerance=v_tolerance,
            buffer_tokens=buffer_tokens,
            encode_tokens=encode_tokens,
            adaptive_bytes=adaptive_bytes,
        )
        limit = dictionaries.largest_sparsity()
        for name in ("k_sparsity", "v_sparsity"):
            value = getattr(self.settings, name)
            if value > limit:
                raise ValueError(
                    f"LexicoCache: {name} must be at most {limit}, the smallest number of atoms "
                    f"and of channels of the dictionaries, got {value}"
                )
        self._compress(lambda i: LexicoLayer(self.settings, dictionaries, self.tracker, i))

    def memory_report(self) -> dict:
        """What the cache holds; see :func:`kvcore.cache.report.report`.

        ``dictionary_bytes`` are those of the dictionaries. They are in none of the other figures:
        all caches of a model share them, as its weights.
        """
        return {**super().memory_report(), "dictionary_bytes": self.dictionaries.nbytes()}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: PretrainedConfig,
        dictionaries: Dictionaries,
        *,
        device: torch.device | str = "cpu",
    ) -> LexicoCache:
        """Reads a cache that :meth:`save` wrote; decoding continues bitwise as it would have.

        The file is refused unless its format, its digest, every name, dtype, shape and value are
        right, the facts of the model are those of ``config``, and its codes are over these very
        dictionaries, which it does not hold. Which weights the model had, a cache cannot know.

        Args:
            path: the file.
            config: the model's configuration.
            dictionaries: those that the cache had.
            device: where the model is.

        Raises:
            CacheFileError: a ValueError, naming the field.
        """
        return serialize.load(cls, path, config, torch.device(device), dictionaries=dictionaries)

    file_kind = lexico_files.LEXICO_FILE
    # The fingerprint of the dictionaries is among them.
    settings_names = frozenset(
        {field.name for field in dataclasses.fields(LexicoSettings)} | {"dictionaries"}
    )

    def file_settings(self) -> dict:
        settings = dataclasses.asdict(self.settings)
        return {**settings, "dictionaries": self.dictionaries.fingerprint()}

    @classmethod
    def from_file(
        cls,
        config: PretrainedConfig,
        settings: dict,
        rows: list[dict],
        *,
        dictionaries: Dictionaries,
    ) -> LexicoCache:
        arguments = dict(settings)
        stated = arguments.pop("dictionaries")
        cache = cls(config, dictionaries, **arguments)
        found = dictionaries.fingerprint()
        check(stated == found, "settings.dictionaries", f"{found}, that of those given", stated)
        return cache
