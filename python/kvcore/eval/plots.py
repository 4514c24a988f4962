"""Plots of an evaluation, made of its JSON alone; matplotlib is imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MARKERS = {"full": "*", "turbo": "o", "lexico": "s", "quantized": "x", "kvpress": "^"}
NO_MATPLOTLIB = "no plots: matplotlib is not installed (pip install matplotlib)"


def available() -> bool:
    """Whether plots can be drawn here; then without a display."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


def _half(interval: dict[str, Any]) -> float:
    return interval["half_width"] or 0.0


def _against_bytes(model: dict[str, Any], axes: Any) -> None:
    for index, row in enumerate(model["caches"]):
        kl = row["text"]["kl"]
        if row["kind"] == "full":
            continue  # zero by definition
        x = row["text"]["kv_bytes"] / row["text"]["tokens"]
        axes.errorbar(
            x,
            kl["mean"],
            yerr=min(_half(kl), 0.99 * kl["mean"]),  # the axis has no zero
            marker=MARKERS[row["kind"]],
            color=f"C{index % 10}",
            capsize=3,
        )
        axes.annotate(row["label"], (x, kl["mean"]), (5, 4), textcoords="offset points", fontsize=8)
    # Caches that hold K and V as they are lose nothing, and a logarithmic axis has no zero.
    loses = any(row["text"]["kl"]["mean"] > 0 for row in model["caches"])
    axes.set(yscale="log" if loses else "linear")
    axes.set(xlabel="bytes of K and V per token", ylabel="KL to the full cache, nats")
    axes.set_title(f"{model['model']}: quality against bytes", fontsize=10)


def _against_pairs(model: dict[str, Any], axes: Any) -> None:
    lowest = 100.0
    for index, row in enumerate(model["caches"]):
        entries = [(entry["pairs"], entry["recall"]) for entry in row["pairs"]]
        lowest = min([lowest, *(100 * (found["mean"] - _half(found)) for _, found in entries)])
        # Side by side: most of them recall the same.
        shift = 1.03 ** (index - len(model["caches"]) / 2)
        axes.errorbar(
            [pairs * shift for pairs, _ in entries],
            [100 * found["mean"] for _, found in entries],
            yerr=[100 * _half(found) for _, found in entries],
            marker=MARKERS[row["kind"]],
            color=f"C{index % 10}",
            capsize=3,
            linewidth=1,
            label=row["label"],
        )
    numbers = [entry["pairs"] for entry in model["caches"][0]["pairs"]]
    bottom = min(95.0, max(0.0, 5 * (lowest // 5)))
    axes.set(xscale="log", xlabel="pairs in the prompt", ylabel="recall, %")
    axes.set_ylim(bottom, 100 + (100 - bottom) / 20)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_title(f"{model['model']}: recall against pairs", fontsize=10)
    axes.legend(fontsize=7, loc="lower left")


_PANELS = {"text": _against_bytes, "pairs": _against_pairs}


def draw_quality(result: dict[str, Any], path: Path, metadata: dict[str, str]) -> bool:
    """Quality against bytes, and recall against pairs; a row for each model.

    Returns whether there was anything to draw.
    """
    from matplotlib import pyplot

    models = [model for model in result["models"] if model["caches"]]
    names = [name for name in _PANELS if any(name in m["caches"][0] for m in models)]
    if not names:
        return False
    size = (6.5 * len(names), 4.5 * len(models))
    figure, panels = pyplot.subplots(
        len(models), len(names), figsize=size, layout="constrained", squeeze=False
    )
    for model, row in zip(models, panels, strict=True):
        for name, axes in zip(names, row, strict=True):
            if name in model["caches"][0]:
                _PANELS[name](model, axes)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)
    return True


def draw_needles(result: dict[str, Any], path: Path, metadata: dict[str, str]) -> bool:
    """Heat maps of recall, depth by length; a row for each model and a column for each cache.

    Returns whether there was anything to draw.
    """
    from matplotlib import pyplot

    models = [m for m in result["models"] if m["caches"] and "needle" in m["caches"][0]]
    if not models:
        return False
    most = max(len(model["caches"]) for model in models)
    figure, panels = pyplot.subplots(
        len(models),
        most,
        figsize=(2.2 * most + 1, 2.6 * len(models)),
        layout="constrained",
        squeeze=False,
    )
    for model, line in zip(models, panels, strict=True):
        for axes in line[len(model["caches"]) :]:
            axes.axis("off")
        for axes, row in zip(line, model["caches"], strict=False):
            entries = row["needle"]
            cells = [
                [100 * entry["by_depth"][i]["recall"]["mean"] for entry in entries]
                for i in range(len(entries[0]["by_depth"]))
            ]
            image = axes.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            for i, values in enumerate(cells):
                for j, value in enumerate(values):
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7)
            axes.set_xticks(range(len(entries)), [entry["length"] for entry in entries], fontsize=7)
            depths = [f"{cell['depth']:.2f}" for cell in entries[0]["by_depth"]]
            axes.set_yticks(range(len(depths)), depths, fontsize=7)
            axes.set_title(f"{model['model']}, {row['label']}", fontsize=8)
    panels[-1][0].set(xlabel="tokens", ylabel="depth")
    figure.colorbar(image, ax=panels, label="recall, %")
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)
    return True


# By the ends of their files' names.
PLOTS = {"eval": draw_quality, "eval-needle": draw_needles}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot that there are figures for, beside ``eval.json``; the files that were written."""
    paths = {name: folder / f"{name}.png" for name in PLOTS}
    return [path for name, path in paths.items() if PLOTS[name](result, path, {})]
