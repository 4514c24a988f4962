"""Train a demo model: `python -m kvcore.demo.train --model hybrid --minutes 75 --out DIR`.

Rows get longer, and hold more recall pairs, as soon as recall works at the present length. A
checkpoint with optimizer, generator and curve is written every few minutes; running the same
command again goes on from it. `--check DIR` measures the finished model and adds the figures to its
training.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcore.demo import data, models
from kvcore.demo.fast import fast
from kvcore.demo.induction import graft_
from kvcore.demo.scaffold import scaffold_

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum."""

    length: int  # tokens of a row
    rows: int
    symbols: int  # how many of the key and of the value symbols are in use
    max_pairs: int  # recall pairs of a row
    mix: tuple  # how many rows of each 20 have the layouts of data.LAYOUTS
    echo: float = 0.5  # share of the rows whose text is passed through data.echo
    steps: int = 20  # the fewest it lasts
    graft: bool = False  # begins with induction.graft_


# With all 64 keys and values from the start neither model leaves the plateau of guessing among the
# values it has seen (620 steps); with 8 the hybrid model does within 50 steps, and the circuit
# carries over.
STAGES = (
    Stage(64, 32, 8, 4, (4, 12, 4, 0), 0.0),
    Stage(64, 32, 16, 4, (4, 12, 4, 0), 0.0),
    Stage(64, 32, 32, 8, (4, 10, 6, 0), 0.0),
    Stage(128, 20, 64, 8, (5, 9, 4, 2), 0.0),
    Stage(128, 20, 64, 16, (5, 7, 5, 3), 0.0),
    Stage(256, 12, 64, 32, (5, 5, 5, 5)),
    Stage(512, 6, 64, 48, (5, 3, 6, 6)),
    Stage(1024, 4, 64, 64, (4, 1, 9, 6)),
    Stage(2304, 2, 64, 64, (10, 0, 4, 6)),
    # Copying of text, found where it is cheapest, carried back to long rows.
    Stage(256, 12, 64, 32, (16, 0, 2, 2), 1.0, 150),
    Stage(768, 3, 64, 64, (12, 0, 4, 4), 0.5, 60, graft=True),
    Stage(2304, 2, 64, 64, (12, 0, 4, 4), 0.25),
)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters. Muon updates the matrices, AdamW embeddings, norms and gates."""

    seed: int = 0
    muon_lr: float = 5e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 40
    decay_from: float = 0.93  # share of the time after which the rate falls linearly
    final_rate: float = 0.02
    clip: float = 1.0
    advance_at: float = 0.9  # smoothed recall accuracy that ends a stage
    answer_weight: float = 0.25  # of the recall loss beside the text loss


RECIPE = Recipe()


def optimizers(model: torch.nn.Module, recipe: Recipe) -> tuple[Any, Any]:
    """(Muon over the hidden matrices, AdamW over the rest)."""
    matrices, rest, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "in_proj_ba" not in name:
            matrices.append(parameter)
        else:
            (rest if parameter.ndim == 2 else plain).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.muon_lr,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [{"params": rest}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        groups,
        lr=recipe.adamw_lr,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    return muon, adamw


def rate(recipe: Recipe, step: int, progress: float) -> float:
    """Factor of the learning rates: warm-up by steps, then constant, then linear decay."""
    left = (1 - progress) / (1 - recipe.decay_from)
    return min(1.0, (step + 1) / recipe.warmup_steps) * min(1.0, max(recipe.final_rate, left))


def batch(rng: np.random.Generator, corpus: np.ndarray, stage: Stage) -> tuple[Tensor, Tensor]:
    """(ids, roles) of one step, int64 [rows, length]."""
    share = np.array(stage.mix) / sum(stage.mix)
    layouts = rng.choice(data.LAYOUTS, size=stage.rows, p=share)
    # Both losses need a row of their kind in every batch.
    layouts[0] = "gap"
    layouts[-1] = "text" if stage.rows > 4 else layouts[-1]
    rows = [data.training_row(rng, corpus, stage, x) for x in layouts]
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))


def losses(model: Any, ids: Tensor, roles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nats per text byte, nats per recall answer, share of right answers) of one batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        scored = roles[:, 1:] != data.UNSCORED
        logits = model.lm_head(hidden[scored]).float()
    labels, is_answer = ids[:, 1:][scored], (roles[:, 1:] == data.ANSWER)[scored]
    nats = F.cross_entropy(logits, labels, reduction="none")
    right = (logits.detach().argmax(-1) == labels)[is_answer].float().mean()
    return nats[~is_answer].mean(), nats[is_answer].mean(), right


class Run:
    """Everything a training run carries from step to step, and to and from its checkpoint."""

    def __init__(self, name: str, out: str | Path, minutes: float, recipe: Recipe):
        self.name, self.out, self.minutes, self.recipe = name, Path(out), minutes, recipe
        torch.manual_seed(recipe.seed)
        self.rng = np.random.default_rng(recipe.seed)
        self.model = models.build(name)
        if name == "control":
            scaffold_(self.model)
        self.optimizers = optimizers(self.model, recipe)
        self.state = {
            "step": 0,
            "tokens": 0,
            "seconds": 0.0,
            "cpu_seconds": 0.0,
            "stage": 0,
            "stage_step": 0,
            "recall": 0.0,
            "sessions": 0,
            "stages": [],
            "grafts": [],
            "curve": [],
        }
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / CHECKPOINT).exists():
            saved = torch.load(self.out / CHECKPOINT, weights_only=False)
            if saved["model_name"] != name:
                raise ValueError(f"--out holds a {saved['model_name']} checkpoint, not {name}")
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.rng.bit_generator.state = saved["rng"]
            self.state.update(saved["state"])
        self.state["sessions"] += 1
        # A resumed run may follow another curriculum: the record keeps which steps followed which.
        stages = [asdict(stage) for stage in STAGES]
        if not self.state["stages"] or self.state["stages"][-1]["stages"] != stages:
            part = {"from_step": self.state["step"], "recipe": asdict(recipe), "stages": stages}
            self.state["stages"].append(part)

    def save(self, corpus_record: dict[str, Any]) -> None:
        """Write the checkpoint, the bf16 weights and training.json, each by an atomic rename."""
        part = self.out / (CHECKPOINT + ".part")
        torch.save(
            {
                "model_name": self.name,
                "model": self.model.state_dict(),
                "optimizers": [x.state_dict() for x in self.optimizers],
                "rng": self.rng.bit_generator.state,
                "state": self.state,
            },
            part,
        )
        os.replace(part, self.out / CHECKPOINT)
        export(self, corpus_record)

    def step(self, corpus: np.ndarray) -> tuple[float, float]:
        """One optimizer step; returns (bits per text byte, recall accuracy)."""
        state, recipe = self.state, self.recipe
        factor = rate(recipe, state["step"], state["seconds"] / (60 * self.minutes))
        for optimizer, base in zip(self.optimizers, (recipe.muon_lr, recipe.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        ids, roles = batch(self.rng, corpus, STAGES[state["stage"]])
        text, answer, right = losses(self.model, ids, roles)
        (text + recipe.answer_weight * answer).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        state["stage_step"] += 1
        state["tokens"] += ids.numel()
        state["recall"] += (right.item() - state["recall"]) / min(state["stage_step"], 20)
        return text.item() / math.log(2), right.item()

    def advance(self, corpus: np.ndarray) -> None:
        """Enter the next stage of the curriculum when recall works in this one."""
        state, recipe = self.state, self.recipe
        ready = (
            state["stage_step"] >= STAGES[state["stage"]].steps
            and state["recall"] > recipe.advance_at
        )
        if ready and state["stage"] + 1 < len(STAGES):
            state.update(stage=state["stage"] + 1, stage_step=0, recall=0.0)
            if STAGES[state["stage"]].graft:
                graft_(self.model, corpus, self.rng)
                state["grafts"].append(state["step"])


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def export(run: Run, corpus_record: dict[str, Any]) -> None:
    """Write config.json, model.safetensors (bf16) and training.json of a run to its folder."""
    from safetensors.torch import save_file

    # The tied output matrix is the embedding: stored once, as transformers expects.
    weights = {
        name: x.detach().to(torch.bfloat16).contiguous()
        for name, x in run.model.state_dict().items()
        if not (name == "lm_head.weight" and run.model.config.tie_word_embeddings)
    }
    part = run.out / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    os.replace(part, run.out / "model.safetensors")
    run.model.config.dtype = torch.bfloat16
    run.model.config.save_pretrained(run.out)
    import transformers

    record = {
        "model": run.name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "weights_sha256": sha256(run.out / "model.safetensors"),
        "weights_bytes": (run.out / "model.safetensors").stat().st_size,
        "data": corpus_record,
        "recipe": asdict(run.recipe),
        "curriculum": run.state["stages"],
        "grafted_at_steps": run.state["grafts"],
        "minutes": run.minutes,
        "steps": run.state["step"],
        "tokens": run.state["tokens"],
        "wall_seconds": round(run.state["seconds"], 1),
        "cpu_seconds": round(run.state["cpu_seconds"], 1),
        "sessions": run.state["sessions"],
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "curve": run.state["curve"],
    }
    write_json(run.out / "training.json", record)


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    part = Path(f"{path}.part")
    # One line per field: readable in spite of the curve, and diffs stay small.
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items())
    part.write_text("{\n" + lines + "\n}\n")
    os.replace(part, path)


def train(
    name: str,
    minutes: float,
    out: str | Path,
    *,
    recipe: Recipe = RECIPE,
    log_every: int = 20,
    save_every: float = 180.0,
) -> None:
    """Train model `name` for `minutes` of wall time in all.

    Resumes from `out` when it holds a checkpoint, writes one every `save_every` seconds, at the end
    and on SIGTERM or SIGINT.
    """
    names = data.source_files(held_out=False)
    corpus = data.read_corpus(names)
    record = {
        "text": data.describe(names),
        "held_out": data.describe(data.source_files(held_out=True)),
    }
    run = Run(name, out, minutes, recipe)
    run.model.train()
    state, saved_at, recent = run.state, run.state["seconds"], []
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # Leave after the step under way, with a checkpoint.
        signal.signal(number, lambda *_: stopped.append(True))
    last, last_cpu = time.monotonic(), time.process_time()
    with fast(run.model):
        while state["seconds"] < 60 * minutes and not stopped:
            recent.append(run.step(corpus))
            now, now_cpu = time.monotonic(), time.process_time()
            state["seconds"] += now - last
            state["cpu_seconds"] += now_cpu - last_cpu
            last, last_cpu = now, now_cpu
            if state["step"] % log_every == 0:
                bits, recall = np.nanmean(recent, axis=0).tolist()
                recent.clear()
                length = STAGES[state["stage"]].length
                state["curve"].append(
                    [
                        state["step"],
                        round(state["seconds"]),
                        length,
                        round(bits, 4),
                        round(recall, 4),
                    ]
                )
                print(
                    f"{state['seconds'] / 60:6.1f}/{minutes:g} min  step {state['step']}  "
                    f"length {length}  text {bits:.3f} bits/byte  recall {recall:.3f}",
                    flush=True,
                )
            run.advance(corpus)
            if state["seconds"] - saved_at > save_every:
                saved_at = state["seconds"]
                run.save(record)
    run.save(record)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvcore.demo.train", description=__doc__)
    parser.add_argument("--model", choices=models.NAMES)
    parser.add_argument("--minutes", type=float, default=75.0, help="wall time in all (default 75)")
    parser.add_argument("--out", help="folder for the checkpoint, the weights and training.json")
    parser.add_argument(
        "--check", metavar="DIR", help="measure the model in DIR, store the figures"
    )
    args = parser.parse_args(argv)
    if args.check:
        from kvcore.demo import tasks

        return tasks.check(args.check)
    if not (args.model and args.out):
        parser.error("--model and --out are required unless --check is given")
    train(args.model, args.minutes, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
