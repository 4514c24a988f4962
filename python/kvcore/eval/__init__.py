"""Measures what a compressed cache costs in quality; every scored token is read through the cache.

`stepwise_scores` runs a model over given tokens; the functions of `metrics` turn two such runs (one
with the full cache, one with a compressed one, on the same tokens) into figures with intervals.
"""

from kvcore.eval.metrics import (
    Interval,
    accuracy,
    agreement,
    bits_per_byte,
    kl_divergence,
    mean_interval,
    paired_ratio_interval,
    spearman,
)
from kvcore.eval.sizes import CacheBytes, bytes_16bit, cache_bytes
from kvcore.eval.stepwise import prefill, repeated, stepwise_scores
from kvcore.eval.through import scored_parts, through_caches

__all__ = [
    "CacheBytes",
    "Interval",
    "accuracy",
    "agreement",
    "bits_per_byte",
    "bytes_16bit",
    "cache_bytes",
    "kl_divergence",
    "mean_interval",
    "paired_ratio_interval",
    "prefill",
    "repeated",
    "scored_parts",
    "spearman",
    "stepwise_scores",
    "through_caches",
]
