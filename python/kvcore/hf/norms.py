"""Routes the RMSNorm modules of a modelling file to kvcore's op.

Modelling files define their own classes, under their own names. What a class computes is found out
by running it: one that this does not know to be an RMSNorm is left as it is.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kvcore

MAX_CHANNELS = 16384
_SILU = ("silu", "swish")
_EPS_NAMES = ("eps", "variance_epsilon")
# What instances may keep; names with an underscore are bookkeeping of torch and transformers.
_ATTRIBUTES = {*_EPS_NAMES, "activation", "group_size", "training"}
# Of a probe: an eps that counts, and few channels.
_PROBE_EPS, _PROBE_CHANNELS = 0.03, 8


@dataclass(frozen=True)
class Norm:
    """What a class computes."""

    eps_name: str
    weight_offset: float
    gated: bool


def _has_no_options(norm: nn.Module) -> bool:
    """Whether an instance is the one that :class:`Norm` describes, of those its class can make."""
    group_size, activation = getattr(norm, "group_size", None), getattr(norm, "activation", "silu")
    return group_size is None and activation in _SILU


def _probe(norm_class: type[nn.Module]) -> Norm | None:
    names = list(inspect.signature(norm_class.forward).parameters)[1:]
    norm = norm_class(_PROBE_CHANNELS, eps=_PROBE_EPS)
    state = vars(norm)
    eps_name = next((name for name in _EPS_NAMES if state.get(name) == _PROBE_EPS), None)
    attributes = {name for name in state if not name.startswith("_")}
    tensors = dict(norm.named_parameters()) | dict(norm.named_buffers())
    if (
        len(names) not in (1, 2)
        or eps_name is None
        or not attributes <= _ATTRIBUTES
        or not _has_no_options(norm)
        or tensors.keys() != {"weight"}
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    x, gate, weight = torch.randn(3, 5, _PROBE_CHANNELS, generator=generator)
    x = x * torch.logspace(-2, 2, 5)[:, None]
    norm = norm.to("cpu", torch.float32)
    norm.weight.data.copy_(weight[0])
    inputs = (x, gate)[: len(names)]
    offsets = {0.0, 1.0}
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        rounded = [y.to(dtype) for y in inputs]
        out = norm(*rounded)
        if out.dtype != dtype or out.shape != x.shape:
            return None
        wide = rounded[0].double()
        expected = wide * (wide.square().mean(-1, keepdim=True) + _PROBE_EPS).rsqrt()
        if len(inputs) == 2:
            expected = expected * nn.functional.silu(rounded[1].double())
        factors = {offset: weight[0].double() + offset for offset in offsets}
        offsets = {
            offset
            for offset, factor in factors.items()
            if torch.allclose(out.double(), expected * factor, bound, bound)
        }
    return Norm(eps_name, offsets.pop(), len(inputs) == 2) if len(offsets) == 1 else None


@functools.cache
def norm_of(norm_class: type[nn.Module]) -> Norm | None:
    """What a class computes, None where it is not an RMSNorm as kvcore's op computes it."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
            return _probe(norm_class)
    except Exception:
        return None  # it wants other arguments, and so is something else


def classes_of(module: types.ModuleType) -> dict[type[nn.Module], Norm]:
    """The RMSNorm classes that a modelling file defines."""
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and "RMSNorm" in value.__name__
        and "forward" in vars(value)
    ]
    known = {norm_class: norm_of(norm_class) for norm_class in own}
    return {norm_class: norm for norm_class, norm in known.items() if norm is not None}


def routed(
    norm: Norm, norm_class: type[nn.Module], devices: frozenset[str], dtypes: tuple
) -> Callable:
    """A ``forward`` in the op, where it computes the call; otherwise that of the class."""
    previous = norm_class.forward

    def usable(module: nn.Module, x: Tensor, gate: Tensor | None) -> bool:
        weight = module.weight
        # A class that inherits ``forward`` may have overridden what it calls.
        return (
            type(module) is norm_class
            and all(type(y) in (Tensor, nn.Parameter) for y in (x, weight))
            and x.device.type in devices
            and x.dtype in dtypes
            and weight.dtype in dtypes
            and x.dim() > 0
            and x.shape[-1] == weight.shape[0] <= MAX_CHANNELS
            and (gate is None or (gate.dtype == x.dtype and gate.shape == x.shape))
            and _has_no_options(module)
        )

    @functools.wraps(previous)
    def forward(self: nn.Module, *args: Tensor, **kwargs: object) -> Tensor:
        if kwargs or len(args) != 1 + norm.gated or not usable(self, args[0], (*args, None)[1]):
            return previous(self, *args, **kwargs)
        eps = getattr(self, norm.eps_name)
        x, *gate = args
        return kvcore.gdn_rms_norm(
            x, self.weight, *gate, eps=eps, weight_offset=norm.weight_offset
        )[0]

    return forward
