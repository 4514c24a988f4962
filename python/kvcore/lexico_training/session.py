"""A training run: capture, one dictionary after the other, files and report; it can be resumed.

All that a run needs to go on lies in ``training/`` below its folder and is replaced whole, so that
it may end at any moment. A run that goes on makes the same dictionaries as one that was never
interrupted, bit for bit, on the same machine with as many threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcore import hf
from kvcore.cache.dictionaries import FILE_NAME, MAX_ATOMS, MAX_SPARSITY, Dictionaries, Pair
from kvcore.cache.model_facts import attention_layers, head_dim_of, kv_heads_of
from kvcore.cache.settings import HEAD_DIMS
from kvcore.lexico_training import comparison
from kvcore.lexico_training.capture import FILE, Captured, plan
from kvcore.lexico_training.trainer import DictionaryTrainer, Recipe

REPORT = "dictionaries.json"
WORK = "training"


class Interrupted(Exception):
    """The run was told to stop, and has saved its state."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is determined by; one that goes on must have the same."""

    model: str
    source: dict[str, Any]  # of the tokens: SHA-256 and what else tells where they are from
    recipe: Recipe
    vectors: int  # for each dictionary
    num_rows: int
    num_tokens: int

    def facts(self) -> dict[str, Any]:
        # As JSON gives them back.
        return json.loads(json.dumps(dataclasses.asdict(self)))


def token_hash(rows: list[Tensor]) -> str:
    sha = hashlib.sha256()
    for row in rows:
        sha.update(len(row).to_bytes(8, "little"))
        sha.update(row.to(torch.int64).contiguous().numpy())
    return sha.hexdigest()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGINT or SIGTERM came; a second one has its usual effect."""
    stopped: list[int] = []
    previous = {}

    def note(number: int, frame: object) -> None:
        stopped.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: signals are its caller's
        pass
    try:
        yield lambda: bool(stopped)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _bar(title: str, total: int, unit: str) -> Any:
    from tqdm.auto import tqdm  # transformers requires it

    return tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "tok", file=sys.stderr)


class Session:
    """See :func:`train`."""

    def __init__(
        self, model: Any, rows: list[Tensor], settings: Settings, out: Path, save_every: float
    ) -> None:
        self.model, self.rows, self.settings = model, rows, settings
        self.out, self.work, self.save_every = out, out / WORK, save_every
        self.stopping: Callable[[], bool] = lambda: False
        self.layers = _layers(model)
        planned = plan([len(row) for row in rows], kv_heads_of(model.config), settings.vectors)
        _check_recipe(settings.recipe, planned.num_vectors, head_dim_of(model.config))
        if (out / FILE_NAME).exists():
            raise ValueError(f"out must be a folder without {FILE_NAME}, got {out}, which has one")
        self._open()
        self.captured = Captured(self.work, planned, settings.facts())

    def _open(self) -> None:
        """Makes the working folder, or checks that it belongs to a run with these settings."""
        self.work.mkdir(parents=True, exist_ok=True)
        path, facts = self.work / "settings.json", self.settings.facts()
        if not path.exists():
            _write_json(path, facts)
            return
        try:
            saved = dict(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} is damaged, remove {self.work}: {error}") from error
        for name in facts:
            if saved.get(name) != facts[name]:
                raise ValueError(
                    f"{self.out} holds a run that was begun with {name} {saved.get(name)}, not "
                    f"{facts[name]}: name another folder, or remove {self.work}"
                )

    def run(self) -> dict[str, Any]:
        """Does what is left to do."""
        self._capture()
        steps = self.settings.recipe.steps
        layers, pairs = [], {}
        with _bar("train", 2 * len(self.layers) * steps, "step") as bar:
            for layer in self.layers:
                trainers = [self._train(f"{kind}.{layer}", bar) for kind in "kv"]
                pairs[layer] = Pair(*(trainer.dictionary for trainer in trainers))
                layers.append(self._compare(layer, trainers))
        report = {
            "settings": self.settings.facts(),
            "training_vectors": self.captured.plan.num_vectors,
            "layers": layers,
        }
        self._finish(pairs, report)
        return report

    def _capture(self) -> None:
        with _bar("capture", self.settings.num_tokens, "tok") as bar:
            done = self.captured.run(
                self.model,
                self.rows,
                self.layers,
                seed=self.settings.recipe.seed,
                on_tokens=bar.update,
                stopping=self.stopping,
            )
        if not done:
            raise Interrupted

    def _train(self, name: str, bar: Any) -> DictionaryTrainer:
        path = self.work / f"{name}.safetensors"
        vectors = self.captured.training(name)
        if not vectors.isfinite().all():
            raise ValueError(f"the model's {name} (kind and layer) has values that are not finite")
        trainer = DictionaryTrainer(vectors, self.settings.recipe)
        if path.exists():
            trainer.load_state(FILE.read(path)[1])
            bar.update(trainer.step_idx)
        saved_at = time.monotonic()
        while not trainer.done:
            error = trainer.step()
            bar.set_postfix_str(f"{name}, squared error {error:.4f}", refresh=False)
            bar.update(1)
            now = time.monotonic()
            if trainer.done or self.stopping() or now - saved_at > self.save_every:
                stated = {"settings": self.settings.facts()}
                FILE.write(path, stated, trainer.state(), "train_dictionary")
                saved_at = now
            if self.stopping():
                raise Interrupted
        return trainer

    def _compare(self, layer: int, trainers: list[DictionaryTrainer]) -> dict[str, Any]:
        held = [self.captured.held_out(f"{kind}.{layer}") for kind in "kv"]
        arms = comparison.compare(
            held,
            [trainer.dictionary for trainer in trainers],
            [trainer.vectors for trainer in trainers],
            self.settings.recipe,
        )
        if self.stopping():
            raise Interrupted
        return {
            "layer": layer,
            "held_out_vectors": held[0].shape[0] * held[0].shape[1],
            "arms": arms,
            "k_curve": trainers[0].curve(),
            "v_curve": trainers[1].curve(),
        }

    def _finish(self, pairs: dict[int, Pair], report: dict[str, Any]) -> None:
        settings = self.settings
        source = {name: x for name, x in settings.source.items() if name != "text_sha256"}
        made = Dictionaries(
            pairs,
            self.model.config,
            sparsity=settings.recipe.sparsity,
            model_id=settings.model,
            text_sha256=settings.source["text_sha256"],
            notes={
                "recipe": dataclasses.asdict(settings.recipe),
                "source": source,
                "training_vectors": self.captured.plan.num_vectors,
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            },
        )
        _write_json(self.out / REPORT, report)
        made.save(self.out)
        shutil.rmtree(self.work)


def _layers(model: Any) -> tuple[int, ...]:
    layers, head_dim = attention_layers(model.config), head_dim_of(model.config)
    if not layers:
        raise ValueError("model must have layers of full attention, got one without any")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"model must have a head_dim of {list(HEAD_DIMS)}, got {head_dim}")
    return layers


def _check_recipe(recipe: Recipe, num_vectors: int, head_dim: int) -> None:
    if not 1 <= recipe.atoms <= MAX_ATOMS:
        raise ValueError(f"atoms must be in [1, {MAX_ATOMS}], got {recipe.atoms}")
    limit = min(recipe.atoms, head_dim, MAX_SPARSITY)
    if not 1 <= recipe.sparsity <= limit:
        raise ValueError(
            f"sparsity must be in [1, {limit}] for {recipe.atoms} atoms and head_dim {head_dim}, "
            f"got {recipe.sparsity}"
        )
    least = max(recipe.atoms, recipe.batch)
    if num_vectors < least:
        raise ValueError(
            f"the text must give {least} vectors or more of a layer for {recipe.atoms} atoms and "
            f"steps of {recipe.batch} vectors, got {num_vectors}"
        )


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)


def train(
    model: Any,
    rows: list[Tensor],
    out: str | Path,
    *,
    name: str,
    source: dict[str, Any],
    recipe: Recipe,
    vectors: int,
    save_every: float = 60.0,
) -> dict[str, Any]:
    """Trains a dictionary for K and one for V of every full-attention layer of a model.

    Args:
        model: of transformers, in evaluation mode, whose attention goes through
            ``AttentionInterface``; layers without it (recurrent ones) are left out.
        rows: int64 ``[tokens]`` each, at least two; the first ones are held out for the report.
        out: folder for ``dictionaries.safetensors`` and the report, ``dictionaries.json``; what a
            run needs to go on is in ``training/`` below it until then.
        name: the model's, for the file.
        source: where the tokens are from, for the file: ``text_sha256`` and other JSON values.
        recipe: hyperparameters.
        vectors: wanted for each dictionary; short rows give fewer.
        save_every: seconds between two saved states of the dictionary in training.

    Returns:
        The report: for each layer, squared errors and bytes of codes, of kvcore's 4 and 2 bit and
        of anchors with 2-bit residuals, on the same held-out vectors.

    Raises:
        ValueError: too few rows or vectors for the recipe, nothing to train for, a folder that has
            dictionaries or belongs to a run with other settings.
        Interrupted: SIGINT or SIGTERM came; the state is saved, and the same call goes on from it.
    """
    if len(rows) < 2:
        raise ValueError(f"rows must be at least 2, one of them held out, got {len(rows)}")
    settings = Settings(
        name,
        {**source, "tokens_sha256": token_hash(rows)},
        recipe,
        vectors,
        len(rows),
        sum(len(row) for row in rows),
    )
    was_enabled = hf.is_enabled(model)
    hf.enable(model)  # layers of the gated delta rule run in kvcore
    try:
        session = Session(model, rows, settings, Path(out), save_every)
        with stop_on_signals() as session.stopping:
            return session.run()
    finally:
        if not was_enabled:
            hf.disable(model)


def render(report: dict[str, Any]) -> str:
    """The report's arms, means over layers, as a table."""
    first, *rest = [layer["arms"] for layer in report["layers"]]
    lines = [f"{'on held-out vectors':<22}{'bytes':>8}{'squared error of K':>22}{'of V':>10}"]
    for i, arm in enumerate(first):
        same = [arm, *(arms[i] for arms in rest)]
        k, v = (sum(a[kind] for a in same) / len(same) for kind in ("k_error", "v_error"))
        lines.append(f"{arm['name']:<22}{arm['bytes_per_vector']:>8.1f}{k:>22.4f}{v:>10.4f}")
    return "\n".join(lines)
