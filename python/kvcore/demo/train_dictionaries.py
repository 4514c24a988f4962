"""Train a demo model's dictionaries: `python -m kvcore.demo.train_dictionaries --model hybrid`.

On rows of the kind that the model itself was trained on, from files it was trained on: source text,
some of it with recall woven in. Running the same command again goes on with an interrupted run.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcore.demo import data, models
from kvcore.demo.train import STAGES
from kvcore.lexico_training import Interrupted, Recipe, train

# 1,024 atoms of 64 channels: 512 KiB for each attention layer's pair.
RECIPE = Recipe(atoms=1024, sparsity=8, steps=2500)
VECTORS = 262_144
ROWS = 96
# In turn; a row without recall may be as long as the demo's contexts get.
LAYOUTS = ("text", "gap", "text", "scatter")
LONG_ROW = 4352


def rows(seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    """Rows of tokens, and where they are from."""
    names = data.source_files(held_out=False)
    corpus = data.read_corpus(names)
    rng = np.random.default_rng(seed)
    stage = STAGES[-1]
    made = []
    for i in range(ROWS):
        layout = LAYOUTS[i % len(LAYOUTS)]
        if i % 8 == 0:
            ids = data.window(rng, corpus, LONG_ROW)
        else:
            ids, _ = data.training_row(rng, corpus, stage, layout)
        made.append(torch.from_numpy(ids))
    source = {
        "text_sha256": hashlib.sha256(corpus).hexdigest(),
        "text": "source files of Python's standard library that are not held out, and recall",
        "seed": seed,
    }
    return made, source


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvcore.demo.train_dictionaries", description=__doc__
    )
    parser.add_argument("--model", choices=models.NAMES, required=True)
    parser.add_argument("--out", help="folder for the dictionaries (default: the model's own)")
    args = parser.parse_args(argv)
    tokens, source = rows()
    try:
        train(
            models.load(args.model),
            tokens,
            Path(args.out or models.path(args.model)),
            name=args.model,
            source=source,
            recipe=RECIPE,
            vectors=VECTORS,
        )
    except Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
