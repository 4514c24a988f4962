"""``kvcore eval`` and ``kvcore lm-eval``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvcore.cli.common import (
    MODEL_HELP,
    UserError,
    add_model_options,
    check_isa,
    load_model,
    need_transformers,
    read_texts,
)


def _subject(name: str, args: argparse.Namespace, texts: list[str] | None) -> Any:
    """The model that `kvcore eval` measures next, and what it is measured on."""
    import torch

    from kvcore.demo import models, tasks
    from kvcore.eval import recall, run

    loaded = load_model(name, dtype=args.dtype, device=args.device)
    if texts is None:
        texts = [tasks.held_out_text().tobytes().decode(errors="replace")]
    tokens, prefix = run.text_tokens(texts, loaded.encode)
    symbols = None
    if name in models.NAMES:  # what they were trained to recall
        symbols = recall.Symbols(
            torch.arange(models.NUM_KEYS) + models.FIRST_KEY,
            torch.arange(models.NUM_VALUES) + models.FIRST_VALUE,
        )
    return run.Subject(
        name, loaded.model, loaded.decode, tokens, prefix, symbols, loaded.max_positions
    )


def _eval(args: argparse.Namespace) -> int:
    import platform
    import shlex

    need_transformers()
    from kvcore.eval import command, options, specs

    source: dict[str, Any] = {"files": "held out of the standard library"}
    source["python"] = platform.python_version()
    texts = None
    if args.text is not None:
        texts, sha = read_texts(args.text)
        source = {"files": len(args.text), "sha256": sha}
    check_isa()
    try:
        plan = options.plan_of(args)
        caches = specs.parse_all(args.cache, args.dictionaries)
        names = list(dict.fromkeys(args.model))
        return command.main(
            (_subject(name, args, texts) for name in names),
            caches,
            plan,
            command=shlex.join(["kvcore", *args.argv]),
            text=source,
            out=None if args.out is None else Path(args.out),
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def add_eval(commands: Any) -> None:
    from kvcore.eval import options

    parser = commands.add_parser(
        "eval",
        help="measure what caches cost a model in quality, and the bytes that they hold",
        description="Scores text and recall step by step through each cache and compares with the "
        "full one: bits per byte, KL, next-token agreement, needles by depth and length, recall "
        "against the number of pairs, how evenly a prompt suffers, and bytes. A cache that a model "
        "cannot have is listed with the reason. Ctrl-C keeps what was finished.",
    )
    parser.add_argument(
        "--model", required=True, action="append", metavar="MODEL", help=f"{MODEL_HELP}; repeatable"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="to score, and to hide needles in (default: source files of Python that the shipped "
        "models were not trained on)",
    )
    parser.add_argument("--out", metavar="DIR", help="gets eval.json and the plots")
    options.add_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=_eval)


def _lm_eval(args: argparse.Namespace) -> int:
    need_transformers()
    try:
        from kvcore import lm_harness
    except ModuleNotFoundError as error:
        raise UserError(
            f"this command needs lm-evaluation-harness, and there is no {error.name}; "
            "run pip install 'kvcore[eval]'"
        ) from error
    check_isa()
    try:
        return lm_harness.main(args.options)
    except lm_harness.RefusedError as error:
        raise UserError(str(error)) from error


def add_lm_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "lm-eval",
        help="run tasks of lm-evaluation-harness through a cache",
        add_help=False,  # --help is the harness's
        allow_abbrev=False,
    )
    parser.set_defaults(run=_lm_eval, takes_options=True)
