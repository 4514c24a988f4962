"""The options of ``kvcore eval``."""

from __future__ import annotations

import argparse
import dataclasses

from kvcore.eval import specs
from kvcore.eval.run import MEASURES, Plan

_NUMBERS = {
    "seeds": "at least 3",
    "sequences": "of text, for each seed",
    "context": "tokens of a text before those that are scored",
    "scored": "tokens of a text that are scored",
    "prompts": "of recall, for each seed and setting",
    "depths": "of needles, from the start of a prompt to its end",
    "pairs_length": "tokens of a prompt with pairs",
    "chunk": "tokens of a step; 1 decodes token by token, and takes longer",
    "batch": "sequences that run together",
}
_LISTS = {"lengths": "tokens of prompts with needles", "pairs": "numbers of pairs in a prompt"}


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas, got {text!r}") from None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds those that say what is measured, and how much of it."""
    parser.add_argument("--cache", default=specs.DEFAULT, metavar="SPECS", help=specs.HELP)
    parser.add_argument(
        "--dictionaries",
        metavar="PATH",
        help="of lexico caches: what train-dictionary made (default: beside the model's weights)",
    )
    parser.add_argument(
        "--measures",
        default=",".join(MEASURES),
        metavar="LIST",
        help=f"some of {', '.join(MEASURES)} (default all)",
    )
    defaults = {field.name: field.default for field in dataclasses.fields(Plan)}
    for name, text in _NUMBERS.items():
        option = f"--{name.replace('_', '-')}"
        shown = f"{text} (default {defaults[name]})"
        parser.add_argument(option, type=int, default=defaults[name], metavar="N", help=shown)
    for name, text in _LISTS.items():
        shown = f"{text}, with commas (default {','.join(map(str, defaults[name]))})"
        parser.add_argument(
            f"--{name}", type=_integers, default=defaults[name], metavar="N,N", help=shown
        )


def plan_of(args: argparse.Namespace) -> Plan:
    """Of parsed options. ValueError, naming the option, for values that mean nothing."""
    names = (*_NUMBERS, *_LISTS)
    try:
        return Plan(
            measures=tuple(args.measures.split(",")),
            **{name: getattr(args, name) for name in names},
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from error
