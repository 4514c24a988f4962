"""Interleaved timing with a cold cache."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from memory import kept_memory
from worker import time_on_cpu

FLUSH_BYTES = 1 << 30  # several times the last-level cache of any machine this runs on
MIN_ROUNDS = 3  # however long they take
# OpenMP's threads stay awake for some milliseconds after they worked; a variant in another process
# would have to share the cores with those of this one.
SETTLE_SECONDS = 0.02


class CacheFlusher:
    """Evicts everything from the caches by writing to a buffer larger than any of them."""

    def __init__(self, device: torch.device, num_bytes: int = FLUSH_BYTES):
        self._buffer = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1)


def time_on_gpu(run: Callable[[], object]) -> float:
    """Between two events of the stream: a flush before it hides the time that launches take."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) * 1e-3


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    is_gpu = device.type == "cuda"
    if hasattr(run, "timed"):  # in another process, which may want the GPU for itself
        if is_gpu:
            torch.cuda.synchronize()
        else:
            time.sleep(SETTLE_SECONDS)
        return run.timed()
    return time_on_gpu(run) if is_gpu else time_on_cpu(run)


def interleave(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    flush: Callable[[], None] | None = None,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Times every variant once per round, in turn, and returns seconds per call and round.

    After ``seconds`` it ends, if it has had three rounds.

    Whatever disturbs the machine for a while then disturbs all variants alike. The first variant
    changes from round to round, so that none always runs after the same neighbour.
    """
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc_was_enabled = gc.isenabled()
    gc.disable()
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_memory())
        if gc_was_enabled:
            stack.callback(gc.enable)
        for name in names:  # first touch, lazy initialisation
            variants[name]()
        begin = time.perf_counter()
        for i in range(rounds):
            if i >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
                break
            for name in _rotate(names, i):
                if flush is not None:
                    flush()
                samples[name].append(_time_once(variants[name], device))
    return samples


def _rotate(names: list[str], i: int) -> Iterator[str]:
    k = i % len(names)
    yield from names[k:]
    yield from names[:k]


def summary(samples: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, in seconds."""
    if len(samples) < 2:
        return {"median": samples[0], "p10": samples[0], "p90": samples[0]}
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": statistics.median(samples), "p10": tenths[0], "p90": tenths[-1]}
