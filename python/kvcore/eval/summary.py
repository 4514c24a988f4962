"""Figures with intervals from what was measured: the entry of a model in the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcore.eval.metrics import Interval, mean_interval, paired_ratio_interval
from kvcore.eval.report import plain
from kvcore.eval.run import Plan, Samples, Subject
from kvcore.eval.sizes import bytes_16bit


def _pooled(entries: list[Any], pick: Callable[[Any], Tensor]) -> Tensor:
    return torch.cat([pick(entry) for entry in entries])


def _interval(entries: list[Any], pick: Callable[[Any], Tensor]) -> Interval:
    """Over the sequences or prompts of all seeds."""
    return mean_interval(_pooled(entries, pick))


def _text(own: list[Any], full: list[Any], subject: Subject, plan: Plan) -> dict[str, Any]:
    bits, full_bits = (_pooled(e, lambda s: s.bits_per_byte) for e in (own, full))
    held = own[0].held
    tokens = len(subject.prefix) + plan.context + plan.scored
    sixteen = bytes_16bit(subject.model.config, tokens)
    kv_bytes = own[0].bytes.kv / held
    return {
        "tokens": tokens,  # of a sequence, in the cache when its bytes were taken
        "kv_bytes": kv_bytes,  # of a sequence
        "kv_bytes_16bit": sixteen,
        "ratio": sixteen / kv_bytes,
        "state_bytes": own[0].bytes.state / held,
        "bits_per_byte": mean_interval(bits),
        "bits_change": paired_ratio_interval(bits, full_bits),
        "kl": _interval(own, lambda s: s.kl),
        "agreement": _interval(own, lambda s: s.agreement),
        "kl_by_seed": [s.kl.mean().item() for s in own],
        "bits_per_byte_by_seed": [s.bits_per_byte.mean().item() for s in own],
    }


def _recall(own: list[Any], full: list[Any]) -> dict[str, Any]:
    lost = [f.log_probs - o.log_probs for o, f in zip(own, full, strict=True)]
    return {
        "recall": _interval(own, lambda r: r.hits.double().mean(1)),
        "nats_lost": mean_interval(torch.cat(lost).mean(1)),
        "recall_by_seed": [r.hits.double().mean().item() for r in own],
    }


def _needle(own: list[Any], full: list[Any], plan: Plan) -> dict[str, Any]:
    hits = _pooled(own, lambda r: r.hits.double())
    lost = _pooled(full, lambda r: r.log_probs) - _pooled(own, lambda r: r.log_probs)
    return {
        **_recall(own, full),
        "by_depth": [
            {
                "depth": depth,
                "recall": mean_interval(hits[:, i]),
                "nats_lost": mean_interval(lost[:, i]),
            }
            for i, depth in enumerate(plan.needle_depths)
        ],
    }


def _order(own: list[Any]) -> dict[str, Any]:
    lost, recalled = (_pooled(own, pick) for pick in (lambda u: u.by_segment, lambda u: u.recall))
    return {
        "order_effect": _interval(own, lambda u: u.order_effect),
        "rank_correlation": _interval(own, lambda u: u.rank_correlation),
        "nats_lost_by_segment": [mean_interval(column) for column in lost.T],
        "recall_by_segment": [mean_interval(column) for column in recalled.T],
    }


def _stored(own: list[Any]) -> dict[str, Any]:
    return {
        f"{name}_by_segment": [mean_interval(x) for x in torch.stack(columns).T]
        for name in ("kept", "k_error", "v_error")
        for columns in [[getattr(s, name) for s in own]]
    }


def _one_cache(index: int, samples: Samples, subject: Subject, plan: Plan) -> dict[str, Any]:
    def of(measure: str, setting: Any) -> tuple[list[Any], list[Any]]:
        entries = samples.found[measure][setting]
        return [e[index] for e in entries], [e[0] for e in entries]

    figures: dict[str, Any] = {}
    for measure, settings in samples.found.items():
        if measure == "text":
            figures["text"] = _text(*of("text", None), subject, plan)
        elif measure == "needle":
            figures["needle"] = [
                {"length": length, **_needle(*of("needle", length), plan)} for length in settings
            ]
        elif measure == "pairs":
            figures["pairs"] = [
                {"pairs": number, **_recall(*of("pairs", number))} for number in settings
            ]
        else:
            parts = {"order": _order, "stored": _stored}
            figures["pitfalls"] = {}
            for setting in settings:
                figures["pitfalls"] |= parts[setting](of("pitfalls", setting)[0])
    return figures


def summarise(subject: Subject, samples: Samples, plan: Plan) -> dict[str, Any]:
    """The results of one model, as JSON has them.

    Intervals are 95 % t intervals over the sequences or prompts of all seeds; what is called
    ``_by_seed`` is the mean of each seed. After an interruption there are fewer seeds, or fewer
    measures.
    """
    config = subject.model.config.get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return plain(
        {
            "model": subject.name,
            "layer_types": list(layers),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "interrupted": samples.interrupted,
            "not_measured": samples.not_measured,
            "fallbacks": samples.fallbacks,
            "caches": [
                {
                    "cache": name,
                    "label": choice.label,
                    "kind": choice.kind,
                    **_one_cache(index, samples, subject, plan),
                }
                for index, (name, choice) in enumerate(samples.caches.items())
            ],
        }
    )
