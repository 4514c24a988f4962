"""Two commits against each other: both are built, and their variants take turns, round by round.

    python bench/ab.py OLD NEW --family turbo [--cases TEXT] [--quick] [--rounds N]

OLD and NEW are commits, or `.` for this checkout as it is built. Each has a process of its own. The
cases are this checkout's, so they must be such that both commits can run them. Prints the median of
the rounds' ratios with its 10th and 90th percentile; exit code 1 if NEW is slower beyond both.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
from families import FAMILIES
from remote import kvcore_at
from report import table
from timer import CacheFlusher, interleave, summary

ROOT = pathlib.Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[pathlib.Path]:
    """A built checkout of a commit, gone afterwards; this one for ``.``."""
    if commit == ".":
        yield ROOT
        return
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory(prefix="kvcore-ab-") as folder:
        tree = pathlib.Path(folder) / "kvcore"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            options = f"{os.environ.get('CMAKE_ARGS', '')} -DKVCORE_CUDA=OFF"
            subprocess.run(build, cwd=tree, check=True, env={**os.environ, "CMAKE_ARGS": options})
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)


def ratios(old: list[float], new: list[float]) -> dict[str, float]:
    """Median and spread of the rounds' ratios of new to old."""
    return summary([n / o for o, n in zip(old, new, strict=True)])


def compare(
    trees: tuple[pathlib.Path, pathlib.Path], family: str, only: str, quick: bool, rounds: int
) -> list[list[str]]:
    """Rows of variant, both medians in milliseconds, ratio, spread of the ratio, verdict."""
    device = torch.device("cpu")
    flush, rows = CacheFlusher(device), []
    for index in range(len(list(FAMILIES[family](quick, device)))):
        with contextlib.ExitStack() as stack:
            both = []
            for tree in trees:
                remote = kvcore_at(tree, family, index, quick)
                stack.callback(remote.close)
                both.append(remote)
            names = [name for name in both[0].names if only in name and name in both[1].names]
            for name in names:
                runs = {str(i): remote.variant(name) for i, remote in enumerate(both)}
                old, new = interleave(runs, rounds, device, flush).values()
                rows.append(_row(name, old, new))
    return rows


def _row(name: str, old: list[float], new: list[float]) -> list[str]:
    ratio = ratios(old, new)
    said = "slower" if ratio["p10"] > 1 else "faster" if ratio["p90"] < 1 else ""
    medians = [f"{summary(samples)['median'] * 1e3:.3f}" for samples in (old, new)]
    spread = f"{ratio['p10']:.2f}-{ratio['p90']:.2f}"
    return [name, *medians, f"{ratio['median']:.2f}", spread, said]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases that contain TEXT")
    parser.add_argument("--quick", action="store_true", help="the cases of a quick run")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    with checkout(args.old) as old, checkout(args.new) as new:
        rows = compare((old, new), args.family, args.cases, args.quick, args.rounds)
    if not rows:
        raise SystemExit(f"no case of {args.family} that both commits have contains {args.cases!r}")
    header = ["variant", f"{args.old} ms", f"{args.new} ms", "ratio", "p10-p90", ""]
    print("\n".join(table(header, rows)))
    return int(any(row[-1] == "slower" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
