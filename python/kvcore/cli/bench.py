"""``kvcore bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kvcore.cli.common import UserError


def _bench(args: argparse.Namespace) -> int:
    import subprocess

    import kvcore

    options = args.options
    name = "run"
    if options and options[0] in ("report", "compare", "ab"):
        name, options = options[0], options[1:]
    if args.checkout is not None:
        folders = [Path(args.checkout).resolve()]
    else:
        # An editable installation lies in its checkout; another one may be run in a clone.
        folders, here = [Path(kvcore.__file__).parents[2]], Path.cwd()
        if (here / "python" / "kvcore").is_dir():
            folders.append(here)
    scripts = (folder / "bench" / f"{name}.py" for folder in folders)
    script = next((script for script in scripts if script.is_file()), None)
    if script is None:
        raise UserError(
            f"there is no bench/{name}.py in {' or '.join(map(str, folders))}: the benchmarks are "
            "part of kvcore's source, not of the installed package; run this in a clone of the "
            "repository, or name its folder with --checkout"
        )
    return subprocess.run([sys.executable, str(script), *options], check=False).returncode


def add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="run the benchmarks of a checkout, and report or compare their results",
        description="Runs bench/run.py of a checkout of kvcore with this Python and this kvcore, "
        "and returns its exit code. All other options are passed on: --family turbo, --quick, "
        "--cases TEXT, --rounds N, --peers NAME, --out DIR. As first word, report (tables and "
        "plots from the results), compare (two results) or ab (two commits) runs that script "
        "instead.",
        allow_abbrev=False,  # --check is report's, not --checkout
    )
    parser.add_argument(
        "--checkout",
        metavar="DIR",
        help="folder of the checkout (default: the one that kvcore is imported from, or this one)",
    )
    parser.set_defaults(run=_bench, takes_options=True)
