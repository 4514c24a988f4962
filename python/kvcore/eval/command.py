"""``kvcore eval``: models and caches in, tables, JSON and plots out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvcore.eval import plots, report
from kvcore.eval.progress import progress
from kvcore.eval.run import Plan, Subject, measure
from kvcore.eval.summary import summarise


def _write(result: dict[str, Any], folder: Path) -> None:
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    (folder / "eval.json").write_text(text)


def _print(model: dict[str, Any]) -> None:
    print(f"\n{model['model']}\n{report.render(model)}")
    if "pairs" in model["caches"][0]:
        print(f"\nRecall in % against the number of pairs\n{report.pairs_table(model)}")
    if "needle" in model["caches"][0]:
        full, *others = (
            (r["cache"], report.needle_table(model, r["cache"])) for r in model["caches"]
        )
        print(f"\nNeedles found in %, depth by tokens\n{full[0]}\n{full[1]}")
        for cache, table in others:
            print(f"{cache}: as {full[0]}" if table == full[1] else f"{cache}\n{table}")


def main(
    subjects: Iterable[Subject],
    caches: dict[str, Any],
    plan: Plan,
    *,
    command: str,
    text: dict[str, Any],
    out: Path | None,
) -> int:
    """Measures each model, prints its tables, and writes ``eval.json`` and the plots into `out`.

    Args:
        subjects: the models; each is taken from there when the one before is done.
        caches: by their specs.
        plan: what and how much.
        command: that was given, for the JSON.
        text: what the text is, for the JSON.
        out: the folder, made if there is none; None writes nothing.

    Returns:
        0, or 130 after an interruption; what was finished by then is printed and written.

    Raises:
        ValueError: if the plan does not fit a model or the text.
        OSError: for a folder that cannot be written.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # rather now than after the measurement
    start = time.perf_counter()
    result: dict[str, Any] = {
        "command": command,
        "setup": report.setup(),
        "plan": {**dataclasses.asdict(plan), "seeds": list(range(plan.seeds))},
        "text": text,
        "note": report.CAVEAT,
        "models": [],
    }
    interrupted = False
    for subject in subjects:
        samples = measure(subject, caches, plan, progress)
        interrupted = samples.interrupted
        if samples.found:
            model = summarise(subject, samples, plan)
            result["models"].append(model)
            _print(model)
        if out is not None:
            result["seconds"] = round(time.perf_counter() - start, 1)
            _write(result, out)
        if interrupted:
            break
    print(
        f"\n{report.CAVEAT}\n± is a 95 % t interval over the sequences of all {plan.seeds} seeds; "
        "every figure is read through the cache, step by step. docs/eval.md says how to read them."
    )
    if out is not None:
        print(f"figures: {out / 'eval.json'}")
        if plots.available():
            for path in plots.draw(result, out):
                print(f"plot: {path}")
        else:
            print(plots.NO_MATPLOTLIB)
    return 130 if interrupted else 0
