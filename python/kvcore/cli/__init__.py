"""The ``kvcore`` command.

Exit codes: 0 for success, 1 for a check that failed, 2 for a mistake in the call (one line on
standard error), 130 for an interruption.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from kvcore.cli import bench, demo, doctor, evaluate, generate, train_dictionary
from kvcore.cli.common import UserError


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    import kvcore

    parser = argparse.ArgumentParser(
        prog="kvcore", description="Attention over a compressed KV cache."
    )
    parser.add_argument("--version", action="version", version=f"kvcore {kvcore.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    doctor.add_doctor(commands)
    demo.add_demo(commands)
    generate.add_generate(commands)
    train_dictionary.add_train_dictionary(commands)
    evaluate.add_eval(commands)
    evaluate.add_lm_eval(commands)
    bench.add_bench(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: this process's) and returns the exit code."""
    parser = build_parser()
    args, args.options = parser.parse_known_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.options and not getattr(args, "takes_options", False):
        parser.error(f"unrecognized arguments: {' '.join(args.options)}")
    try:
        return args.run(args)
    except UserError as error:
        print(f"kvcore {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe left (`| head`); a second failure at exit would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
