"""``kvcore train-dictionary``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from kvcore.cli.common import (
    MODEL_HELP,
    UserError,
    add_model_options,
    check_isa,
    load_model,
    read_texts,
)


def _train_dictionary(args: argparse.Namespace) -> int:
    for name in ("atoms", "sparsity", "steps", "batch", "vectors", "tokens", "context"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    texts, sha = read_texts(args.text)
    check_isa()
    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    from kvcore import lexico_training

    context = min(args.context, loaded.max_positions or args.context)
    recipe = lexico_training.Recipe(
        atoms=args.atoms,
        sparsity=args.sparsity,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
    )
    try:
        report = lexico_training.train(
            loaded.model,
            lexico_training.text_rows(
                texts, loaded.encode, context=context, tokens=args.tokens, seed=args.seed
            ),
            args.out,
            name=args.model,
            source={"text_sha256": sha, "files": len(texts)},
            recipe=recipe,
            vectors=args.vectors,
        )
    except lexico_training.Interrupted:
        print(f"interrupted; the same command goes on with {args.out}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(lexico_training.render(report))
    print(f"dictionaries.safetensors, and .json with these figures: {args.out}")
    return 0


def add_train_dictionary(commands: Any) -> None:
    parser = commands.add_parser(
        "train-dictionary",
        help="train a model's dictionaries for LexicoCache",
        description="Runs the model on texts, trains a dictionary for K and one for V of every "
        "full-attention layer, and compares what codes lose with quantization, on vectors that "
        "were held out. After an interruption the same command goes on where it was.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="to run it on")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="gets dictionaries.safetensors and .json; until then, what a run goes on from",
    )
    parser.add_argument("--atoms", type=int, default=1024, metavar="N", help="default 1024")
    parser.add_argument(
        "--sparsity", type=int, default=16, metavar="N", help="atoms of a code (default 16)"
    )
    parser.add_argument(
        "--steps", type=int, default=4000, metavar="N", help="of each dictionary (default 4000)"
    )
    parser.add_argument(
        "--batch", type=int, default=1024, metavar="N", help="vectors of a step (default 1024)"
    )
    parser.add_argument(
        "--vectors",
        type=int,
        default=262_144,
        metavar="N",
        help="to train each dictionary on (default 262144)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=262_144,
        metavar="N",
        help="of the texts to run the model on (default 262144)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of a forward pass (default 2048, or the model's positions)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    add_model_options(parser)
    parser.set_defaults(run=_train_dictionary)
