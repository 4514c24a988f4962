"""What the memory of a cache is spent on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kvcore.cache import linear
from kvcore.cache.turbo_layer import TurboLayer


def report(layers: Iterable[object]) -> dict:
    """Bytes by purpose, of every layer and in total.

    Returns:
        ``nbytes`` (all), ``kv_bytes`` (K and V with everything they need), ``state_bytes`` (conv
        and recurrent states of linear attention), ``elements`` (stored K and V elements, padding
        left out), ``bits_per_element`` (of kv_bytes), ``clamped`` (values cut off in the tail) and
        ``layers``, one dict for each. That of a turbo layer adds ``pool`` (bytes by width; spare
        blocks under ``free``), ``tail``, ``table``, ``calibration``, ``exact``, ``tokens`` (per
        sequence), ``k_bits`` and ``v_bits`` (per kv head), ``k_clamped`` and ``v_clamped``.
    """
    rows = [_layer(i, layer) for i, layer in enumerate(layers)]
    total = {
        name: sum(row[name] for row in rows)
        for name in ("nbytes", "kv_bytes", "state_bytes", "elements", "clamped")
    }
    total["bits_per_element"] = _bits(total["kv_bytes"], total["elements"])
    return {**total, "layers": rows}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each allocation once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _bits(num_bytes: int, elements: int) -> float:
    return 8 * num_bytes / elements if elements else 0.0


def _layer(index: int, layer: object) -> dict:
    row = {"layer": index, "kind": type(layer).__name__, "clamped": 0, "elements": 0}
    if isinstance(layer, TurboLayer):
        row |= _turbo(layer)
        row["state_bytes"] = 0
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


def _turbo(layer: TurboLayer) -> dict:
    kinds = layer.tensors()
    row = {name: storage_bytes(kinds.get(name, [])) for name in ("tail", "table", "calibration")}
    row["exact"] = storage_bytes(kinds["exact"])
    store = layer.store
    if store is None:
        row["pool"] = {}
        padding = layer.padding
        row["tokens"] = [] if padding is None else (layer.get_seq_length() - padding).tolist()
        per_token = sum(tensor.shape[1] * tensor.shape[3] for tensor in kinds["exact"])
        row["elements"] = sum(row["tokens"]) * per_token
    else:
        store.collect()
        widths = store.pool.bytes_by_width()
        row["pool"] = {bits: total for bits, (total, _) in widths.items()}
        row["pool"]["free"] = sum(free for _, free in widths.values())
        row["tokens"] = store.lens().tolist()
        row["elements"] = 2 * sum(row["tokens"]) * store.kv_heads * store.head_dim
        row["k_bits"], row["v_bits"] = store.head_bits.tolist()
        clamped = store.clamp_count.sum(dim=(0, 2)).tolist()
        row["k_clamped"], row["v_clamped"] = clamped
        row["clamped"] = sum(clamped)
    row["kv_bytes"] = layer.nbytes()
    return row
