"""Training data: the standard library's own source text, and associative recall woven into it.

Recall is made of two-token events, a key symbol and a value symbol, that never occur in text. The
first event of a key binds it to a value; every later event of that key is a query whose value is
the answer. Events may follow each other directly or have source text between them, so that the
answer has to be fetched across text. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcore.demo.models import FIRST_KEY, FIRST_VALUE

if TYPE_CHECKING:
    from kvcore.demo.train import Stage

Row = tuple[np.ndarray, np.ndarray]

# What a token of a training row is scored as.
UNSCORED, TEXT, ANSWER = 0, 1, 2

LAYOUTS = ("text", "dense", "gap", "scatter")

_OUTSIDE = {"site-packages", "dist-packages", "__pycache__"}


def is_held_out(relative_path: str) -> bool:
    """True for the 2 % of files that training never sees; a function of the path alone."""
    return hashlib.sha256(relative_path.encode()).digest()[0] < 5


def source_files(held_out: bool, root: str | Path | None = None) -> list[str]:
    """Sorted relative paths (POSIX form) of the .py files of one split below `root`.

    `root` defaults to the standard library of the running Python; installed packages are left out.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    names = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _OUTSIDE]
        relative = Path(folder).relative_to(root)
        names += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(name for name in names if is_held_out(name) == held_out)


def read_corpus(names: list[str], root: str | Path | None = None) -> np.ndarray:
    """The files' bytes one after the other, uint8 [num_bytes]."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    return np.frombuffer(b"\n".join((root / name).read_bytes() for name in names), dtype=np.uint8)


def describe(names: list[str], root: str | Path | None = None) -> dict[str, Any]:
    """What a training record says of a list of files: their number, size and SHA-256."""
    corpus = read_corpus(names, root)
    return {
        "files": len(names),
        "bytes": len(corpus),
        "names_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "contents_sha256": hashlib.sha256(corpus).hexdigest(),
    }


def window(rng: np.random.Generator, corpus: np.ndarray, length: int) -> np.ndarray:
    """`length` consecutive bytes from a random place of `corpus`, as int64."""
    start = int(rng.integers(len(corpus) - length + 1))
    return corpus[start : start + length].astype(np.int64)


def echo(rng: np.random.Generator, text: np.ndarray) -> np.ndarray:
    """A copy of `text` in which later bytes are overwritten by excerpts of earlier ones.

    About a third of a long text then repeats something further back, at any distance: what makes a
    model look there for the continuation, long before it has learned enough to profit in plain
    text.
    """
    text = text.copy()
    size = len(text)
    # One long excerpt, or several short ones.
    lengths = [int(rng.integers(size // 4, size // 2))] if size > 4 and rng.random() < 0.5 else []
    for length in lengths or rng.integers(24, 160, size=size // 256):
        room = size - 2 * length
        if room < 0:
            continue
        source = int(rng.integers(room + 1))
        target = source + length + int(rng.integers(room - source + 1))
        text[target : target + length] = text[source : source + length]
    return text


def weave(text: np.ndarray, slots: np.ndarray, keys: np.ndarray, values: np.ndarray) -> Row:
    """Insert the event (keys[i], values[keys[i]]) before text[slots[i]]; slots ascend.

    Returns (ids, roles), both int64 [len(text) + 2 * len(slots)]. The value of an event is an
    answer unless the event is the first of its key.
    """
    first = np.zeros(len(keys), dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    events = np.stack([keys + FIRST_KEY, values[keys] + FIRST_VALUE], axis=1).reshape(-1)
    scores = np.stack([np.full(len(keys), UNSCORED), np.where(first, UNSCORED, ANSWER)], axis=1)
    at = np.repeat(slots, 2)
    ids = np.insert(text, at, events)
    roles = np.insert(np.full(len(text), TEXT), at, scores.reshape(-1))
    return ids, roles


def gap_events(
    rng: np.random.Generator, symbols: int, num_pairs: int, before: int, between: int
) -> Row:
    """(slots, keys) of `num_pairs` bindings and, `between` bytes on, one query of each.

    The bindings follow `before` bytes; the keys are among the first `symbols` ones.
    """
    pool = rng.permutation(symbols)[:num_pairs]
    slots = np.repeat([before, before + between], num_pairs)
    return slots, np.concatenate([pool, rng.permutation(pool)])


def training_row(rng: np.random.Generator, corpus: np.ndarray, stage: Stage, layout: str) -> Row:
    """One row of a `train.Stage`: (ids, roles), int64 [stage.length] each.

    layout: "text"; "dense" (bindings, then queries without any text); "gap" (bindings, text, one
    query each); "scatter" (bindings and queries at random places of a text).
    """
    length, symbols = stage.length, stage.symbols
    values = rng.integers(symbols, size=symbols)

    def text(size):
        plain = window(rng, corpus, size)
        return echo(rng, plain) if rng.random() < stage.echo else plain

    if layout == "text":
        return text(length), np.full(length, TEXT)
    num_pairs = int(rng.integers(2, stage.max_pairs + 1))
    if layout == "dense":
        pool = rng.permutation(symbols)[:num_pairs]
        queries = rng.choice(pool, size=length // 2 - num_pairs)
        slots = np.zeros(length // 2, dtype=np.int64)
        keys = np.concatenate([pool, queries])
        return weave(text(length % 2), slots, keys, values)
    if layout == "gap":
        # Half of the rows span all they can, the others any distance.
        room = length - 4 * num_pairs
        between = room - int(rng.integers(room // 2 + 1) if rng.random() < 0.5 else rng.integers(8))
        before = int(rng.integers(room - between + 1))
        slots, keys = gap_events(rng, symbols, num_pairs, before, between)
    elif layout == "scatter":
        pool = rng.permutation(symbols)[:num_pairs]
        keys = rng.permutation(np.repeat(pool, int(rng.integers(2, 4))))
        room = length - 2 * len(keys)
        slots = np.sort(rng.integers(room + 1, size=len(keys)))
    else:
        raise ValueError(f"layout must be one of {list(LAYOUTS)}, got {layout!r}")
    return weave(text(length - 2 * len(keys)), slots, keys, values)
