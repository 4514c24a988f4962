"""The attention function that transformers calls under the name ``kvcore``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcore.cache import reasons
from kvcore.cache.static_layer import StaticView
from kvcore.cache.tensors import under_autocast
from kvcore.cache.view import LazyKV
from kvcore.hf import dense

# Features that scaled_dot_product_attention does not have either.
_SPECIAL = ("output_attentions", "position_bias", "s_aux", "softcap")


def kvcore_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a compressed cache; over anything else, exact attention.

    The latter in :func:`kvcore.dense_attention` where :mod:`kvcore.hf.dense` says so, else in
    ``scaled_dot_product_attention``.

    Args:
        module: the attention module.
        query: ``[batch, q_heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``, a tensor or what the cache returned.
        value: likewise.
        attention_mask: None, bool (True is shown) or additive, ``[batch, 1, q_len, kv_len]``.
        scaling: factor of the scores; None is ``head_dim ** -0.5``.
        dropout: of the attention weights.
        is_causal: queries do not see later keys; None asks the module, whose default is True.

    Returns:
        ``[batch, q_len, q_heads, head_dim]``, and the attention weights if ``output_attentions``
        is among the further arguments, else None.

    What the store's kernels cannot do runs exactly on the rebuilt K and V; see
    :func:`kvcore.hf.fallback_reasons`.
    """
    if torch.compiler.is_compiling() and type(key) is LazyKV:
        return _attend_on_host(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
            **kwargs,
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    special = {name: kwargs[name] for name in _SPECIAL if name in kwargs and _is_set(kwargs[name])}
    rebuilt = False
    if type(key) in (LazyKV, StaticView):
        (query,) = under_autocast(key.dtype, query)
    if type(key) is StaticView:
        if not special and not dropout and kwargs.get("sliding_window") is None:
            key.layer.check_mask(attention_mask, query.shape[2], is_causal)
            out = key.layer.store.decode(query, scale=scaling, causal=is_causal)
            return out.transpose(1, 2), None
        key, value = key.layer.rebuild()
    elif type(key) is LazyKV:
        reason = _reason(query, key, value, attention_mask, dropout, is_causal, special, kwargs)
        if reason is None:
            out = key.snapshot.attend(query, scale=scaling, causal=is_causal)
            return out.transpose(1, 2), None
        reasons.record(*reason)
        num_tokens = key.snapshot.num_tokens
        key, value = key[:, :, :num_tokens], value[:, :, :num_tokens]
        rebuilt = True
    q_len, kv_len = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.shape[-1] > kv_len:
        # The mask of a cache of fixed capacity covers what is not there yet.
        attention_mask = attention_mask[..., :kv_len]
    if attention_mask is None and is_causal and 1 < q_len < kv_len and not rebuilt:
        # What transformers means by this: the rest of a cache of fixed capacity is empty.
        key, value = key[:, :, :q_len], value[:, :, :q_len]
    if attention_mask is None and not (special or dropout or kwargs.get("cache")):
        causal = is_causal and q_len > 1
        out = dense.attend(query, key, value, causal=causal, scale=scaling)
        if out is not None:
            return out, None
    if attention_mask is None and is_causal and 1 < q_len < key.shape[2]:
        # SDPA would align its causal mask with the first keys; the queries are the newest.
        causal = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
        attention_mask = causal.tril(kv_len - q_len)[None, None]
    if special:
        return exact_attention(
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout if module.training else 0.0,
            is_causal=is_causal,
            **special,
        )
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


@torch.compiler.disable(reason="only a TurboCache with max_cache_len can be compiled over")
def _attend_on_host(*args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    return kvcore_attention(*args, **kwargs)


def _is_set(value: object) -> bool:
    return value is not None and value is not False


def _reason(
    query: Tensor,
    key: LazyKV,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    special: dict[str, object],
    kwargs: dict[str, object],
) -> tuple[str, str] | None:
    """Name and explanation of what the kernels cannot do; None if they can do it all."""
    snapshot, layer = key.snapshot, key.snapshot.layer
    store = layer.store
    if special:
        name = next(iter(special))
        return name, f"attention over the store has no {name}"
    if kwargs.get("sliding_window") is not None:
        return "sliding_window", "the layer is cached without a window but attends with one"
    if dropout:
        return "dropout", "attention over the store has no dropout; call model.eval()"
    if query.requires_grad and torch.is_grad_enabled():
        return "gradients", "attention over the store has no backward; use torch.no_grad()"
    if type(value) is not LazyKV or value.snapshot is not snapshot or not snapshot.is_current:
        return "foreign keys", "K and V are not those of the cache's last update"
    if query.shape[0] != store.batch or query.shape[3] != store.head_dim:
        return "query shape", "batch or head_dim of the queries differ from the cache's"
    if query.dtype != layer.dtype or query.device != layer.device:
        return "query dtype", "dtype or device of the queries differ from those of K and V"
    if mask is None:
        # No mask shows every token, padding too; the store does not have it.
        if store.is_padded:
            return "no mask", "sequences are padded, but the model passed no attention mask"
        return None
    tracker = layer.tracker
    if tracker.is_plain(mask, query.shape[2], store.num_tokens, store.padding, is_causal):
        return None
    return "mask", (
        "it hides more than the future and the left padding that kvcore.hf.enable saw; such "
        "are packed, prefix and tree masks, right padding, and padding between turns"
    )


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    is_causal: bool = True,
    output_attentions: bool = False,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Plain attention with what ``scaled_dot_product_attention`` lacks; scores are fp32.

    Args:
        query: ``[batch, q_heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: likewise.
        mask: bool (True is shown), additive, or None.
        scaling: factor of the scores; None is ``head_dim ** -0.5``.
        dropout: of the weights.
        is_causal: without a mask, the newest queries do not see later keys.
        output_attentions: return the weights.
        position_bias: added to the scores, ``[batch or 1, q_heads, q_len, kv_len]``.
        s_aux: ``[q_heads]``, logit of a sink that takes weight and gives nothing.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        ``[batch, q_len, q_heads, head_dim]`` and, if asked for, the weights
        ``[batch, q_heads, q_len, kv_len]``.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None and is_causal:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
        mask = mask.tril(kv_len - q_len)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[..., :kv_len], torch.finfo(torch.float32).min)
    elif mask is not None:
        scores = scores + mask[..., :kv_len]
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], -1)
    weights = scores.softmax(-1)[..., :kv_len].to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    out = (weights @ value).transpose(1, 2).contiguous()
    return out, weights if output_attentions else None
