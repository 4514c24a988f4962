"""What the memory of a cache is spent on."""

from __future__ import annotations

from collections.abc import Iterable

from kvcore.cache import linear
from kvcore.cache.layer import CompressedLayer
from kvcore.cache.tensors import storage_bytes


def report(layers: Iterable[object]) -> dict:
    """Bytes by purpose, of every layer and in total.

    Returns:
        ``nbytes`` (all), ``kv_bytes`` (K and V with everything they need), ``state_bytes`` (conv
        and recurrent states of linear attention), ``elements`` (stored K and V elements, padding
        left out), ``bits_per_element`` (of kv_bytes), ``clamped`` (values cut off in the tail) and
        ``layers``, one dict for each. That of a compressed layer adds ``tokens`` (per sequence),
        the bytes of ``exact`` tokens, and more that depends on the store. Turbo: ``pool`` (bytes by
        width; spare blocks under ``free``), ``tail``, ``table``, ``calibration``, ``k_bits`` and
        ``v_bits`` (per kv head), ``k_clamped`` and ``v_clamped``. Lexico: ``blocks``, ``tail``,
        ``buffer``, ``session`` (dictionaries with room for atoms of their own), ``coded_tokens``,
        ``atoms`` (of K and of V) and ``encoder_workspace``, the scratch memory of the largest call
        of the encoder so far, gone when it returned and in none of the sums.
    """
    rows = [_layer(i, layer) for i, layer in enumerate(layers)]
    total = {
        name: sum(row[name] for row in rows)
        for name in ("nbytes", "kv_bytes", "state_bytes", "elements", "clamped")
    }
    total["bits_per_element"] = _bits(total["kv_bytes"], total["elements"])
    return {**total, "layers": rows}


def _bits(num_bytes: int, elements: int) -> float:
    return 8 * num_bytes / elements if elements else 0.0


def _layer(index: int, layer: object) -> dict:
    row = {"layer": index, "kind": type(layer).__name__, "clamped": 0, "elements": 0}
    if isinstance(layer, CompressedLayer):
        row |= {**layer.report(), "kv_bytes": layer.nbytes(), "state_bytes": 0}
    else:
        tensors = [
            t for t in (getattr(layer, n, None) for n in ("keys", "values")) if t is not None
        ]
        row["kv_bytes"] = storage_bytes(tensors)
        row["elements"] = sum(tensor.numel() for tensor in tensors)
        row["state_bytes"] = storage_bytes(linear.linear_states(layer))
    row["nbytes"] = row["kv_bytes"] + row["state_bytes"]
    row["bits_per_element"] = _bits(row["kv_bytes"], row["elements"])
    return row
