"""Examines a model on a text: outlier channels of K, QK norm, and what each bit width costs.

Two measurements. Per layer: queries, keys and values of one forward pass go through the quantized
store alone, and the error of attention's output is compared over widths. For the whole model: the
text's last tokens are scored through each cache, which is what counts in the end.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvcore
from kvcore.eval import agreement, bits_per_byte, cache_bytes, kl_divergence, stepwise_scores
from kvcore.eval.caches import FULL, CacheChoice
from kvcore.eval.recording import recording
from kvcore.reference import exact_attention

PAGE_TOKENS = 64
MIN_TOKENS = 4 * PAGE_TOKENS
# A channel whose range is this many times the median channel's is called an outlier.
OUTLIER_RATIO = 4.0
# Widths that may be recommended, smallest first.
WIDTHS = (
    CacheChoice(k_bits=2, v_bits=2),
    CacheChoice(k_bits=4, v_bits=2),
    CacheChoice(k_bits=4, v_bits=4),
    CacheChoice(k_bits=8, v_bits=8),
)
# How much of attention's output a recommended width may change (relative L2 of a layer), and how
# far the model's predictions may move (nats, mean KL to the full cache).
MAX_LAYER_ERROR = 0.2
MAX_KL = 0.002

_QK_NORMS = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("query_layernorm", "key_layernorm"),
    ("qk_norm", "qk_norm"),
)


def default_text() -> str:
    """A source file of the running Python; its own documentation where there is none."""
    for name in ("argparse.py", "subprocess.py"):
        path = Path(sysconfig.get_paths()["stdlib"]) / name
        if path.is_file():
            return path.read_text()
    return (__doc__ or "") * 40


def _quantized_attention(q: Tensor, k: Tensor, v: Tensor, choice: CacheChoice, **kw: Any) -> Tensor:
    rotary_dim = kw.pop("rotary_dim")
    calibration = kvcore.turbo_calibrate(
        k, balance=choice.balance, subtract_mean=choice.subtract_mean, rotary_dim=rotary_dim
    )
    *pools, table, tail, _, _, lens = kvcore.turbo_quantize(
        k,
        v,
        *calibration,
        k_bits=[choice.k_bits],
        v_bits=[choice.v_bits],
        sink_pages=choice.sink_pages,
    )
    pool = [slab for slab in pools if len(slab)]
    return kvcore.turbo_decode(q, pool, table, tail, lens, *calibration, **kw)[0]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def k_channels(k: Tensor) -> dict[str, Any]:
    """How unequal the channels of K are.

    Args:
        k: ``[batch, kv_heads, tokens, head_dim]`` after the rotary embedding.

    Returns:
        ``max_ratio``, the widest channel's range over its head's median channel's, after the mean
        is taken out; ``num_outliers`` above `OUTLIER_RATIO`; the widest as ``[head, channel,
        ratio]``; and ``mean_ratio``, the largest channel mean over the median range.
    """
    mean = k.mean((0, 2))
    spread = (k - mean[:, None]).abs().amax((0, 2))
    median = spread.median(-1, keepdim=True).values.clamp_min(torch.finfo(torch.float32).tiny)
    ratio = spread / median
    order = ratio.flatten().argsort(descending=True)[:4].tolist()
    width = ratio.shape[1]
    widest = [[i // width, i % width, round(ratio.flatten()[i].item(), 2)] for i in order]
    return {
        "max_ratio": ratio.max().item(),
        "num_outliers": int((ratio > OUTLIER_RATIO).sum()),
        "widest": [row for row in widest if row[2] > OUTLIER_RATIO],
        "mean_ratio": (mean.abs() / median).max().item(),
    }


def recommend(errors: dict[str, float], limit: float) -> CacheChoice | None:
    """The smallest of `WIDTHS` whose entry of `errors` is at most `limit`; None if none is."""
    for choice in WIDTHS:
        if errors[choice.label] <= limit:
            return choice
    return None


def layer_findings(module: Any, q: Tensor, k: Tensor, v: Tensor, kwargs: dict) -> dict[str, Any]:
    """One attention layer's entry of the report, from what it attended with."""
    from kvcore.cache import TurboCache

    # Whole pages only, so that every key is at the width that is measured.
    tokens = k.shape[2] // PAGE_TOKENS * PAGE_TOKENS
    q, k, v = (x[:, :, :tokens].float().cpu().contiguous() for x in (q, k, v))
    names = [pair for pair in _QK_NORMS if all(hasattr(module, name) for name in pair)]
    findings = {
        "layer": module.layer_idx,
        "q_heads": q.shape[1],
        "kv_heads": k.shape[1],
        "head_dim": k.shape[3],
        "qk_norm": bool(names) and getattr(module, names[0][0]) is not None,
        "k": k_channels(k),
    }
    if k.shape[3] not in (64, 96, 128, 256) or v.shape[3] != k.shape[3]:
        dims = f"{k.shape[3]} for K and {v.shape[3]} for V" if v.shape != k.shape else k.shape[3]
        findings["unsupported"] = f"head_dim is {dims}; supported: 64, 96, 128, 256, K and V alike"
        return findings
    if kwargs.get("sliding_window") is not None:
        findings["unsupported"] = f"sees {kwargs['sliding_window']} tokens only (sliding window)"
        return findings
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        what = "softcap" if kwargs.get("softcap") is not None else "attention sinks (s_aux)"
        findings["unsupported"] = f"{what} in this layer's attention"
        return findings
    scalars = {"causal": True, "scale": kwargs.get("scaling")}
    newest = q[:, :, -PAGE_TOKENS:]
    exact = exact_attention(newest, k, v, **scalars)[0]
    scalars["rotary_dim"] = TurboCache(module.config).settings.rotary_dim
    errors = {
        choice.label: _relative_error(_quantized_attention(newest, k, v, choice, **scalars), exact)
        for choice in WIDTHS
    }
    plain = CacheChoice(k_bits=8, v_bits=8, balance=False, subtract_mean=False)
    without = _relative_error(_quantized_attention(newest, k, v, plain, **scalars), exact)
    choice = recommend(errors, MAX_LAYER_ERROR)
    findings |= {
        "errors": errors,
        "error_8bit_without_balance_and_mean": without,
        "recommended": None
        if choice is None
        else {"k_bits": choice.k_bits, "v_bits": choice.v_bits},
    }
    return findings


def _by_layer(layers: list[dict[str, Any]], config: Any) -> CacheChoice | None:
    """Each layer at its own recommended width; None if that is one width for all, or too little."""
    bits = {"k_bits": [], "v_bits": []}
    found = {layer["layer"]: layer.get("recommended") for layer in layers}
    measured = {name: {rec[name] for rec in found.values() if rec} for name in bits}
    if None in [layer.get("recommended", ()) for layer in layers] or not any(
        len(widths) > 1 for widths in measured.values()
    ):
        return None
    for index in range(config.get_text_config(decoder=True).num_hidden_layers):
        for name, widths in bits.items():
            # Layers that are not quantized need an entry too; 8 is never read.
            widths.append((found.get(index) or {name: 8})[name])
    return CacheChoice(k_bits=tuple(bits["k_bits"]), v_bits=tuple(bits["v_bits"]))


def _whole_model(
    loaded: Any, tokens: Tensor, choices: list[CacheChoice]
) -> dict[str, dict[str, float]]:
    """What each cache does to the predictions of the last tokens, by label; the full one first."""
    context_len = tokens.shape[1] * 3 // 4
    targets = tokens[:, context_len + 1 :]
    found: dict[str, dict[str, float]] = {}
    exact = None
    for choice in (FULL, *choices):
        sizes = []
        with choice.attention(loaded.model):
            scores = stepwise_scores(
                loaded.model,
                lambda choice=choice: choice.make(loaded.model),
                tokens,
                context_len=context_len,
                chunk=32,
                on_cache=lambda cache, sizes=sizes: sizes.append(cache_bytes(cache)),
            )
        exact = scores if exact is None else exact
        found[choice.label] = {
            "kv_bytes": sizes[0].kv,
            "bits_per_token": bits_per_byte(scores, targets).item(),
            "kl": kl_divergence(exact, scores).mean().item(),
            "agreement": agreement(exact, scores).item(),
        }
    return found


def examine(loaded: Any, text: str | None = None, *, max_tokens: int = 1024) -> dict[str, Any]:
    """Examines a `kvcore.demo.textmodel.TextModel` on a text (default: a source file of Python).

    Args:
        loaded: the model.
        text: at least 256 tokens.
        max_tokens: of the text to use, at least 256.

    Returns:
        ``layers``, one entry per attention layer; ``caches``, the figures of each cache;
        ``recommended``, for the whole model, or None with ``reason``. JSON-ready.

    Raises:
        ValueError: for too short a text, or a model whose attention cannot be observed.
    """
    if max_tokens < MIN_TOKENS:
        raise ValueError(f"max_tokens must be at least {MIN_TOKENS}, got {max_tokens}")
    tokens = loaded.encode(default_text() if text is None else text)
    limit = min(max_tokens, loaded.max_positions or max_tokens)
    tokens = tokens[:, :limit]
    if tokens.shape[1] < MIN_TOKENS:
        raise ValueError(f"the text must have at least {MIN_TOKENS} tokens, got {tokens.shape[1]}")
    layers: list[dict[str, Any]] = []

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> None:
        layers.append(layer_findings(module, q, k, v, kwargs))

    with torch.no_grad(), recording(loaded.model, record):
        loaded.model(input_ids=tokens, use_cache=False)
    if not layers:
        raise ValueError(
            f"{loaded.name}: no layer attends through transformers' attention interface, so there "
            "is nothing that kvcore could replace"
        )
    report = {"name": loaded.name, "tokens": tokens.shape[1], "layers": layers}
    return report | _conclusion(loaded, tokens, layers)


def _conclusion(loaded: Any, tokens: Tensor, layers: list[dict[str, Any]]) -> dict[str, Any]:
    if all("unsupported" in layer for layer in layers):
        return {"caches": {}, "recommended": None, "reason": layers[0]["unsupported"]}
    choices = [*WIDTHS]
    if mixed := _by_layer(layers, loaded.model.config):
        choices.append(mixed)
    caches = _whole_model(loaded, tokens, choices[::-1])
    # NaN fails every comparison.
    fits = [choice for choice in choices if caches[choice.label]["kl"] <= MAX_KL]
    if not fits:
        reason = f"even at 8 bit the predictions move by {caches['8 bit']['kl']:.2g} nats"
        return {"caches": caches, "recommended": None, "reason": reason}
    best = min(fits, key=lambda choice: caches[choice.label]["kv_bytes"])
    bits = {"k_bits": best.k_bits, "v_bits": best.v_bits}
    return {"caches": caches, "recommended": bits, "reason": ""}
