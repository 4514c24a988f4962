"""Keys and values of a model's attention layers, kept in files until dictionaries are trained.

One file per row of tokens, named by the row's number and complete once it has that name: a capture
that was interrupted goes on with the first row that has no file. Of a row for training a fixed
number of vectors is drawn, over all tokens and heads; rows held out are kept whole, since the
quantization that codes are compared with works on pages of consecutive tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvcore.cache.safe_file import FileKind
from kvcore.cache.settings import PAGE_TOKENS
from kvcore.eval.recording import recording
from kvcore.lexico_training.trainer import generator

HELD_OUT_TOKENS = 4096


class TrainingFileError(ValueError):
    """A file of an unfinished training run that is damaged."""


FILE = FileKind(
    "training file", TrainingFileError, "kvcore-dictionary-training", "1", ("settings",)
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows are run, and how many vectors of each are kept."""

    rows: int
    held_out: int  # the first so many rows
    vectors_per_row: int  # of each row for training, for each dictionary

    @property
    def num_vectors(self) -> int:
        """To train each dictionary on."""
        return (self.rows - self.held_out) * self.vectors_per_row


def plan(row_lens: list[int], kv_heads: int, vectors: int) -> Plan:
    """Divides rows of tokens into held-out ones and those for training.

    About `HELD_OUT_TOKENS` tokens are held out, at least one row and at most a quarter of them.

    Args:
        row_lens: tokens of each row, at least two rows.
        kv_heads: of a layer.
        vectors: wanted for each dictionary.
    """
    held_out = 1
    while held_out < len(row_lens) // 4 and sum(row_lens[:held_out]) < HELD_OUT_TOKENS:
        held_out += 1
    trained = row_lens[held_out:]
    per_row = min(-(-vectors // len(trained)), min(trained) * kv_heads)
    return Plan(len(row_lens), held_out, per_row)


def capture_row(
    model: Any, tokens: Tensor, row: int, planned: Plan, layers: tuple[int, ...], seed: int
) -> dict[str, Tensor]:
    """``k.<layer>`` and ``v.<layer>`` of one row: ``[kv_heads, tokens, head_dim]`` of one held out,
    else ``[vectors_per_row, head_dim]``, the same tokens and heads for K and V.

    Raises:
        ValueError: if a layer does not attend through transformers' attention interface.
    """
    kept: dict[str, Tensor] = {}

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> None:
        if module.layer_idx not in layers:
            return
        for name, x in (("k", k[0]), ("v", v[0])):
            if row >= planned.held_out:
                x = x.reshape(-1, x.shape[-1])
                order = torch.randperm(len(x), generator=generator(seed, 2, row))
                x = x[order[: planned.vectors_per_row].to(x.device)]
            kept[f"{name}.{module.layer_idx}"] = x.cpu()

    with torch.no_grad(), recording(model, record):
        # The model without its head: logits of a long row are larger than all that is kept.
        model.base_model(input_ids=tokens[None].to(model.device), use_cache=False)
    for layer in layers:
        if f"k.{layer}" not in kept:
            raise ValueError(
                f"layer {layer} of the model does not attend through transformers' attention "
                "interface, so its keys and values cannot be seen"
            )
    return kept


class Captured:
    """Vectors of a plan, in the files of a folder.

    Args:
        folder: exists; files that are there are of the same rows.
        planned: which rows and how many vectors.
        stated: what the files are to say of the run they belong to.
    """

    def __init__(self, folder: Path, planned: Plan, stated: dict[str, Any]) -> None:
        self.folder, self.plan, self.stated = folder, planned, stated

    def file(self, row: int) -> Path:
        return self.folder / f"row-{row:06d}.safetensors"

    def run(
        self,
        model: Any,
        rows: list[Tensor],
        layers: tuple[int, ...],
        *,
        seed: int,
        on_tokens: Callable[[int], None],
        stopping: Callable[[], bool],
    ) -> bool:
        """Captures the rows that have no file; False if it was told to stop before the last."""
        for row, tokens in enumerate(rows):
            if not self.file(row).exists():
                if stopping():
                    return False
                vectors = capture_row(model, tokens, row, self.plan, layers, seed)
                FILE.write(self.file(row), {"settings": self.stated}, vectors, "train_dictionary")
            on_tokens(len(tokens))
        return True

    def _read(self, row: int, name: str) -> Tensor:
        # Not through FileKind: it reads all layers to check the digest.
        try:
            with safe_open(self.file(row), framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise TrainingFileError(f"{self.file(row)} is damaged, remove it: {error}") from error

    def training(self, name: str) -> Tensor:
        """All vectors to train one dictionary on, ``[num_vectors, head_dim]``, in the model's
        dtype."""
        rows = range(self.plan.held_out, self.plan.rows)
        return torch.cat([self._read(row, name) for row in rows])

    def held_out(self, name: str) -> Tensor:
        """fp32 ``[kv_heads, tokens, head_dim]``; rows follow each other, each cut to whole pages
        of 64 tokens if it has any."""
        parts = [self._read(row, name) for row in range(self.plan.held_out)]
        whole = [x.shape[1] // PAGE_TOKENS * PAGE_TOKENS or x.shape[1] for x in parts]
        return torch.cat([x[:, :n] for x, n in zip(parts, whole, strict=True)], 1).float()
