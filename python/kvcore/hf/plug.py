"""Turns a model's attention to kvcore, and back."""

from __future__ import annotations

import functools
import inspect
import weakref

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kvcore.cache import CompressedCache
from kvcore.hf import gdn
from kvcore.hf.attention import kvcore_attention

NAME = "kvcore"


class _Plugged:
    """What :func:`disable` needs to undo."""

    def __init__(self, previous: object, hooks: list, routes: weakref.finalize) -> None:
        self.previous = previous
        self.hooks = hooks
        self.routes = routes


_plugged: weakref.WeakKeyDictionary[torch.nn.Module, _Plugged] = weakref.WeakKeyDictionary()


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model attend over kvcore's caches and run its gated delta rule in kvcore.

    Its attention implementation becomes ``kvcore``, and its forward passes tell the cache about
    padding. Without a kvcore cache the model computes what it did with ``sdpa``, in training too;
    on CPUs in :func:`kvcore.dense_attention` where that is faster: without a mask other than the
    causal one and without dropout, 128 queries and more, fp32, fp16 or bf16 (the last two not where
    the CPU has AMX, for which torch has kernels of its own), not compiled. Layers of the gated
    delta rule run :func:`kvcore.chunk_gated_delta_rule` and its siblings, in training too, and the
    norms of such models :func:`kvcore.gdn_rms_norm`; so do those of every other model of the same
    class in the process. Calling it again changes nothing; :func:`disable` undoes it.

    Args:
        model: a transformers model whose attention goes through ``AttentionInterface``.

    Returns:
        The model.

    Raises:
        TypeError: if it is not a transformers model.
        ValueError: if its attention cannot be replaced.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"kvcore.hf.enable: model must be a transformers PreTrainedModel, got "
            f"{type(model).__name__}"
        )
    if model in _plugged:
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        return model
    register()
    previous = _implementations(model)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"kvcore.hf.enable: {type(model).__name__} does not take its attention from "
            "transformers' AttentionInterface; a kvcore cache works with it as it is, but rebuilds "
            "K and V in every step"
        )
    routed = gdn.modules_of(model)
    gdn.route(routed)
    # Also undone when the model is gone, or the module would stay routed for good.
    routes = weakref.finalize(model, gdn.restore, routed)
    _plugged[model] = _Plugged(previous, _hook(model), routes)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a model back what it had before :func:`enable`.

    A model that is not enabled is left alone. Returns the model.
    """
    plugged = _plugged.pop(model, None)
    if plugged is not None:
        for hook in plugged.hooks:
            hook.remove()
        plugged.routes()
        model.set_attn_implementation(plugged.previous)
    return model


def is_enabled(model: torch.nn.Module) -> bool:
    """Whether :func:`enable` holds for the model."""
    return model in _plugged


def register() -> None:
    """Makes ``attn_implementation="kvcore"`` known to transformers, with its mask.

    Without a mask function of the same name transformers passes no mask, and padding would be
    attended to.
    """
    AttentionInterface.register(NAME, kvcore_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _implementations(model: PreTrainedModel) -> str | dict:
    """The implementations of a model and its sub-configurations, as ``set_attn_implementation``
    takes them."""

    def of(config):
        own = config._attn_implementation
        subs = {name: getattr(config, name, None) for name in config.sub_configs}
        nested = {name: of(sub) for name, sub in subs.items() if sub is not None}
        return {"": own, **nested} if nested else own

    return of(model.config)


def _hook(model: PreTrainedModel) -> list:
    """Hooks every model inside the model that takes a cache: a caller may skip the outer ones."""
    hooks = []
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        parameters = list(inspect.signature(module.forward).parameters)
        if {"attention_mask", "past_key_values"} <= set(parameters):
            places = {
                name: parameters.index(name) for name in ("attention_mask", "past_key_values")
            }
            hook = functools.partial(_announce, places)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return hooks


def _announce(places: dict[str, int], module, args: tuple, kwargs: dict) -> None:
    cache = _argument("past_key_values", places, args, kwargs)
    if not isinstance(cache, CompressedCache):
        return
    mask = _argument("attention_mask", places, args, kwargs)
    if not torch.compiler.is_compiling():
        cache.announce(mask, native=module.config._attn_implementation == NAME)
    elif not all(layer.can_compile for layer in cache.compressed_layers()):
        _announce_on_host(cache, mask, module.config._attn_implementation == NAME)


@torch.compiler.disable(reason="the prompt tells a kvcore cache what is padding: run it eagerly")
def _announce_on_host(cache: CompressedCache, mask: object, native: bool) -> None:
    cache.announce(mask, native=native)


def _argument(name: str, places: dict[str, int], args: tuple, kwargs: dict) -> object:
    if name in kwargs:
        return kwargs[name]
    return args[places[name]] if places[name] < len(args) else None
