"""``kvcore demo``: two small models, seven caches, one table for each model."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from kvcore.demo import models, report, tasks
from kvcore.demo.generate import Generated, generate
from kvcore.demo.measure import Quality, Workload, measure
from kvcore.demo.textmodel import TextModel, load
from kvcore.eval.caches import COMPARED, FULL, CacheChoice
from kvcore.eval.progress import progress


@dataclasses.dataclass(frozen=True)
class Size:
    """How much the demo does."""

    prompt_bytes: int  # of the source file that is continued
    new_tokens: int
    sequences: int  # of held-out text
    context_len: int  # bytes prefilled before the scored ones
    scored: int  # bytes scored in each sequence
    prompts: int  # of recall


FULL_SIZE = Size(4096, 128, 24, 1024, 256, 128)
QUICK_SIZE = Size(1024, 48, 8, 704, 128, 16)


def workload(size: Size) -> Workload:
    """The tokens that every cache and every model is measured on."""
    recall = tasks.recall_prompts(size.prompts)
    return Workload(
        text=tasks.text_chunks(size.sequences, size.context_len + size.scored + 2),
        text_context_len=size.context_len,
        recall=recall.tokens,
        recall_context_len=recall.context_len,
        query_positions=recall.query_positions,
    )


def _generate_all(loaded: TextModel, text: bytes, size: Size) -> dict[CacheChoice, Generated]:
    prompt = loaded.encode(text)
    made = {}
    for choice in COMPARED:  # first calls allocate and dispatch; they are not what is timed
        generate(loaded.model, prompt[:, :128], choice, max_new_tokens=4, stop_at_eos=False)
    with progress(f"{loaded.name}: generate", len(COMPARED) * size.new_tokens, "tok") as step:
        for choice in COMPARED:
            made[choice] = generate(
                loaded.model,
                prompt,
                choice,
                max_new_tokens=size.new_tokens,
                stop_at_eos=False,
                on_token=lambda _: step(1),
            )
    return made


def _row(loaded: TextModel, choice: CacheChoice, made: Generated, quality: Quality) -> report.Row:
    return report.Row(
        model=loaded.name,
        cache=choice.label,
        tokens=made.cache.get_seq_length(),
        kv_bytes=made.bytes.kv,
        kv_bytes_16bit=made.bytes_16bit,
        state_bytes=made.bytes.state,
        tokens_per_second=made.tokens_per_second,
        quality=quality,
        sample=loaded.decode(made.tokens),
        kind=choice.kind,
        dictionary_bytes=made.cache.dictionaries.nbytes() if choice.kind == "lexico" else 0,
    )


def _same_start(one: list[int], other: list[int]) -> int:
    """How many leading tokens are the same."""
    same = [a == b for a, b in zip(one, other, strict=True)]
    return same.index(False) if False in same else len(same)


def _describe(loaded: TextModel, made: dict[CacheChoice, Generated], prompt: tasks.Prompt) -> str:
    full = made[FULL]
    ending = prompt.text[-60:].decode(errors="replace").rsplit("\n", 1)[-1]
    sample = loaded.decode(full.tokens)
    lines = [f"{loaded.name} continues {prompt.name} after {ending!r} with", f"  {sample[:150]!r}"]
    for choice, result in made.items():
        if choice != FULL:
            same = _same_start(full.tokens, result.tokens)
            lines.append(
                f"  {choice.label:<10} the first {same} of {len(full.tokens)} bytes are the same"
            )
    return "\n".join(lines)


def _setup(size: Size, work: Workload, prompt: tasks.Prompt, seconds: float) -> dict[str, Any]:
    return {
        "size": dataclasses.asdict(size),
        "prompt": prompt.name,
        "queries": work.num_queries,
        "chunk": work.chunk,
        "batch": work.batch,
        "dtype": "float32",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seconds": round(seconds, 1),
    }


def run_model(
    name: str, size: Size, work: Workload, prompt: tasks.Prompt
) -> tuple[list[report.Row], str]:
    """Rows of one model, and what it wrote, in words."""
    # fp32: in 16 bit the model's own rounding would hide what 8 bit costs.
    loaded = load(name, dtype="float32")
    made = _generate_all(loaded, prompt.text, size)
    with progress(f"{name}: measure", work.num_tokens(len(COMPARED)), "tok") as step:
        qualities = measure(loaded.model, COMPARED, work, step)
    rows = [_row(loaded, choice, made[choice], qualities[choice]) for choice in COMPARED]
    return rows, _describe(loaded, made, prompt)


def main(
    *,
    names: list[str] | None = None,
    quick: bool = False,
    json_path: str | None = None,
    plot_path: str | None = None,
) -> int:
    """Runs the demo, prints its tables, and writes JSON and plot where asked; returns 0.

    Raises ValueError for an unknown model, and OSError for a file that cannot be written.
    """
    names = list(dict.fromkeys(names or models.NAMES))
    for name in names:
        if name not in models.NAMES:
            raise ValueError(f"--model must be one of {list(models.NAMES)}, got {name!r}")
    for path in (json_path, plot_path):  # a typing error should not cost the whole run
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {Path(path).resolve().parent}")
    start = time.perf_counter()
    size = QUICK_SIZE if quick else FULL_SIZE
    work, prompt = workload(size), tasks.source_prompt(size.prompt_bytes)
    rows: list[report.Row] = []
    print(
        f"Prompt: {prompt.name}, {len(prompt.text):,} bytes. Measured on {size.sequences} x "
        f"{size.scored} bytes of source text the models were not trained on, and "
        f"{work.num_queries:,} recall queries, all read through the cache; ± is a 95 % interval.\n"
    )
    for name in names:
        model_rows, text = run_model(name, size, work, prompt)
        rows += model_rows
        shared = max(row.dictionary_bytes for row in model_rows)
        print(
            f"{text}\n\n{report.table(model_rows)}\nThe atoms are of dictionaries of {shared:,} "
            "bytes, which all caches of the model share.\n",
            flush=True,
        )
    print(report.CAVEAT)
    print(
        "The models compute in float32, and so does the full cache; sizes are compared with 16 "
        "bit. tokens/s are of one sequence, and in models this small most of it is Python."
    )
    if json_path is not None:
        setup = _setup(size, work, prompt, time.perf_counter() - start)
        Path(json_path).write_text(json.dumps(report.to_json(rows, setup), indent=2) + "\n")
        print(f"figures: {json_path}")
    if plot_path is not None:
        print(report.plot(rows, plot_path))
    print(f"{time.perf_counter() - start:.0f} s")
    return 0
