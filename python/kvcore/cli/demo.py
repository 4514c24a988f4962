"""``kvcore demo``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from kvcore.cli.common import UserError, check_isa, need_transformers


def _demo(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    need_transformers()
    check_isa()
    from kvcore.demo import run

    try:
        return run.main(
            names=args.model or None, quick=args.quick, json_path=args.json, plot_path=args.plot
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="compare full and compressed caches on two small models shipped with kvcore",
        description="Generates from a source file of the running Python with the full cache, with "
        "TurboCache at several widths and with LexicoCache, measures what each costs in quality on "
        "held-out text and recall, and prints a table. Takes minutes; downloads nothing.",
    )
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="hybrid or control (default both)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens, wider intervals")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--plot",
        default="kvcore-demo.png",
        metavar="FILE",
        help="plot of quality against bytes (default kvcore-demo.png; needs matplotlib)",
    )
    parser.set_defaults(run=_demo)
