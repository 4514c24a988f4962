"""``save`` and ``load`` of compressed caches."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcore.cache import file_format, linear
from kvcore.cache.file_format import (
    EXACT_TENSORS,
    FILE,
    CacheFileError,
    check,
    check_names,
    get_int,
    get_ints,
)
from kvcore.cache.layer import CompressedLayer
from kvcore.cache.model_facts import model_facts

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_STATE_DTYPES = tuple(_DTYPES.values())


def save(cache, path: str | os.PathLike) -> None:
    """See :meth:`kvcore.cache.compressed_cache.CompressedCache.save`."""
    op = f"{type(cache).__name__}.save"
    rows, tensors = [], {}
    for i, layer in enumerate(cache.layers):
        row, held = _export(layer, i, op)
        for name in _not_finite(row, held):
            raise ValueError(f"{op}: {name} of layer {i} holds NaN or infinity")
        rows.append(row)
        tensors |= {f"layers.{i}.{name}": tensor.cpu() for name, tensor in held.items()}
    parts = {"model": cache.model_facts, "settings": cache.file_settings(), "layers": rows}
    cache.file_kind.write(path, parts, tensors, op)


def load(
    cls,
    path: str | os.PathLike,
    config: PretrainedConfig,
    device: torch.device,
    **arguments: object,
):
    """The cache of class ``cls`` that a file holds.

    Args:
        cls: a subclass of :class:`kvcore.cache.compressed_cache.CompressedCache`.
        path: the file.
        config: the model's configuration.
        device: where the model is.
        arguments: what the file does not say, for ``cls.from_file``.
    """
    metadata, tensors = cls.file_kind.read(path)
    facts = FILE.parse_json(metadata, "model", dict)
    for name, value in model_facts(config).items():
        check(name in facts, "model", f"the facts of a model with {name}", sorted(facts))
        check(facts[name] == value, f"model.{name}", f"{value!r} as the config has it", facts[name])
    settings = FILE.parse_json(metadata, "settings", dict)
    check_names(settings, cls.settings_names, "settings")
    rows = FILE.parse_json(metadata, "layers", list)
    check(len(rows) <= file_format.MAX_LAYERS, "layers", "a list of layers", len(rows))
    for i, row in enumerate(rows):
        check(isinstance(row, dict), f"layers[{i}]", "an object", row)
    try:
        cache = cls.from_file(config, settings, rows, **arguments)
    except CacheFileError:
        raise
    except (TypeError, ValueError) as error:
        raise CacheFileError(f"cache file: settings do not make a cache: {error}") from error
    check(len(rows) == len(cache.layers), "layers", f"{len(cache.layers)} long", len(rows))

    forms = {}
    for i, (row, layer) in enumerate(zip(rows, cache.layers, strict=True)):
        form = _form(row, layer, f"layers[{i}]")
        forms |= {f"layers.{i}.{name}": want for name, want in form.items()}
    FILE.check_forms(tensors, forms)
    for i, (row, layer) in enumerate(zip(rows, cache.layers, strict=True)):
        prefix = f"layers.{i}."
        held = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        _restore(row, layer, held, f"layers[{i}]", device)
    return cache


# ---- one layer


def _export(layer: object, index: int, op: str) -> tuple[dict, dict[str, Tensor]]:
    """What the metadata and the tensors of a file say of a layer."""
    if isinstance(layer, CompressedLayer):
        row = {"kind": layer.file_kind, **layer.file_facts()}
        if (stored := layer.export_store()) is not None:
            facts, tensors = stored
            dtype = str(layer.dtype).removeprefix("torch.")
            return {**row, "state": layer.stored_state, "dtype": dtype, **facts}, tensors
        if layer.store is None and layer.get_seq_length():
            exact = dict(zip(("keys", "values"), layer.tensors()["exact"], strict=True))
            padding = layer.padding.tolist()
            return {**row, "state": "exact", "padding": padding, **_kv_row(exact)}, exact
        return {**row, "state": "empty"}, {}
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        is_sliding = type(layer) is DynamicSlidingWindowLayer
        row = {"kind": "sliding" if is_sliding else "dynamic"}
        if is_sliding:
            row |= {"sliding_window": layer.sliding_window, "seen": layer.cumulative_length}
        if not layer.is_initialized or layer.keys is None or not layer.keys.numel():
            return {**row, "state": "empty"}, {}
        held = {"keys": layer.keys, "values": layer.values}
        return {**row, "state": "exact", **_kv_row(held)}, held
    if linear.is_linear(layer):
        if getattr(layer, "record_past", False):
            raise NotImplementedError(
                f"{op}: layer {index} records past states for assisted decoding, which "
                "a file cannot hold"
            )
        states, flags = linear.export_linear(layer)
        shapes = {name: list(state.shape) for name, state in states.items()}
        return {"kind": "linear", "states": shapes, **flags}, states
    if linear.is_dummy(layer):
        return {"kind": "dummy"}, {}
    raise NotImplementedError(
        f"{op}: layer {index} is a {type(layer).__name__}, which has no file format"
    )


def _not_finite(row: dict, held: dict[str, Tensor]) -> list[str]:
    """Tensors that hold NaN or infinity where they must not.

    Codes and blocks of a store have a mark for it, and what padding tokens hold is of no use to
    anyone.
    """
    if row["kind"] == "linear":
        exact, padding = held, []
    elif "padding" in row:
        exact = {name: x for name, x in held.items() if name in EXACT_TENSORS}
        padding = row["padding"]
    else:
        return []
    wrong = []
    for name, x in exact.items():
        if padding:
            # Exact tokens are the newest.
            first = row.get("num_tokens", x.shape[2]) - x.shape[2]
            real = torch.arange(first, first + x.shape[2]) >= torch.tensor(padding)[:, None]
            x = x.cpu().transpose(1, 2)[real]
        if not x.isfinite().all():
            wrong.append(name)
    return wrong


def _kv_row(held: dict[str, Tensor]) -> dict:
    k, v = held["keys"], held["values"]
    dtype = str(k.dtype).removeprefix("torch.")
    return {"dtype": dtype, "k_shape": list(k.shape), "v_shape": list(v.shape)}


def _form(row: dict, layer: object, field: str) -> dict[str, tuple]:
    """Checks a layer's row; returns dtype and shape of its tensors."""
    kind = row.get("kind")
    expected = _export(layer, 0, "")[0]["kind"]
    check(kind == expected, f"{field}.kind", repr(expected), kind)
    if kind == "dummy":
        check_names(row, {"kind"}, field)
        return {}
    if kind == "linear":
        return linear.linear_form(row, layer, field, _STATE_DTYPES)
    is_compressed = isinstance(layer, CompressedLayer)
    names = layer.file_facts() if is_compressed else {"sliding_window", "seen"}
    common = {"kind", "state", *(names if is_compressed or kind == "sliding" else ())}
    state = row.get("state")
    states = ("empty", "exact", *((layer.stored_state,) if is_compressed else ()))
    check(state in states, f"{field}.state", f"one of {states}", state)
    if kind == "sliding":
        window = layer.sliding_window
        check(
            row["sliding_window"] == window,
            f"{field}.sliding_window",
            window,
            row["sliding_window"],
        )
        get_int(row, "seen", field, 0)
        if state == "empty":
            check(row["seen"] == 0, f"{field}.seen", "0 without keys", row["seen"])
    if state == "empty":
        check_names(row, common, field)
        return {}
    dtype = row.get("dtype")
    check(
        isinstance(dtype, str) and dtype in _DTYPES,
        f"{field}.dtype",
        f"one of {sorted(_DTYPES)}",
        dtype,
    )
    if is_compressed and state == layer.stored_state:
        check_names(row, {*common, "dtype", *layer.stored_facts}, field)
        is_coarse = _DTYPES[dtype] is not torch.float64
        check(is_coarse, f"{field}.dtype", "a quantizable one", dtype)
        return layer.stored_form(row, _DTYPES[dtype], field)
    padded = {"padding"} if is_compressed else set()
    check_names(row, {*common, "dtype", "k_shape", "v_shape", *padded}, field)
    shapes = {name: get_ints(row, name, field, 0) for name in ("k_shape", "v_shape")}
    for name, shape in shapes.items():
        check(len(shape) == 4, f"{field}.{name}", "4 long", len(shape))
    k_shape, v_shape = shapes.values()
    if kind == "sliding":
        held = min(row["seen"], layer.sliding_window - 1)
        check(k_shape[2] == held, f"{field}.k_shape", f"[..., {held}, head_dim]", k_shape)
    check(k_shape[:3] == v_shape[:3], f"{field}.v_shape", f"{k_shape[:3]} and more", v_shape)
    if padded:
        padding = get_ints(row, "padding", field, 0, k_shape[2])
        check(len(padding) == k_shape[0], f"{field}.padding", f"{k_shape[0]} long", len(padding))
    return {"keys": (_DTYPES[dtype], k_shape), "values": (_DTYPES[dtype], v_shape)}


def _restore(
    row: dict, layer: object, held: dict[str, Tensor], field: str, device: torch.device
) -> None:
    for name in _not_finite(row, held):
        check(False, f"{field}.{name}", "finite", "NaN or infinity")
    if row["kind"] == "linear":
        linear.restore_linear(layer, row, {n: t.to(device) for n, t in held.items()})
    elif isinstance(layer, CompressedLayer) and row["state"] == layer.stored_state:
        layer.check_stored(row, held, field)
        layer.restore_store(row, held, _DTYPES[row["dtype"]], device)
    elif row["kind"] != "dummy" and row["state"] == "exact":
        k, v = (held[name].to(device) for name in ("keys", "values"))
        if isinstance(layer, CompressedLayer):
            layer.restore_exact(k, v, np.array(row["padding"], dtype=np.int64))
        else:
            layer.lazy_initialization(k, v)
            layer.keys, layer.values = k, v
            if row["kind"] == "sliding":
                layer.cumulative_length = row["seen"]
