"""Rows of tokens from texts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcore.lexico_training.trainer import generator

MIN_ROW = 64


def text_rows(
    texts: list[str], encode: Callable[[str], Tensor], *, context: int, tokens: int, seed: int = 0
) -> list[Tensor]:
    """Rows of up to `context` tokens, each of one text, in random order.

    Args:
        texts: one file each.
        encode: from text to int64 ``[1, tokens]``.
        context: tokens of a row; the rest of a text, if it has `MIN_ROW` tokens, is a shorter one.
        tokens: in all rows, about; rows beyond it are left out.
        seed: of the order.

    Raises:
        ValueError: if there are not two rows.
    """
    parts = [part for text in texts for part in encode(text)[0].cpu().split(context)]
    parts = [part for part in parts if len(part) >= MIN_ROW]
    rows, total = [], 0
    for i in torch.randperm(len(parts), generator=generator(seed, 4)).tolist():
        if total >= tokens and len(rows) >= 2:
            break
        rows.append(parts[i])
        total += len(parts[i])
    if len(rows) < 2:
        raise ValueError(
            f"the text must give two rows of {MIN_ROW} to {context} tokens or more, one of them to "
            f"be held out, got {len(rows)}"
        )
    return rows
