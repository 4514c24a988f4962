"""A Hugging Face cache whose full-attention layers are sparse codes over a dictionary."""

from __future__ import annotations

from transformers import PretrainedConfig

from kvcore.cache.compressed_cache import CompressedCache
from kvcore.cache.dictionaries import Dictionaries
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
