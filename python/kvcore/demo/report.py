"""The demo's figures as a table, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from kvcore.demo.measure import Quality
from kvcore.eval import Interval
from kvcore.eval.report import aligned, plain

CAVEAT = (
    "These are small models, trained for this demo. What a width costs them does not carry over to "
    "large models: measure yours with `kvcore doctor --model`."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One model with one cache."""

    model: str
    cache: str
    tokens: int  # in the cache when its bytes were taken
    kv_bytes: int
    kv_bytes_16bit: int  # the same K and V in 16 bit
    state_bytes: int
    tokens_per_second: float
    quality: Quality
    sample: str  # what the model wrote
    kind: str = "turbo"
    dictionary_bytes: int = 0  # shared by all caches of the model, and not among kv_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller than 16 bit."""
        return self.kv_bytes_16bit / self.kv_bytes


def _percent(interval: Interval, digits: int) -> str:
    scaled = dataclasses.replace(
        interval, mean=100 * interval.mean, half_width=100 * interval.half_width
    )
    return f"{scaled:+.{digits}f}"


_COLUMNS = (
    ("cache", lambda r: r.cache),
    ("K, V bytes", lambda r: f"{r.kv_bytes:,}"),
    ("vs 16 bit", lambda r: f"{r.ratio:.2f}x"),
    ("state", lambda r: f"{r.state_bytes:,}"),
    ("tokens/s", lambda r: f"{r.tokens_per_second:.0f}"),
    ("bits/byte", lambda r: f"{r.quality.bits_per_byte.mean:.4f}"),
    ("change %", lambda r: _percent(r.quality.bits_change, 2)),
    ("recall %", lambda r: f"{100 * r.quality.recall.mean:.1f}"),
    ("change", lambda r: _percent(r.quality.recall_change, 2)),
    ("KL to full", lambda r: f"{r.quality.kl:.1e}"),
    ("same top %", lambda r: f"{100 * r.quality.agreement.mean:.1f}"),
)


def table(rows: list[Row]) -> str:
    """Rows of one model as aligned columns; the first column is to the left."""
    cells = [[name for name, _ in _COLUMNS]]
    cells += [[show(row) for _, show in _COLUMNS] for row in rows]
    return aligned(cells)


def to_json(rows: list[Row], setup: dict[str, Any]) -> dict[str, Any]:
    """All figures with the setup they were measured in."""
    figures = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
    return plain({"setup": setup, "note": CAVEAT, "rows": figures})


def plot(rows: list[Row], path: str) -> str:
    """Draws quality against bytes to the PNG at `path`; returns what to tell the user.

    Without matplotlib nothing is drawn and the answer says how to get it. Raises OSError where the
    file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    drawn = (
        ("bits per byte against the full cache, %", lambda q: q.bits_change, 100),
        ("recall against the full cache, points", lambda q: q.recall_change, 100),
        ("KL to the full cache, nats per byte", lambda q: q.kl, 1),
    )
    for panel, (title, pick, factor) in zip(panels, drawn, strict=True):
        series = [(name, kind) for name in names for kind in ("turbo", "lexico")]
        for name, kind in series:
            # Nothing to compare with the full cache: it is the zero of every panel.
            points = [row for row in rows if (row.model, row.kind) == (name, kind)]
            if not points:
                continue
            intervals = [pick(row.quality) for row in points]
            x = [row.kv_bytes / row.tokens for row in points]
            panel.errorbar(
                x,
                [factor * i.mean for i in intervals],
                yerr=[0 if math.isnan(i.half_width) else factor * i.half_width for i in intervals],
                color=f"C{names.index(name)}",
                marker="os^Dv"[names.index(name)],
                linestyle="--" if kind == "lexico" else "-",
                capsize=3,
                label=f"{name}, {kind}",
            )
            for row, at, i in zip(points, x, intervals, strict=True):
                panel.annotate(
                    row.cache,
                    (at, factor * i.mean),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=8,
                )
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("bytes of K and V per token")
        if factor == 1:
            panel.set_yscale("log")
        else:
            panel.axhline(0, color="gray", linewidth=0.8)
    panels[0].legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return f"plot: {path}"
