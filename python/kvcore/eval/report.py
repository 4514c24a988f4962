"""The results of an evaluation: as JSON, and as tables made of the JSON alone."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CAVEAT = (
    "What a cache costs a small model does not carry over to large models, nor does the order in "
    "which caches come out: measure the model that you use, on text like yours."
)
MISSING = "-"


def plain(value: Any) -> Any:
    """Values of JSON, which has no NaN: an interval of one sample gets null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aligned(lines: list[list[str]]) -> str:
    """Cells as columns; the first one to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _shown(interval: dict[str, Any], spec: str, factor: float = 1) -> str:
    mean, half = factor * interval["mean"], interval["half_width"]
    if half is None:
        return format(mean, spec)
    return f"{format(mean, spec)} ± {format(factor * half, spec.replace('+', ''))}"


def _mean(entries: list[dict], name: str) -> float:
    return sum(entry[name]["mean"] for entry in entries) / len(entries)


def worst(entries: list[dict]) -> float:
    """Recall in the worst of all cells of depth and length."""
    return min(cell["recall"]["mean"] for entry in entries for cell in entry["by_depth"])


Column = tuple[str, str, Callable[[Any], str]]
# Title, measure, and what it shows of the measure's figures.
COLUMNS: tuple[Column, ...] = (
    ("bytes/token", "text", lambda t: f"{t['kv_bytes'] / t['tokens']:.0f}"),
    ("vs 16 bit", "text", lambda t: f"{t['ratio']:.2f}x"),
    ("bits/byte", "text", lambda t: f"{t['bits_per_byte']['mean']:.4f}"),
    ("change %", "text", lambda t: _shown(t["bits_change"], "+.2f", 100)),
    ("KL to full", "text", lambda t: _shown(t["kl"], ".1e")),
    ("same top %", "text", lambda t: f"{100 * t['agreement']['mean']:.1f}"),
    ("needles %", "needle", lambda n: f"{100 * _mean(n, 'recall'):.1f}"),
    ("worst cell %", "needle", lambda n: f"{100 * worst(n):.1f}"),
    ("most pairs %", "pairs", lambda p: _shown(p[-1]["recall"], ".1f", 100)),
    ("rank corr.", "pitfalls", lambda p: f"{p['rank_correlation']['mean']:.3f}"),
    ("order effect", "pitfalls", lambda p: _shown(p["order_effect"], "+.3f")),
)


def columns(model: dict[str, Any]) -> list[Column]:
    """The columns that there are figures for."""
    first = model["caches"][0]
    return [
        c
        for c in COLUMNS
        if c[1] in first and (c[1] != "pitfalls" or "order_effect" in first[c[1]])
    ]


def rows(model: dict[str, Any]) -> list[list[str]]:
    """Header, and a row for each cache, those that were not measured without figures."""
    shown = columns(model)
    lines = [["cache", *(title for title, _, _ in shown)]]
    for row in model["caches"]:
        lines.append([row["cache"], *(show(row[measure]) for _, measure, show in shown)])
    for name in model["not_measured"]:
        lines.append([name, *(MISSING for _ in shown)])
    return lines


def render(model: dict[str, Any]) -> str:
    """The table of one model, and why caches are missing from it."""
    lines = [aligned(rows(model))]
    lines += [f"{name}: {reason}" for name, reason in model["not_measured"].items()]
    for reason, count in model["fallbacks"].items():
        lines.append(f"kvcore fell back {count} times: {reason}")
    if model["interrupted"]:
        lines.append("interrupted: figures are of what was finished by then")
    return "\n".join(lines)


def needle_table(model: dict[str, Any], cache: str) -> str:
    """Recall in percent by depth (rows) and length (columns) of one cache."""
    (entries,) = (row["needle"] for row in model["caches"] if row["cache"] == cache)
    lines = [["depth", *(f"{entry['length']:,}" for entry in entries)]]
    for i, cell in enumerate(entries[0]["by_depth"]):
        found = (entry["by_depth"][i]["recall"]["mean"] for entry in entries)
        lines.append([f"{cell['depth']:.2f}", *(f"{100 * mean:.0f}" for mean in found)])
    return aligned(lines)


def pairs_table(model: dict[str, Any]) -> str:
    """Recall in percent of each cache (rows) against the number of pairs (columns)."""
    caches = model["caches"]
    lines = [["pairs", *(f"{entry['pairs']}" for entry in caches[0]["pairs"])]]
    for row in caches:
        lines.append([row["cache"], *(_shown(e["recall"], ".1f", 100) for e in row["pairs"])])
    return aligned(lines)


def _commit() -> dict[str, Any]:
    """What bench/ says of the checkout that the package lies in; an installed one has no commit."""
    script = Path(__file__).resolve().parents[3] / "bench" / "commit.py"
    if not script.is_file():
        return {"commit": "", "modified": False}
    return runpy.run_path(str(script))["describe"]()


def setup() -> dict[str, Any]:
    """Versions, commit and machine: what a figure means nothing without."""
    import transformers

    import kvcore

    return {
        "kvcore": kvcore.__version__,
        **_commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
