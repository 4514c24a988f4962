"""``kvcore doctor``."""

from __future__ import annotations

import argparse
from typing import Any

from kvcore.cli.common import (
    MODEL_HELP,
    UserError,
    add_model_options,
    load_model,
    read_text,
    refuse_given,
    write_json,
)


def _doctor(args: argparse.Namespace) -> int:
    from kvcore import doctor

    if args.model is None:
        refuse_given(args, args.of_model, "--model")
    text = read_text(args.text) if args.text is not None else None
    diagnosis = doctor.diagnose()
    if args.model is not None:
        loaded = load_model(args.model, dtype=args.dtype, device=args.device)
        try:
            diagnosis["model"] = doctor.examine(loaded, text, max_tokens=args.max_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error
    if args.json is not None:
        write_json(args.json, diagnosis)
    if args.json != "-":
        print(doctor.render(diagnosis))
    return 0 if doctor.healthy(diagnosis) else 1


def add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what runs here, check every op, and recommend bits for a model",
        description="Prints the versions, libraries and CPU instruction sets in use, runs each op "
        "against its reference, and says why anything is not used. With --model it also runs the "
        "model on a text and measures, per layer, outlier channels of K, QK norm, and the error of "
        "attention at each bit width. Exit code 1 if an op fails.",
    )
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    text = parser.add_argument(
        "--text", metavar="FILE", help="text to run the model on (default: a source file of Python)"
    )
    max_tokens = parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="of that text (default 1024)"
    )
    of_model = [text, max_tokens, *add_model_options(parser)]
    parser.add_argument("--json", metavar="FILE", help="write the findings there; - prints them")
    parser.set_defaults(run=_doctor, of_model=of_model)
