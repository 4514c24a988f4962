"""The layers that are not attention: linear attention, in every version of transformers.

Such a layer had one state of each kind, in plain attributes; later it has several, in dicts by
number. Files know the latter form only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcore.cache.checks import is_int
from kvcore.cache.compat import index_list
from kvcore.cache.file_format import check, check_names, get_ints


def select_layer(layer: object, indices: Tensor) -> None:
    """``batch_select_indices`` of any layer: linear-attention layers have none."""
    if hasattr(layer, "batch_select_indices"):
        layer.batch_select_indices(indices)
        return
    batch = next((state.shape[0] for state in linear_states(layer)), None)
    if batch is not None:
        layer.reorder_cache(torch.tensor(index_list(indices, batch), dtype=torch.int64))


def repeat_layer(layer: object, repeats: int) -> None:
    """``batch_repeat_interleave`` of any layer: linear-attention layers have none."""
    if hasattr(layer, "batch_repeat_interleave"):
        layer.batch_repeat_interleave(repeats)
        return
    batch = next((state.shape[0] for state in linear_states(layer)), None)
    if batch is not None:
        layer.reorder_cache(torch.arange(batch).repeat_interleave(repeats))


def linear_states(layer: object) -> list[Tensor]:
    """Conv and recurrent states of a linear-attention layer."""
    return [state for held in _states(layer).values() for state in held if state is not None]


def is_linear(layer: object) -> bool:
    """Whether a layer holds conv and recurrent states and nothing else."""
    return type(layer).__name__ == "LinearAttentionLayer"


def is_dummy(layer: object) -> bool:
    """Whether a layer holds nothing by design."""
    return type(layer).__name__ == "DummyLayer"


def _states(layer: object) -> dict[str, list[Tensor | None]]:
    held = {}
    for name in ("conv", "recurrent"):
        states = getattr(layer, f"{name}_states", None)
        held[name] = list(states.values()) if isinstance(states, dict) else [states]
    return held


def _numbered(value: object) -> list:
    return list(value.values()) if isinstance(value, dict) else [value]


def export_linear(layer: object) -> tuple[dict[str, Tensor], dict]:
    """States by name, and what else a linear-attention layer remembers."""
    tensors = {
        f"{name}.{i}": state
        for name, states in _states(layer).items()
        for i, state in enumerate(states)
        if state is not None
    }
    previous = [bool(flag) for flag in _numbered(layer.has_previous_state)]
    kernels = _numbered(getattr(layer, "conv_kernel_size", None))
    if not isinstance(layer.has_previous_state, dict) and "conv.0" in tensors:
        kernels = [tensors["conv.0"].shape[-1]]
    return tensors, {"has_previous_state": previous, "conv_kernel_size": kernels}


def linear_form(row: dict, layer: object, field: str, dtypes: tuple) -> dict[str, tuple]:
    """Checks a file's row of a linear-attention layer; returns dtypes and shapes of its states."""
    check_names(row, {"kind", "states", "has_previous_state", "conv_kernel_size"}, field)
    count = len(_states(layer)["conv"])
    names = {f"{kind}.{i}" for kind in ("conv", "recurrent") for i in range(count)}
    shapes = row["states"]
    check(isinstance(shapes, dict), f"{field}.states", "an object", shapes)
    check(shapes.keys() <= names, f"{field}.states", f"among {sorted(names)}", sorted(shapes))
    previous = row["has_previous_state"]
    holds = isinstance(previous, list) and all(isinstance(flag, bool) for flag in previous)
    check(
        holds and len(previous) == count, f"{field}.has_previous_state", f"{count} bools", previous
    )
    kernels = row["conv_kernel_size"]
    holds = isinstance(kernels, list) and all(k is None or is_int(k, 1) for k in kernels)
    check(
        holds and len(kernels) == count,
        f"{field}.conv_kernel_size",
        f"{count} ints or null",
        kernels,
    )
    for name in shapes:
        rank = 3 if name.startswith("conv") else 4
        shape = get_ints(shapes, name, f"{field}.states", 0)
        check(len(shape) == rank, f"{field}.states.{name}", f"{rank} long", shape)
    for i, kernel in enumerate(kernels):
        shape = shapes.get(f"conv.{i}")
        check(
            (shape is None) == (kernel is None),
            f"{field}.conv_kernel_size[{i}]",
            "given exactly with its state",
            kernel,
        )
        check(
            shape is None or shape[-1] == kernel,
            f"{field}.states.conv.{i}",
            f"[..., {kernel}]",
            shape,
        )
    batches = {shape[0] for shape in shapes.values()}
    check(len(batches) <= 1, f"{field}.states", "of one batch", shapes)
    return {name: (dtypes, shape) for name, shape in shapes.items()}


def restore_linear(layer: object, row: dict, tensors: dict[str, Tensor]) -> None:
    """Gives a fresh linear-attention layer its states."""
    with torch.inference_mode(False), torch.no_grad():
        for name, state in tensors.items():
            kind, number = name.split(".")
            by_number = isinstance(layer.has_previous_state, dict)
            extra = {"state_idx": int(number)} if by_number else {}
            # Allocates, marks addresses, and notes shape, dtype and device.
            layer.lazy_initialization(**{f"{kind}_states": state}, **extra)
            held = getattr(layer, f"{kind}_states")
            (held[int(number)] if by_number else held).copy_(state)
    flags = row["has_previous_state"]
    if isinstance(layer.has_previous_state, dict):
        layer.has_previous_state = dict(enumerate(flags))
    else:
        layer.has_previous_state = flags[0]
