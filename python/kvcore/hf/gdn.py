"""Routes the gated delta rule of transformers' hybrid models, and their norms, to kvcore's ops.

Modelling files look their functions up among their own module's globals, so these are what is
replaced, and ``forward`` of the classes of norms: for every model of that module in the process,
while any of them is enabled.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor

import kvcore
from kvcore.hf import norms

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM, _HEAD_DIM_MULTIPLE = 256, 16
_SILU = ("silu", "swish")

# Module name -> (enabled models, what was there before: of which module or class, name, function).
_routed: dict[str, tuple[int, list[tuple[object, str, Callable]]]] = {}


def _devices_of(op: str) -> frozenset[str]:
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(device for device, key in keys.items() if has_kernel(f"kvcore::{op}", key))


# Asked once: torch.compile traces what looks these up, but not the question.
_RULE_DEVICES = _devices_of("gdn_chunk_scan")
_CONV_DEVICES = _devices_of("gdn_conv1d")
_NORM_DEVICES = _devices_of("gdn_rms_norm")


def _supports(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> bool:
    """Whether the ops compute this call; everything else goes to what was there before."""
    dims = (query.shape[-1], value.shape[-1])
    return (
        query.device.type in _RULE_DEVICES
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and {g.dtype, beta.dtype} <= set(_DTYPES)
        and all(d % _HEAD_DIM_MULTIPLE == 0 and 0 < d <= _MAX_HEAD_DIM for d in dims)
        and value.shape[2] % query.shape[2] == 0
    )


def _delta_rule(function: Callable, previous: Callable) -> Callable:
    """A function of FLA's signature behind the arguments that the modelling files pass."""

    @functools.wraps(previous)
    def routed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *args: object,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        if args or not _supports(query, key, value, g, beta):
            return previous(
                query,
                key,
                value,
                g,
                beta,
                *args,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                cu_seqlens=cu_seqlens,
                **kwargs,
            )
        return function(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=cu_seqlens,
        )

    return routed


def _convolves(x: Tensor, weight: Tensor, activation: str | None) -> bool:
    return (
        x.device.type in _CONV_DEVICES
        and {x.dtype, weight.dtype} <= set(_DTYPES)
        and 2 <= weight.shape[1] <= 4
        and (activation is None or activation in _SILU)
    )


def _conv(previous: Callable) -> Callable:
    @functools.wraps(previous)
    def routed(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: object,
    ) -> Tensor:
        # Packed sequences: the layer passes what the model was given for its attention.
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        unknown = cu_seqlens is None and kwargs.get("seq_idx") is not None
        if unknown or not _convolves(hidden_states, weight, activation):
            return previous(hidden_states, weight, bias, activation, **kwargs)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(torch.int32)
        return kvcore.gdn_conv1d(
            hidden_states, weight, bias, cu_seqlens, silu=activation is not None
        )

    return routed


def _conv_update(previous: Callable) -> Callable:
    @functools.wraps(previous)
    def routed(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        arguments = (hidden_states, conv_state, weight, bias)
        trained = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (hidden_states, weight, bias)
        )
        usable = (
            _convolves(hidden_states, weight, activation)
            and conv_state.is_contiguous()
            and conv_state.dtype in _DTYPES
            and not trained
        )
        if not usable:
            return previous(*arguments, activation)
        return kvcore.gdn_conv1d_update(*arguments, silu=activation is not None)

    return routed


_ROUTES: dict[str, Callable[[Callable], Callable]] = {
    "torch_chunk_gated_delta_rule": functools.partial(_delta_rule, kvcore.chunk_gated_delta_rule),
    "torch_recurrent_gated_delta_rule": functools.partial(
        _delta_rule, kvcore.fused_recurrent_gated_delta_rule
    ),
    "causal_conv1d_fn": _conv,
    "causal_conv1d_update": _conv_update,
}
_MARK = "torch_chunk_gated_delta_rule"


def modules_of(model: torch.nn.Module) -> list[str]:
    """Names of the modelling files in the model whose layers use the gated delta rule."""
    names = {type(layer).__module__ for layer in model.modules()}
    return sorted(name for name in names if hasattr(sys.modules.get(name), _MARK))


def _route(module: types.ModuleType) -> list[tuple[object, str, Callable]]:
    before: list[tuple[object, str, Callable]] = []

    def replace(owner: object, name: str, function: Callable) -> None:
        before.append((owner, name, vars(owner)[name]))
        setattr(owner, name, function)

    for name, make in _ROUTES.items():
        if name in vars(module):
            replace(module, name, make(vars(module)[name]))
    for norm_class, norm in norms.classes_of(module).items():
        forward = norms.routed(norm, norm_class, _NORM_DEVICES, _DTYPES)
        replace(norm_class, "forward", forward)
    return before


def route(names: list[str]) -> None:
    """Sends what these modules compute to kvcore; :func:`restore` undoes one call."""
    for name in names:
        count, before = _routed.get(name, (0, []))
        _routed[name] = (count + 1, before if count else _route(sys.modules[name]))


def restore(names: list[str]) -> None:
    """Undoes one :func:`route`; the last one gives the modules their functions back."""
    for name in names:
        count, before = _routed.pop(name)
        if count > 1:
            _routed[name] = (count - 1, before)
            continue
        for owner, function, previous in before:
            setattr(owner, function, previous)
